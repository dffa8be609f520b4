"""`check_compatibility` says beforehand, without any weight, what `attach_expert` would say of the loaded models."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from peft_bts import StitchConfig, check_compatibility
from tests.helpers.models import fresh
from tests.helpers.zoo import ARCHITECTURES, UNSUPPORTED, tiny_config


TOKENS = [f"t{i}" for i in range(64)]


def folder(path, arch="llama", *, tokens=TOKENS, weights=False, chat_template=None, special=None, **sizes):
    """What a download starts with: a config and, unless `tokens` is None, a tokenizer. Weights only if asked for."""
    model = fresh(arch, **sizes) if weights else tiny_config(arch, **sizes)
    model.save_pretrained(path)
    if tokens is not None:
        words = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token=tokens[0], **(special or {}))
        tokenizer.chat_template = chat_template
        tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def hub(tmp_path):
    return folder(tmp_path / "hub")


def attach_says(tmp_path, hub, expert, **config):
    """The error of attaching the loaded models; `None` if there is none."""
    for path in (hub, expert):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)).save_pretrained(path)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(hub), StitchConfig(task_type="CAUSAL_LM", **config))
    try:
        model.attach_expert("new", expert)
    except ValueError as error:
        return str(error)
    return None


SWAPPED = [*TOKENS[:10], TOKENS[11], TOKENS[10], *TOKENS[12:]]


@pytest.mark.parametrize(
    ("expert", "config", "match"),
    [
        ({}, {}, None),
        ({"layers": 6, "width": 48, "vocab": 80}, {}, None),
        ({"tokens": SWAPPED}, {}, r"token 't10' is id 11, expected 10"),
        ({"tokens": TOKENS[:48], "vocab": 48}, {}, r"48 token embeddings.*ids up to 63"),
        ({"tokens": None, "vocab": 48}, {}, r"48 token embeddings, the hub 64.*no tokenizer"),
        ({"width": 48}, {"expert_streams": "projected"}, r"width 48, the hub 32.*intact"),
    ],
    ids=["same", "other sizes", "swapped", "short", "no tokenizer", "projected"],
)
def test_says_what_attach_says(tmp_path, hub, expert, config, match):
    """The verdict from config and tokenizer files is that of attaching the loaded models, to the letter."""
    expert = folder(tmp_path / "expert", **expert)
    report = check_compatibility(hub, expert, name="new", **config)
    assert not list(Path(tmp_path).rglob("*.safetensors"))  # there was no weight to read
    assert report.ok == (match is None)
    said = attach_says(tmp_path, hub, expert, **config)
    assert said == ("\n".join(report.errors) or None)
    if match is not None:
        assert re.search(match, report.errors[0])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_supported_architectures(arch):
    """Every supported architecture is found to be one by its config alone, as hub and as expert."""
    config, llama = tiny_config(arch), tiny_config("llama")
    assert check_compatibility(llama, config).ok and check_compatibility(config, llama).ok


@pytest.mark.parametrize("arch", UNSUPPORTED)
def test_state_space_models(arch):
    report = check_compatibility(tiny_config("llama"), tiny_config(arch), name="new")
    assert not report.ok and re.search(rf"'new' \({arch}\).*past_key_values", report.errors[0])
    assert re.search(rf"The hub \({arch}\).*", check_compatibility(tiny_config(arch), tiny_config("llama")).errors[0])


@pytest.mark.parametrize("how", ["path", "object", "config", "dict"])
def test_facts(tmp_path, hub, how):
    """The report holds both models' sizes, however they are given."""
    path = folder(tmp_path / "expert", "gpt2", layers=6, width=48, vocab=80, weights=True)
    given = {"path": path, "object": AutoModelForCausalLM.from_pretrained(path), "dict": {"model": path}}
    report = check_compatibility(hub, (given | {"config": given["object"].config})[how])
    facts = report.to_dict()["expert"]
    assert facts == {
        "source": path,
        "model_type": "gpt2",
        "num_layers": 6,
        "width": 48,
        "embedding_rows": 80,
        "tokens": 64,
        "adapter": None,
    }
    assert (report.hub.num_layers, report.hub.width, report.hub.embedding_rows) == (4, 32, 64)


