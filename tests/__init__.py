"""The tests, and what holds in every process that imports any of them: no network, one thread."""

import os
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers reads it: no test may need, or wait for, the network
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch


pytest.register_assert_rewrite("tests.helpers")  # so that a failed assertion in there shows its values
torch.set_num_threads(1)  # xdist runs a worker per core; more threads would only fight

ROOT = Path(__file__).resolve().parent.parent
