"""Tiny random models of every supported architecture.

    model = tiny_model("qwen3", layers=6, width=48, seed=1)

The models are small enough to test hundreds of them, and hard to fool: all weights are random and large (no norm
is 1, no bias is 0), so that each layer shows in the logits; windows are 4 tokens long, so that a sequence of 12
leaves them; and layer kinds are mixed wherever an architecture mixes them.
"""

from itertools import cycle, islice

import torch
from transformers import AutoConfig, AutoModelForCausalLM


HEADS = 4
WINDOW = 4


def repeat(*kinds):
    """A value per layer: `kinds`, over and over, to the model's depth."""
    return lambda layers, width: list(islice(cycle(kinds), layers))


SLIDING = {"layer_types": repeat("sliding_attention", "full_attention"), "sliding_window": WINDOW}
MOE = {"experts_implementation": "batched_mm"}  # the default, grouped_mm, has no float64 kernel on CPU

# What an architecture needs beyond `_common`; a callable is called with (layers, width).
SPECIAL = {
    "llama": {},
    "qwen2": {},
    "qwen2_sliding": {"model_type": "qwen2", "use_sliding_window": True, **SLIDING},
    "qwen3": {},
    "mistral": {"sliding_window": WINDOW},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 8, **SLIDING},
    "gemma3_text": {"query_pre_attn_scalar": 8, **SLIDING},
    "phi": {},
    "phi3": {},
    "olmo2": {},
    "olmo3": SLIDING,
    "smollm3": {"no_rope_layers": repeat(1, 0)},
    "cohere": {"logit_scale": 1.0, "use_qk_norm": True},
    "cohere2": {"logit_scale": 1.0, **SLIDING},
    "granite": {
        "embedding_multiplier": 2.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.7,
        "logits_scaling": 1.5,
    },
    "stablelm": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    "starcoder2": {},
    "nemotron": {},
    "gpt_oss": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
        },
        **SLIDING,
        **MOE,
    },
    "mixtral": MOE,
    "qwen3_moe": MOE,
    "deepseek_v3": {
        **MOE,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": HEADS,
        "kv_lora_rank": 8,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "head_dim": 8,
    },
    "gpt2": {},
    "gpt_neox": {},
    "gpt_bigcode": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": lambda layers, width: width, "init_std": 0.2},
    "gpt_neo": {
        "attention_types": lambda layers, width: [[repeat("global", "local")(layers, width), 1]],
        "window_size": WINDOW,
    },
    "gptj": {"rotary_dim": 4},
    "bloom": {},
    "falcon": {"ffn_hidden_size": 64},
    "mpt": {"max_seq_len": 128},
    "codegen": {"rotary_dim": 4},
    "qwen3_next": {
        "layer_types": repeat("linear_attention", "full_attention"),
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "shared_expert_intermediate_size": 32,
        **MOE,
    },
    "lfm2": {"layer_types": repeat("conv", "full_attention"), "block_auto_adjust_ff_dim": False},
    "bamba": {
        "attn_layer_indices": lambda layers, width: list(range(1, layers, 2)),
        "mamba_n_heads": 4,
        "mamba_d_state": 8,
        "mamba_chunk_size": 4,
    },
    "mamba": {"state_size": 8},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": WINDOW},
}

UNSUPPORTED = ["mamba", "recurrent_gemma"]  # the state lives inside the layers; both can be built, for error tests
ARCHITECTURES = [arch for arch in SPECIAL if arch not in UNSUPPORTED]

# Their attention masks with float64's minimum but takes its softmax in float32, where that is -inf: a query that sees
# padding only (left padding; with gemma2's windows right padding too) turns into NaN, and spreads.
NO_FLOAT64_PADDING = ["gemma2", "bloom", "mpt"]


def _common(layers, width, vocab, heads):
    """Settings, by their usual names, for every architecture that has them."""
    return {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": width // heads,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "num_experts": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,  # a random model would end a generation anywhere
    }


def tiny_config(arch, *, layers=4, width=32, vocab=64, **overrides):
    """A config of `layers` decoder layers; `width` must be a multiple of 16. All dropouts are 0 unless overridden."""
    special = {k: v(layers, width) if callable(v) else v for k, v in SPECIAL[arch].items()}
    model_type = special.pop("model_type", arch)
    default = AutoConfig.for_model(model_type)
    fields, aliases = default.to_dict(), default.attribute_map or {}  # gpt2 says n_embd for hidden_size

    common = _common(layers, width, vocab, overrides.get("num_attention_heads", HEADS))
    common = {aliases.get(k, k): v for k, v in common.items()}
    dropouts = {k: 0.0 for k, v in fields.items() if "drop" in k and isinstance(v, float)}
    overrides = {aliases.get(k, k): v for k, v in overrides.items()}
    known = {k: v for k, v in common.items() if k in fields}
    return AutoConfig.for_model(model_type, **known | dropouts | special | overrides)


def tiny_model(arch, *, layers=4, width=32, vocab=64, seed=0, dtype=torch.float32, **overrides):
    """A causal LM in eval mode; equal arguments give equal weights, whatever the dtype."""
    config = tiny_config(arch, layers=layers, width=width, vocab=vocab, **overrides)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        # Noise on everything, so that nothing is left at 0 or 1: norms, biases, but also routing buffers.
        for tensor in {t.data_ptr(): t for t in model.state_dict().values() if t.is_floating_point()}.values():
            tensor.add_(torch.randn_like(tensor), alpha=0.2)
    return model.to(dtype).eval()
