"""Fixtures that tests of several folders use."""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from tests.helpers.bad_input import config, save
from tests.helpers.checkpoints import save_models
from tests.helpers.hub_server import FreshProcesses, HubServer
from tests.helpers.models import logits, randomize


@pytest.fixture(scope="session")
def hub():
    """A Hugging Face Hub on this machine, with two owners."""
    with HubServer(tokens={"hf_ann": "ann", "hf_org": "org"}) as server:
        yield server


@pytest.fixture(scope="session")
def run(hub, tmp_path_factory):
    """Runs a function in a fresh process that talks to `hub`."""
    return FreshProcesses(hub, tmp_path_factory.mktemp("hub_home"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A seed, three experts of other shapes, and a LoRA of the seed, on disk; see `checkpoints.make`."""
    root = tmp_path_factory.mktemp("models")
    save_models(root)
    return root


@pytest.fixture
def adapter(tmp_path):
    """A saved adapter of two experts; folders `hub`, `code`, `math` and `adapter`."""
    save(tmp_path / "hub", None)
    experts = {
        "code": save(tmp_path / "code", None, seed=1),
        "math": save(tmp_path / "math", None, seed=2, arch="gpt2"),
    }
    hub = AutoModelForCausalLM.from_pretrained(tmp_path / "hub")
    model = randomize(get_peft_model(hub, config(experts=experts, num_stitches=2))).eval()
    model.save_pretrained(tmp_path / "adapter")
    torch.save(logits(model), tmp_path / "logits.pt")
    return tmp_path
