"""Recipes: one YAML file from which every command works."""
