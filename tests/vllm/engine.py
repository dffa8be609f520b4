"""vLLM's engine in this process, on tiny models, and its words compared with those of the adapter's own model."""

import gc
import os
from contextlib import contextmanager


# Before vLLM is imported: no processes but those of tensor parallelism, one thread, a small cache, few words.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
}

import torch
from peft import get_peft_model
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from peft_bts import StitchConfig
from tests.helpers import zoo
from tests.helpers.models import randomize


VOCABULARY = 64
TOLERANCE = 1e-3  # of log probabilities, in float32
EAGER = {"attn_implementation": "eager"}  # PyTorch's own attention leaves out gemma2's soft cap, which vLLM knows

# Heads of sizes 32 and 64, which vLLM's CPU kernels know; widths, depths, numbers of heads and windows all differ.
HUB = {"width": 128, "window": 4}
SHALLOW = {"width": 256, "window": 9, "layers": 3}
DEEP = {"width": 64, "window": 20, "layers": 6, "num_attention_heads": 2}


def tiny_model(arch, width, window=4, **options):
    """A model of the zoo, with windows of this size if it has any.

    The zoo's weights are made for a width of 32: in wider models rounding errors would grow, so they are scaled.
    """
    if getattr(zoo.tiny_config(arch), "sliding_window", None):
        options["sliding_window"] = window
    model = zoo.tiny_model(arch, width=width, **options)
    model.set_attn_implementation(**EAGER)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_((32 / width) ** 0.5)
    return model


def stitched(hub, experts, dtype=torch.float32, **options):
    """A stitched model with random stitches.

    Args:
        hub: The hub.
        experts: The experts by name.
        dtype: Of all models.
        **options: For `StitchConfig`.
    """
    model = get_peft_model(hub.to(dtype), StitchConfig(task_type="CAUSAL_LM", **{"output": "hub"} | options))
    for name, expert in experts.items():
        model.attach_expert(name, expert.to(dtype))
    return randomize(model).eval()


def of_architectures(hub, shallow, deep, **options):
    """A hub of one architecture with two experts of others."""
    experts = {"shallow": tiny_model(shallow, seed=1, **SHALLOW), "deep": tiny_model(deep, seed=2, **DEEP)}
    return stitched(tiny_model(hub, **HUB), experts, **options)


def prompts(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@contextmanager
def engine(folder, **options):
    """vLLM on an exported model, in float32 and uncompiled unless told otherwise."""
    options = {
        "dtype": "float32",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "distributed_executor_backend": "uni",
        "block_size": 32,
        "max_model_len": 96,
        "max_num_seqs": 8,
        "max_logprobs": VOCABULARY,
    } | options
    llm = LLM(str(folder), **options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def counted(llm, name):
    """What vLLM has counted of something in this process. The engine needs `disable_log_stats=False`."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == f"vllm:{name}")


def ask(llm, texts, tokens=8, of_prompts=True):
    """What the engine says: by text, its tokens, and log probabilities (T, V) of them, before them those of the text.

    Args:
        llm: The engine.
        texts: Tokens of the prompts; all are sent at once.
        tokens: How many it is to add.
        of_prompts: Whether it is asked for the log probabilities of the prompts' own tokens too. vLLM does not read
            the prefix cache then.
    """
    params = SamplingParams(
        temperature=0,
        max_tokens=tokens,
        ignore_eos=True,
        detokenize=False,
        logprobs=VOCABULARY,
        prompt_logprobs=VOCABULARY if of_prompts else None,
    )
    answers = []
    for output in llm.generate([{"prompt_token_ids": text} for text in texts], params, use_tqdm=False):
        said = output.outputs[0]
        table = [*(output.prompt_logprobs or [])[1:], *said.logprobs]
        logps_TV = torch.tensor([[row[token].logprob for token in range(VOCABULARY)] for row in table])
        answers.append((list(said.token_ids), logps_TV))
    return answers


@torch.no_grad()
def expected(model, texts, answers):
    """By text, the log probabilities (T, V) that `model` gives where the engine has given some: after its tokens."""
    tables = []
    for text, (tokens, logps_TV) in zip(texts, answers):
        logits_TV = model(input_ids=torch.tensor([text + tokens])).logits[0].float()
        tables.append(logits_TV.log_softmax(-1)[len(text) + len(tokens) - 1 - len(logps_TV) : -1])
    return tables


def differences(model, texts, answers):
    """The largest difference of log probabilities from those of `model`, by text, over the same tokens.

    Tokens alone would hide errors. They are the engine's: where two are as good as equal, either may be said.
    """
    found = []
    for (tokens, logps_TV), expected_TV in zip(answers, expected(model, texts, answers)):
        said = logps_TV[-len(tokens) :].gather(1, torch.tensor(tokens)[:, None])
        assert torch.equal(said[:, 0], logps_TV[-len(tokens) :].max(-1).values)  # greedy, of equals any
        found.append((logps_TV - expected_TV).abs().max().item())
    return found


def assert_same(model, folder, texts=None, tokens=8, tolerance=TOLERANCE, **options):
    """Export the model, serve it, and compare all log probabilities of prompts and answers."""
    model.export(folder)
    texts = texts or prompts(3, 17, 9, 40, 5, 6, 21, 12)
    with engine(folder, **options) as llm:
        answers = ask(llm, texts, tokens)
    found = differences(model, texts, answers)
    assert max(found) < tolerance, found
