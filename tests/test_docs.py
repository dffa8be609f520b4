"""The pages' code, run as a reader would run it, block after block."""

import os
import re
from pathlib import Path

import pytest
import torch
from conftest import fresh
from peft import LoraConfig, get_peft_model
from test_generation import tokenizer


ROOT = Path(__file__).resolve().parent.parent


def run_blocks(page, namespace=None):
    """Execute the Python blocks of a page, one after another, in one namespace; return it."""
    namespace = {} if namespace is None else namespace
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)
    return namespace


@pytest.fixture
def hub_of_models(tmp_path, monkeypatch):
    """A working directory in which the pages' names, such as `org/seed`, are folders of models."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("org")
    for seed, name in enumerate(("seed", "seed-code", "seed-math", "seed-bio", "law")):
        fresh("llama", seed=seed, width=64).save_pretrained(f"org/{name}")
        tokenizer().save_pretrained(f"org/{name}")
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
    seed = fresh("llama", width=64)
    seed.config._name_or_path = "org/seed"
    for name in ("seed-law-lora", "seed-tax-lora"):
        get_peft_model(seed, lora).save_pretrained(f"org/{name}")
        seed = fresh("llama", width=64)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_experts(hub_of_models):
    names = run_blocks("docs/experts.md")
    assert sorted(names["again"].active_peft_config.experts) == ["code", "law", "math"]
    assert names["again"].active_peft_config.experts["math"]["quantization_config"]["load_in_4bit"]
    assert names["model"](torch.arange(3, 9)[None]).logits.isfinite().all()
