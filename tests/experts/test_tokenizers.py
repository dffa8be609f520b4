"""An expert must read the same words out of the same ids as the hub; where it cannot, attaching it is refused."""

import pytest
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from peft_bts import check_compatibility
from tests.helpers.bad_input import TOKENS, config, refused, save
from tests.helpers.models import fresh, logits, randomize, stitch


SWAPPED = [*TOKENS[:10], TOKENS[11], TOKENS[10], *TOKENS[12:]]
OTHER_WORD = [*TOKENS[:20], "other", *TOKENS[21:]]


@pytest.mark.parametrize("how", ["path", "object", "config", "dict"])
@pytest.mark.parametrize(
    ("tokens", "match"),
    [
        (SWAPPED, r"'new' has another tokenizer than the hub.*('t10'.*11|'t11'.*10).*expected (10|11)"),
        (OTHER_WORD, r"'new' has another tokenizer than the hub.*20.*'other'.*'t20'"),
        ([*TOKENS[1:], TOKENS[0]], r"'new' has another tokenizer than the hub"),
    ],
    ids=["swapped", "other word", "shifted"],
)
def test_other_tokenizers(tmp_path, tokens, match, how):
    """An expert that reads other words out of the hub's ids would be noise: refused, with an example."""
    hub = AutoModelForCausalLM.from_pretrained(save(tmp_path / "hub"))
    path = save(tmp_path / "expert", tokens, seed=2)
    if how == "config":
        with refused(hub, match=match):
            get_peft_model(hub, config(experts={"new": path}))
        return
    model = stitch(hub, {"a": fresh("llama", seed=1)})
    expert = {"path": path, "object": AutoModelForCausalLM.from_pretrained(path), "dict": {"model": path}}[how]
    with refused(model, match=match):
        model.attach_expert("new", expert)


@pytest.mark.parametrize(
    ("tokens", "vocab", "hub_tokens", "hub_vocab"),
    [
        (TOKENS, 64, TOKENS, 64),
        (TOKENS, 80, TOKENS, 64),  # padded with unused embeddings
        (TOKENS, 64, TOKENS, 80),
        (TOKENS[:60], 64, TOKENS[:60], 80),
        ([*TOKENS, "<chat>", "<end>"], 66, TOKENS, 64),  # the expert got tokens of its own, which the hub never says
        (TOKENS[:62], 64, TOKENS, 64),  # the hub got two that the expert has embeddings, but no words, for
        (None, 64, TOKENS, 64),
        (TOKENS, 64, None, 64),
        (None, 80, None, 64),
    ],
)
def test_tokenizers_that_fit(tmp_path, tokens, vocab, hub_tokens, hub_vocab):
    """Vocabularies that only pad differently are no obstacle, and unknown tokenizers need only enough embeddings."""
    hub = AutoModelForCausalLM.from_pretrained(save(tmp_path / "hub", hub_tokens, hub_vocab))
    path = save(tmp_path / "expert", tokens, vocab, seed=2)
    model = get_peft_model(hub, config(experts={"new": path}))
    model.attach_expert("again", AutoModelForCausalLM.from_pretrained(path))
    assert logits(randomize(model)).isfinite().all()


@pytest.mark.parametrize(
    ("tokens", "hub_tokens", "match"),
    [
        (TOKENS[:48], TOKENS, r"'new' has 48 token embeddings.*ids up to 63"),
        (TOKENS[:48], None, r"'new' has 48 token embeddings, the hub 64.*no tokenizer"),
        (None, TOKENS, r"'new' has 48 token embeddings, the hub 64.*no tokenizer"),
        (None, None, r"'new' has 48 token embeddings, the hub 64.*no tokenizer"),
    ],
)
def test_too_few_embeddings(tmp_path, tokens, hub_tokens, match):
    """Ids that the hub may see and the expert has no embedding for would crash some day in training."""
    hub = AutoModelForCausalLM.from_pretrained(save(tmp_path / "hub", hub_tokens))
    path = save(tmp_path / "expert", tokens, vocab=48, seed=2)
    model = stitch(hub, {"a": fresh("llama", seed=1)})
    with refused(model, match=match):
        model.attach_expert("new", path)


@pytest.mark.parametrize(
    ("hub_tokens", "tokens", "who"),
    [(TOKENS, None, "expert 'new'"), (None, TOKENS, "the hub"), (None, None, "expert 'new' and the hub")],
)
def test_unknown_tokenizers(tmp_path, hub_tokens, tokens, who):
    """Nobody can tell whether they agree, so whoever attaches is told."""
    hub = AutoModelForCausalLM.from_pretrained(save(tmp_path / "hub", hub_tokens))
    with pytest.warns(UserWarning, match=f"No tokenizer lies beside {who}, so only .*'new' reads other words"):
        get_peft_model(hub, config(experts={"new": save(tmp_path / "expert", tokens)}))


def test_differences_are_logged(tmp_path, caplog):
    """What `peft-bts check` notes, those find in the log who attach without asking it."""
    hub = AutoModelForCausalLM.from_pretrained(save(tmp_path / "hub"))
    path = save(tmp_path / "expert", [*TOKENS, "<chat>"], 66, arch="gpt2")
    with caplog.at_level("INFO", logger="peft_bts"):
        get_peft_model(hub, config(experts={"new": path}))
    notes = check_compatibility(str(tmp_path / "hub"), path).notes
    logged = [record.getMessage() for record in caplog.records if record.name == "peft_bts.experts.attaching"]
    assert len(notes) > 2 and logged == [f"Expert 'new': {note}" for note in notes]
