"""Seeds and experts, and the loop that trains everything."""

import copy

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.replication.branching import models as branching
from benchmarks.replication.branching import training
from benchmarks.replication.branching.models import EXPERTS, mix_of
from benchmarks.replication.tokens.blocks import training_blocks
from benchmarks.replication.tokens.tokenizer import VOCABULARY


@pytest.mark.parametrize("size", [size for size in branching.SIZES if size != "smoke"])
def test_models_are_as_large_as_they_are_called(tokenizer, size):
    model = branching.new_model(size, tokenizer)
    more = (VOCABULARY - len(tokenizer)) * model.config.hidden_size
    assert (model.num_parameters() + more) / 1e6 == pytest.approx(float(size[:-1]), rel=0.02)


@pytest.mark.parametrize("share, tries", [(2.0, 1), (0.1, 3)])
def test_an_expert_that_has_not_learned_is_trained_again(
    tmp_path, monkeypatch, models, tokenizer, corpora, share, tries
):
    models[0].save_pretrained(tmp_path / "seed")
    orders = []

    def train(model, rows, **_):
        orders.append(rows)
        return {"loss": 0.0}

    monkeypatch.setattr(branching, "train", train)
    monkeypatch.setitem(branching.LEARNED, "maths", share)
    blocks = training_blocks(tokenizer, corpora, seed=0)
    found = branching.branch_expert(
        "maths", tmp_path / "seed", tmp_path / "maths", blocks, corpora, tokenizer, branching.Stage(2, 1e-3), seed=0
    )
    assert (found["learned"], len(found["tries"]), len(orders)) == (tries == 1, tries, tries)
    assert all(not torch.equal(one, orders[0]) for one in orders[1:])
    assert found["tries"] == pytest.approx([found["seed"]] * tries)  # nothing was trained
    assert LlamaForCausalLM.from_pretrained(tmp_path / "maths").num_parameters() == models[0].num_parameters()


def test_mixes_are_shares():
    for name in ["seed", *EXPERTS]:
        assert sum(mix_of(name).values()) == pytest.approx(1)
        assert name == "seed" or max(mix_of(name), key=mix_of(name).get) == name


# --- The training loop ----------------------------------------------------------------------------------------------


def test_mix_keeps_the_shares():
    blocks = {"a": torch.zeros(5, 2, 4), "b": torch.ones(50, 2, 4)}
    rows = training.mix(blocks, {"a": 0.25, "b": 0.75}, 40, seed=0)
    assert len(rows) == 40 and rows[:, 0, 0].sum() == 30
    assert 2 < rows[:20, 0, 0].sum() < 18  # in random order
    assert torch.equal(rows, training.mix(blocks, {"a": 0.25, "b": 0.75}, 40, seed=0))


def test_training_lowers_the_loss_and_pauses(models):
    model, seen = copy.deepcopy(models[0]).requires_grad_(True), []
    blocks = torch.randint(1, 5, (40, 1, 8)).expand(-1, 2, -1)
    before = model(input_ids=blocks[:, 0], labels=blocks[:, 1]).loss.item()
    result = training.train(model, blocks, steps=10, learning_rate=1e-2, desc="", pauses=[5, 10], at_pause=seen.append)
    assert result["loss"] < 0.7 * before and seen == [5, 10] and not model.training
