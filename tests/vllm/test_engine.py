"""What an engine does with requests, on a stitched model: batches, chunks, caches, preemption, processes, bfloat16."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.vllm.engine import (
    EAGER,
    HUB,
    SHALLOW,
    TOLERANCE,
    ask,
    assert_same,
    counted,
    differences,
    engine,
    expected,
    of_architectures,
    prompts,
    stitched,
    tiny_model,
)


def llamas():
    return of_architectures("llama", "llama", "llama")


def windows():
    """Windows of three sizes, beside layers without. vLLM gives all layers blocks of as many bytes: those of one
    model hold twice as many tokens then, and those of another, with three key-value heads, are filled up."""
    experts = {
        "gemma2": tiny_model("gemma2", seed=1, **SHALLOW),
        "mistral": tiny_model("mistral", seed=2, width=192, window=20, layers=6, num_attention_heads=6),
    }
    return stitched(tiny_model("qwen2_sliding", **HUB), experts)


# With the number of blocks that one request fits in, and eight do not.
LLAMAS, WINDOWS = (llamas, 12), (windows, 56)


@pytest.fixture(scope="module", params=[LLAMAS, WINDOWS], ids=["llamas", "windows"])
def served(request, tmp_path_factory):
    """A model, the folder that it was exported to, and a small number of blocks."""
    make, blocks = request.param
    model = make()
    path = tmp_path_factory.mktemp("exported")
    model.export(path)
    return model, path, blocks


of_llamas = pytest.mark.parametrize("served", [LLAMAS], indirect=True, ids=["llamas"])


MANY = prompts(3, 17, 9, 40, 5, 6, 21, 12)


@pytest.mark.parametrize(
    "options",
    [
        {"num_stitches": 2, "pattern": "experts_into_hub"},
        {"gate": "token"},
        {"r": 4},
        {"gate_bias": False, "num_stitches": 1},
        {"output": "mixture"},
        {"output": "mixture", "num_stitches": 0},
    ],
    ids=str,
)
def test_kinds_of_stitches(options, tmp_path):
    assert_same(of_architectures("llama", "gemma2", "gpt_neox", **options), tmp_path)


def test_projected_streams(tmp_path):
    """They need equal widths."""
    expert = tiny_model("qwen3", width=128, layers=6, num_attention_heads=2, seed=1)
    model = stitched(tiny_model("llama", **HUB), {"code": expert}, expert_streams="projected")
    assert_same(model, tmp_path)


def test_mixture_of_scaled_and_capped_heads(tmp_path):
    """Every model's own head has its say: gemma2's soft cap, cohere's and granite's scales, phi's bias."""
    assert_same(of_architectures("gemma2", "cohere", "granite", output="mixture"), tmp_path / "a")
    assert_same(of_architectures("phi", "granite", "gemma2", output="mixture"), tmp_path / "b")


def test_chunked_prefill(served):
    """Prompts are read in pieces of at most 8 tokens, beside requests that are already answered."""
    model, folder, _ = served
    with engine(folder, enable_chunked_prefill=True, max_num_batched_tokens=8, max_num_seqs=4) as llm:
        answers = ask(llm, MANY)
    assert max(differences(model, MANY, answers)) < TOLERANCE


@pytest.mark.parametrize("enabled", [True, False])
def test_prefix_caching(enabled, served):
    """A prompt that begins like an earlier one is read from the cache of all models."""
    model, folder, _ = served
    (long,) = prompts(70)
    texts = [long, long[:64] + [7, 8], long[:64] + [9]]
    with engine(folder, enable_prefix_caching=enabled, disable_log_stats=False) as llm:
        before = counted(llm, "prefix_cache_hits")
        first = ask(llm, texts[:1], of_prompts=False)
        others = ask(llm, texts[1:], of_prompts=False)
        read = counted(llm, "prefix_cache_hits") - before
    assert (read > 0) is enabled
    assert max(differences(model, texts, first + others)) < TOLERANCE


def test_preemption(served):
    """The cache is too small for all requests: some are stopped, forgotten and begun anew."""
    model, folder, blocks = served
    texts = prompts(*[30] * 8)
    with engine(folder, num_gpu_blocks_override=blocks, disable_log_stats=False) as llm:
        before = counted(llm, "num_preemptions")
        answers = ask(llm, texts, tokens=40, of_prompts=False)
        assert counted(llm, "num_preemptions") > before
    assert max(differences(model, texts, answers)) < TOLERANCE


@of_llamas
def test_compiled(served):
    model, folder, _ = served
    with engine(folder, enforce_eager=False) as llm:
        answers = ask(llm, MANY)
    assert max(differences(model, MANY, answers)) < TOLERANCE


@pytest.mark.parametrize("output", ["hub", "mixture"])
def test_tensor_parallel(output, tmp_path):
    """Two processes, each with half of every model's heads."""
    model = of_architectures("llama", "qwen3", "gemma2", output=output)
    assert_same(model, tmp_path, tensor_parallel_size=2, distributed_executor_backend="mp")


def test_bfloat16(tmp_path):
    """Models in bfloat16, stitches in float32. vLLM rounds at other places than transformers, but no further off.

    Rounding changes much in models of random weights, so the measure is what it does in transformers.
    """
    of_architectures("llama", "qwen3", "gemma2", dtype=torch.bfloat16).export(tmp_path)
    with engine(tmp_path, dtype="bfloat16") as llm:
        loaded = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
        assert {p.dtype for p in loaded.model.stitches.parameters()} == {torch.float32}
        assert {p.dtype for p in loaded.model.layers.parameters()} == {torch.bfloat16}
        answers = ask(llm, MANY)
    served = torch.cat([logps_TV for _, logps_TV in answers])
    exact, rounded = (
        torch.cat(expected(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, **EAGER), MANY, answers))
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert rms(served - exact) < 1.2 * rms(rounded - exact)
    assert rms(served - rounded) < 0.2 < 1 < exact.std()


def rms(values):
    return values.pow(2).mean().sqrt()


@of_llamas
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}, "pipeline_parallel_size=2"),
        ({"quantization": "fp8", "dtype": "bfloat16"}, "cannot be served quantised"),
        ({"enable_lora": True}, "LoRA adapters"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative decoding"),
    ],
    ids=["pipeline", "quantised", "lora", "speculative"],
)
def test_refused_ways_of_serving(options, message, served):
    with pytest.raises(ValueError, match=message), engine(served[1], **options):
        pass
