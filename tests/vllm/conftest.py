"""Tests with the real engine, by `make test-vllm`. Without vLLM, nothing here is collected."""

import importlib.util


collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]