def test_notes(tmp_path):
    """What differs without being an obstacle: sizes, special tokens, chat templates, tokens of one side only."""
    hub = folder(tmp_path / "hub", special={"eos_token": "t1"}, chat_template="A")
    expert = folder(
        tmp_path / "expert",
        "qwen3",
        layers=6,
        width=48,
        vocab=66,
        tokens=[*TOKENS, "<chat>", "<end>"],
        special={"eos_token": "<end>"},
        chat_template="B",
        max_position_embeddings=64,
    )
    notes = check_compatibility(hub, expert).notes
    for match in [
        r"architecture: qwen3, the hub is llama",
        r"depth: 6 layers, the hub has 4",
        r"width: 48, the hub has 32",
        r"token embeddings: 66, the hub has 64",
        r"up to 64 tokens, the hub for 128",
        r"eos token: '<end>', the hub has 't1'",
        r"2 tokens \('<chat>', '<end>'\) of the expert's tokenizer",
        r"Another chat template",
    ]:
        assert any(re.search(match, note) for note in notes), (match, notes)
    back = check_compatibility(expert, hub).notes
    assert any("unknown to the expert's" in note for note in back)
    assert check_compatibility(hub, hub).notes == []


def test_lora_of_the_hub(tmp_path, hub):
    """A LoRA is recognised by its adapter_config.json and compared as the hub that it stands on."""
    lora = get_peft_model(fresh("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    lora.peft_config["default"].save_pretrained(tmp_path / "lora")
    for seed in (hub, AutoModelForCausalLM.from_config(tiny_config("llama"))):
        report = check_compatibility(seed, str(tmp_path / "lora"))
        assert report.ok and report.expert.adapter == "LORA" and report.expert.num_layers == 4
        assert any("whose weights it shares" in note for note in report.notes)
    elsewhere = check_compatibility(
        hub, {"adapter": str(tmp_path / "lora"), "model": folder(tmp_path / "base", width=48)}
    )
    assert elsewhere.ok and elsewhere.expert.width == 48
    assert not any("shares" in note for note in elsewhere.notes)
    other = check_compatibility(tiny_config("gpt2"), str(tmp_path / "lora"), name="new")
    assert not other.ok and "'new'" in other.errors[0] and "q_proj" in other.errors[0]


def test_adapters_that_cannot_be_experts(tmp_path, hub):
    soft_prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    for config in (soft_prompt, StitchConfig(task_type="CAUSAL_LM")):
        config.save_pretrained(tmp_path / "adapter")
        report = check_compatibility(hub, str(tmp_path / "adapter"), name="new")
        assert re.search(r"(?s)'new'.*adapters cannot be experts", report.errors[0])


def test_nothing_there(tmp_path, hub):
    """An expert that cannot be read is a finding; a hub that cannot be read leaves nothing to compare."""
    report = check_compatibility(hub, str(tmp_path / "nothing"), name="new")
    assert re.search(r"'new' could not be loaded from '.*nothing'", report.errors[0])
    with pytest.raises(ValueError, match=r"hub's config could not be read from '.*nothing'.*"):
        check_compatibility(str(tmp_path / "nothing"), hub)
    with pytest.raises(ValueError, match=r"letters, digits and '_'"):
        check_compatibility(hub, hub, name="a.b")


def test_models_are_left_alone(hub):
    """A loaded model that is only looked at keeps its mode and its trainable weights; a stitched hub works too."""
    expert, base = fresh("llama", seed=1).train(), fresh("llama")
    stitched = get_peft_model(base, StitchConfig(task_type="CAUSAL_LM"))
    before = [p.requires_grad for p in expert.parameters()], torch.get_rng_state()
    assert check_compatibility(stitched, expert).ok and check_compatibility(stitched, hub).ok
    assert expert.training and [p.requires_grad for p in expert.parameters()] == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert "another stitched model" in check_compatibility(hub, stitched).errors[0]
    assert "hub itself" in check_compatibility(expert, expert).errors[0]


def test_the_report_reads(tmp_path, hub):
    """`str` for people, `to_dict` for programs."""
    expert = folder(tmp_path / "expert", tokens=SWAPPED, layers=6)
    report = check_compatibility(hub, expert, name="code")
    lines = [line.strip() for line in str(report).splitlines()]
    assert lines[0] == "Expert 'code' does not fit the hub."
    assert any(re.fullmatch(r"num layers\s+4\s+6", line) for line in lines)
    assert any(line.startswith("error: Expert 'code' has another tokenizer") for line in lines)
    assert any(line.startswith("note: Another depth") for line in lines)
    assert str(check_compatibility(hub, hub)).startswith("Expert 'expert' fits the hub.")
    assert json.loads(json.dumps(report.to_dict()))["errors"] == report.errors


def test_a_changed_tokenizer_is_read_again(tmp_path, hub):
    """Tokenizers are kept between checks, but not longer than their files stay the same."""
    expert = folder(tmp_path / "expert", tokens=SWAPPED)
    assert not check_compatibility(hub, expert).ok
    folder(tmp_path / "expert", tokens=[*TOKENS])
    assert check_compatibility(hub, expert).ok
