"""Sharing adapters on the Hugging Face Hub: model cards, uploads."""
