"""LoRAs on other models than they were trained on: a warning where it looks so, an error where it is proven."""

import json
import os
import shutil
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from peft_bts import check_compatibility
from peft_bts.experts.lora_base import same_source
from tests.helpers.bad_input import config, refused
from tests.helpers.models import logits
from tests.helpers.text import save_model
from tests.helpers.zoo import tiny_model


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two fine-tunes of one shape, a deeper one, and a LoRA of each."""
    root = tmp_path_factory.mktemp("bases")
    for seed, (name, options) in enumerate({"seed": {}, "tuned": {}, "deep": {"layers": 6}}.items()):
        save_model(root / name, seed=seed, **options)
        lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(plain(root / name), lora).save_pretrained(root / f"lora-of-{name}")
    return root


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def edited(root, tmp_path, **values):
    """A copy of the seed's LoRA with other values in its config."""
    shutil.copytree(root / "lora-of-seed", tmp_path / "lora")
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return str(tmp_path / "lora")


def stitched(folder):
    model = get_peft_model(plain(folder), config(num_stitches=2))
    model.attach_expert("a", tiny_model("llama", seed=5))
    return model


def test_the_right_base(root):
    """No word about the LoRA of the hub, or of the base that its reference names; or of both, under another name."""
    model = stitched(root / "seed")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.attach_expert("own", str(root / "lora-of-seed"))
        model.attach_expert("other", {"adapter": str(root / "lora-of-tuned"), "model": str(root / "tuned")})
    report = check_compatibility(str(root / "seed"), str(root / "lora-of-seed"))
    assert report.ok and not report.warnings and "whose weights it shares" in report.notes[0]


def test_another_base(root):
    """It runs, in case the weights are the same after all; both models are named, and so is the way out."""
    match = rf"'x' is a LORA adapter of '{root}/tuned'.*runs on '{root}/seed' here.*as `model`"
    model = stitched(root / "seed")
    with pytest.warns(UserWarning, match=match):
        model.attach_expert("x", str(root / "lora-of-tuned"))
    with pytest.warns(UserWarning, match=match):
        get_peft_model(plain(root / "seed"), config(experts={"x": str(root / "lora-of-tuned")}))
    with pytest.warns(UserWarning, match=f"'y' is a LORA adapter of '{root}/tuned'.*runs on '{root}/seed'"):
        model.attach_expert("y", {"adapter": str(root / "lora-of-tuned"), "model": str(root / "seed")})
    report = check_compatibility(str(root / "seed"), str(root / "lora-of-tuned"), name="x")
    assert (
        report.ok and f"'{root}/tuned'" in report.warnings[0] and f"warning: {report.warnings[0][:40]}" in str(report)
    )


@pytest.mark.parametrize(("hub", "lora"), [("seed", "lora-of-deep"), ("deep", "lora-of-seed")])
def test_another_depth(root, hub, lora):
    """PEFT would drop the layers that are too many, and leave those that are missing as they are."""
    model = stitched(root / hub)
    with refused(model, match=r"(?s)'x' could not be loaded.*adapter of another model.*layers 0-[35],.*for 0-[35]"):
        model.attach_expert("x", str(root / lora))


def test_another_commit(root, tmp_path):
    """A folder in the cache names its commit; where the LoRA's config names another, that is proof."""
    cache = tmp_path / "models--org--seed" / "snapshots"
    commits = ["a" * 40, "b" * 40]
    shutil.copytree(root / "seed", cache / commits[0])
    lora = edited(root, tmp_path, base_model_name_or_path="org/seed", revision=commits[1])
    model = stitched(cache / commits[0])
    with refused(model, match=f"'x' is a LORA adapter of 'org/seed' at commit {commits[1]}.*of commit {commits[0]}"):
        model.attach_expert("x", lora)
    os.rename(cache / commits[0], cache / commits[1])
    model = stitched(cache / commits[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.attach_expert("x", lora)


def test_a_local_copy_of_an_id(root, tmp_path):
    """Who works without the Hub loads `org/seed` from a folder of that name; the LoRA works on it, without a word."""
    lora = edited(root, tmp_path, base_model_name_or_path="org/seed")
    model = stitched(root / "seed")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.attach_expert("x", lora)
    alone = PeftModel.from_pretrained(plain(root / "seed"), root / "lora-of-seed")
    assert torch.equal(logits(model.base_model.experts["default"]["x"].model), logits(alone))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("org/seed", "org/seed", True),
        ("org/seed", "else/seed", False),
        ("org/seed", "org/tuned", False),
        ("org/seed", "/data/seed", True),
        ("org/seed", "/data/tuned", False),
        ("/data/models--org--seed/snapshots/0123", "org/seed", True),
        ("/data/models--org--seed/snapshots/0123", "/home/models--org--seed/snapshots/4567", True),
        ("/data/models--org--seed/snapshots/0123", "else/seed", False),
        ("/runs/1/last", "/runs/2/last", False),
        (".", os.getcwd(), True),
    ],
)
def test_names_of_one_model(one, other, same):
    assert same_source(one, other) is same and same_source(other, one) is same
