"""The recipes in `recipes/`: all are read, and what they say `plan` says is what it says."""

import pytest

from peft_bts.recipes.recipe import read_recipe
from tests import ROOT
from tests.helpers.families import FAMILIES, configs, plan_lines, written_lines


RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_whole(path):
    recipe = read_recipe([str(path), "--use_cpu", "True"])
    recipe.require("hub", "experts", "datasets", "output_dir")
    assert recipe.training_arguments().max_steps > 0
    assert path.stem in FAMILIES or path.stem == "toy"
    assert "Planned, not run" in path.read_text() or path.stem == "toy"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_what_plan_says(family):
    """Counted on configs of the published sizes; `python -m tests.helpers.families` writes the lines anew."""
    with configs():
        assert written_lines(family) == plan_lines(family)


def test_the_page_says_it_too():
    """docs/recipes.md answers for four models of 7B with the recipe's own lines."""
    page = " ".join((ROOT / "docs" / "recipes.md").read_text().replace("> ", "").split())
    lines = written_lines("olmo2-7b").replace("# plan: ", "").replace("# ", "")
    assert " ".join(lines.split()) in page
