"""`plan` says beforehand, without weights, what is measured here on real stitched models."""

import dataclasses
import gc
import json
import re

import pytest
import torch
import transformers
from packaging import version
from peft import LoraConfig, get_peft_model
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from peft_bts import StitchConfig, plan
from peft_bts._compat.bitsandbytes import quantization_states
from tests.helpers.models import IDS, RIGHT, cache_layers, fresh, stitch
from tests.helpers.zoo import ARCHITECTURES, UNSUPPORTED, tiny_config


BATCH, LENGTH = IDS.shape
SIZES = {"layers": 6, "width": 48}  # of experts: neither as deep nor as wide as the hub
SOME = ["gemma2", "gpt2", "deepseek_v3", "mixtral", "qwen3_next", "bamba", "opt"]


def config(**options):
    return StitchConfig(task_type="CAUSAL_LM", **{"output": "hub"} | options)


def cache_bytes(model, *inputs):
    """Bytes of every tensor in the cache after forwards over `inputs`."""
    cache = None
    with torch.no_grad():
        for ids in inputs:
            cache = model(input_ids=ids, past_key_values=cache, use_cache=True).past_key_values
    states = []
    for layer in cache_layers(cache):
        for kind in ("keys", "values", "conv_states", "recurrent_states"):
            held = getattr(layer, kind, None)
            states += list(held.values()) if isinstance(held, dict) else [held]
    memory = getattr(cache.layers[-1], "memory", None)  # of output gates with evidence
    states += [] if memory is None else [value for value in vars(memory).values() if isinstance(value, torch.Tensor)]
    return sum(state.numel() * state.element_size() for state in states if state is not None)


def flops(model, **inputs):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    return counter.get_total_flops()


def activation_bytes(model):
    """Memory that the graph behind a training loss holds, besides weights and inputs, by walking over the graph.

    The batch is padded: without padding, attention needs no mask, and grouped keys are not repeated.
    """
    loss = model.train()(input_ids=IDS, labels=IDS, attention_mask=RIGHT, use_cache=False).loss
    model.eval()
    storages, seen, nodes = {}, set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        for name in dir(node):
            if name.startswith("_saved_"):
                saved = getattr(node, name)
                for tensor in saved if isinstance(saved, (tuple, list)) else [saved]:
                    if isinstance(tensor, torch.Tensor):
                        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), IDS, RIGHT)}
    return sum(size for pointer, size in storages.items() if pointer not in known)


class Made(TorchDispatchMode):
    """Notes the memory of every tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out


def checkpointed_bytes(model):
    """Memory that is still held behind a training loss under gradient checkpointing, besides weights and inputs."""
    model.train().get_base_model().gradient_checkpointing_enable()
    with Made() as made:
        loss = model(input_ids=IDS, labels=IDS, attention_mask=RIGHT, use_cache=False).loss
    gc.collect()
    model.eval().get_base_model().gradient_checkpointing_disable()
    known = (*model.parameters(), *model.buffers(), IDS, RIGHT, loss)
    for tensor in known:
        made.storages.pop(tensor.untyped_storage()._cdata, None)
    return sum(size for storage, size in made.storages.values() if not storage.expired())


def weight_bytes(model):
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def check(estimate, model, tmp_path):
    """Every figure of an estimate in float32, against real measurements: equal; activations to within 3%."""
    memory = estimate.memory["float32"]
    assert estimate.together.parameters == sum(p.numel() for p in model.parameters())
    assert estimate.together.trained == model.get_nb_trainable_parameters()[0] > 0
    assert memory.weights == weight_bytes(model)
    model.save_pretrained(tmp_path / "adapter")
    assert estimate.adapter_bytes == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size

    loss = model.train()(input_ids=IDS, labels=IDS).loss
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    loss.backward()
    optimizer.step()
    model.eval()
    grads = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    states = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.dim() > 0)
    trained_last = sum(p.nbytes for p in model.parameters() if p.requires_grad and p.grad is None)
    assert memory.gradients == grads + trained_last  # stitches before which no expert has anything to say get none
    assert states == 2 * grads and memory.optimizer == 2 * memory.gradients

    assert memory.cache == cache_bytes(model, IDS)
    assert memory.cache_per_token * BATCH == cache_bytes(model, IDS, IDS[:, :1]) - memory.cache
    # A walk over the graph has the heads of a mixture run again, whose activations are not kept.
    recomputed = model.peft_config["default"].output == "mixture" and model.peft_config["default"].num_stitches != 0
    if memory.activations is not None and not recomputed:
        assert memory.activations == pytest.approx(activation_bytes(model), rel=0.03)
    # Torch's counter knows the products of eager attention, but not the fused kernel for CPUs.
    for module in model.modules():
        if hasattr(module, "set_attn_implementation"):
            module.set_attn_implementation("eager")
    total = flops(model, input_ids=IDS, use_cache=False)
    assert estimate.together.flops * IDS.numel() == pytest.approx(total, rel=1e-12)
    with model.disable_adapter():
        assert estimate.hub.flops * IDS.numel() == flops(model, input_ids=IDS, use_cache=False)


def compare(hub, expert, tmp_path):
    estimate = plan(
        tiny_config(hub),
        {"a": tiny_config(expert, **SIZES)},
        config(num_stitches=2),
        batch_size=BATCH,
        sequence_length=LENGTH,
        dtypes=["float32"],
    )
    check(estimate, stitch(fresh(hub), {"a": fresh(expert, **SIZES)}, num_stitches=2), tmp_path)
    return estimate


@pytest.mark.parametrize("arch", SOME)
def test_experts(arch, tmp_path):
    """Experts of all kinds of attention and state, deeper and wider than the hub."""
    memory = compare("llama", arch, tmp_path).memory["float32"]
    assert (memory.recurrent > 0) == (arch in ("qwen3_next", "bamba"))
    assert (memory.activations is None) == (arch in ("mixtral", "deepseek_v3", "qwen3_next"))


@pytest.mark.parametrize("arch", SOME)
def test_hubs(arch, tmp_path):
    if arch == "opt" and version.parse(transformers.__version__) < version.parse("5.23"):
        pytest.skip("opt's code of transformers 5.18 depends on numbers, so such a hub cannot be counted")
    compare(arch, "llama", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture(arch, tmp_path):
    compare("llama", arch, tmp_path)
    compare(arch, "llama", tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "gate": "token", "gate_bias": False},
        {"pattern": "experts_into_hub", "layers_to_stitch": [1, 3]},
        {"expert_streams": "projected"},
        {"modules_to_save": ["lm_head"]},
        {"output": "mixture"},
        {"output": "mixture", "num_stitches": 0},
        {"output": "mixture", "evidence": 0.8},
    ],
    ids=str,
)
def test_options(options, tmp_path):
    """Every option that changes what is trained and saved, with two experts."""
    experts = {"code": 1, "a": 2}
    estimate = plan(
        tiny_config("llama"),
        dict.fromkeys(experts, tiny_config("llama")),
        config(**options),
        batch_size=BATCH,
        sequence_length=LENGTH,
        dtypes=["float32"],
    )
    model = stitch(fresh("llama"), {name: fresh("llama", seed=seed) for name, seed in experts.items()}, **options)
    check(estimate, model, tmp_path)
    assert estimate.hub.trained == (64 * 32 if "modules_to_save" in options else 0)
    head = 2 * 64 * 32 if "output" in options else 0  # an expert's head runs only where outputs are mixed
    assert estimate.experts["code"].flops == estimate.hub.flops - 2 * 64 * 32 + head


def test_lora_and_half_precision(tmp_path):
    """A LoRA of the hub shares the hub's weights; models in bfloat16 keep their stitches, and LoRAs, in float32."""
    fresh("gemma2").save_pretrained(tmp_path / "hub")
    fresh("gpt2", **SIZES).save_pretrained(tmp_path / "expert")
    lora = get_peft_model(fresh("gemma2"), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    experts = {"full": str(tmp_path / "expert"), "lora": str(tmp_path / "lora")}
    size = {"batch_size": BATCH, "sequence_length": LENGTH}
    estimate = plan(str(tmp_path / "hub"), experts, config(), **size)
    assert estimate.experts["lora"].parameters == lora.get_nb_trainable_parameters()[0]
    assert estimate.experts["lora"].flops > estimate.experts["full"].flops / 10
    for dtype, memory in estimate.memory.items():
        hub = AutoModelForCausalLM.from_pretrained(tmp_path / "hub", dtype=dtype)
        model = get_peft_model(hub, config(experts=experts)).eval()
        assert memory.weights == weight_bytes(model), dtype
        assert memory.cache == cache_bytes(model, IDS), dtype
        assert memory.activations == pytest.approx(activation_bytes(model), rel=0.03), dtype
    check(estimate, model, tmp_path)
    assert plan(str(tmp_path / "hub"), None, config(experts=experts), **size).to_dict() == estimate.to_dict()


@pytest.mark.parametrize("arch, together", [("llama", True), ("gemma2", True), ("bloom", False)])
def test_weights_read_in_a_decoding_step(arch, together, tmp_path):
    """Those of the hub once for all LoRA experts that run with it as one batch; once more for any that does not."""
    fresh(arch).save_pretrained(tmp_path / "hub")
    lora = get_peft_model(fresh(arch), LoraConfig(task_type="CAUSAL_LM", r=3, target_modules="all-linear"))
    lora.save_pretrained(tmp_path / "lora")
    experts = {"a": str(tmp_path / "lora"), "b": str(tmp_path / "lora")}
    estimate = plan(str(tmp_path / "hub"), {**experts, "full": fresh("gpt2")}, config(), sequence_length=8)

    def numbers(module):
        return sum(p.numel() for p in module.parameters())

    hub, full = fresh(arch), fresh("gpt2").transformer
    embeddings = sum(numbers(m) for m in hub.modules() if isinstance(m, torch.nn.Embedding))
    head = numbers(hub.get_output_embeddings())
    body = numbers(hub.base_model) - embeddings
    per_model = {
        "hub": body + head,
        "full": numbers(full) - numbers(full.wte) - numbers(full.wpe),
        **dict.fromkeys("ab", lora.get_nb_trainable_parameters()[0] + (0 if together else body)),
    }
    for dtype, size in (("bfloat16", 2), ("float32", 4)):
        loras = 2 * lora.get_nb_trainable_parameters()[0] * (4 - size)  # stay in float32, as the stitches do
        expected = sum(per_model.values()) * size + loras + 4 * estimate.stitches.parameters
        assert estimate.memory[dtype].weights_read == expected
    assert "read per decoding step" in str(estimate)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_(en|dis)able.*:FutureWarning")
@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("llama", {}),
        ("gpt2", {"pattern": "experts_into_hub"}),
        pytest.param("gpt2", {"modules_to_save": ["lm_head"]}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_gradient_checkpointing(arch, options):
    """What a training step keeps then: less, and what is still in memory behind a real one."""
    size = {"batch_size": BATCH, "sequence_length": LENGTH, "dtypes": ["float32"]}
    models = tiny_config(arch), {"a": tiny_config("llama", **SIZES)}
    plain, less = (
        plan(*models, config(num_stitches=2, **options), gradient_checkpointing=on, **size) for on in (False, True)
    )
    model = stitch(fresh(arch), {"a": fresh("llama", **SIZES)}, num_stitches=2, **options)
    memory = less.memory["float32"]
    assert memory.activations == pytest.approx(checkpointed_bytes(model), rel=0.03)
    assert memory.activations < 0.8 * plain.memory["float32"].activations
    assert dataclasses.replace(memory, activations=plain.memory["float32"].activations) == plain.memory["float32"]
    assert less.gradient_checkpointing and "activations kept" in str(less) and "activations kept" not in str(plain)


def stored_bytes(model):
    """The bytes of a loaded model's weights, and of what bitsandbytes keeps beside them."""
    beside = [state for module in model.modules() for state in quantization_states(module)]
    scales = [getattr(state, name, None) for state in beside for name in ("absmax", "code", "SCB")]
    scales += [getattr(parameter, "SCB", None) for parameter in model.parameters()]
    tensors = [*model.parameters(), *model.buffers(), *(scale for scale in scales if scale is not None)]
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantization(tmp_path, bits):
    """The weights of hub and full experts against bitsandbytes itself; LoRAs stay, and the rest is as it was."""
    pytest.importorskip("bitsandbytes")
    for name, arch in (("hub", "llama"), ("code", "gpt2")):
        fresh(arch, width=64).save_pretrained(tmp_path / name)
    hub = AutoModelForCausalLM.from_pretrained(tmp_path / "hub")
    get_peft_model(hub, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(
        tmp_path / "lora"
    )
    experts = {name: str(tmp_path / name) for name in ("code", "lora")}
    size = {"batch_size": BATCH, "sequence_length": LENGTH, "dtypes": [torch.float32]}
    plain = plan(str(tmp_path / "hub"), experts, config(), **size)
    estimate = plan(str(tmp_path / "hub"), experts, config(), quantization=bits, **size)
    smaller = plain.memory["float32"].weights - estimate.memory["float32"].weights
    expected = 0
    for name in ("hub", "code"):
        how = BitsAndBytesConfig(load_in_4bit=bits == "4bit", load_in_8bit=bits == "8bit")
        models = [
            AutoModelForCausalLM.from_pretrained(tmp_path / name, quantization_config=quantization)
            for quantization in (None, how)
        ]
        expected += stored_bytes(models[0]) - stored_bytes(models[1])
    assert smaller == pytest.approx(expected, rel=0.01) and expected > 0
    same = [dataclasses.replace(e.memory["float32"], weights=0, weights_read=None) for e in (plain, estimate)]
    assert same[0] == same[1] and estimate.together == plain.together
    assert f"weights in {bits}" in str(estimate)
    with pytest.raises(ValueError, match="quantization must be one of 4bit, 8bit"):
        plan(str(tmp_path / "hub"), experts, config(), quantization="2bit")


def test_loaded_models():
    """Loaded models are counted as their configs are, and left alone."""
    hub, expert = fresh("llama").train(), fresh("gpt2", **SIZES)
    lora = get_peft_model(fresh("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    by_config = plan(hub.config, {"a": expert.config}, sequence_length=8)
    assert plan(hub, {"a": expert}, sequence_length=8) == by_config
    assert plan(stitch(fresh("llama"), {"b": expert}), {"a": expert}, sequence_length=8) == by_config
    assert hub.training and all(p.requires_grad for p in hub.parameters())
    own = plan(hub, {"a": lora}, sequence_length=8, dtypes=["float32"]).experts["a"]
    assert own.parameters == sum(p.numel() for p in lora.parameters())  # a model of its own, LoRA included


def test_windows_end_the_growth():
    """Beyond its window, a sliding layer's cache does not grow; full layers' and other models' caches do."""
    grown = {}
    for length in (2, 40):
        memory = plan(tiny_config("llama"), {"a": tiny_config("mistral")}, sequence_length=length).memory["bfloat16"]
        grown[length] = memory.cache_per_token
    assert grown[40] == grown[2] / 2 > 0


@pytest.mark.slow
def test_the_papers_size():
    """Four models of 20 layers and 3072 channels: 26 x 3072^2 weights in four stitches (it says 264M)."""
    seed = LlamaConfig(
        num_hidden_layers=20,
        hidden_size=3072,
        intermediate_size=12288,
        num_attention_heads=24,
        num_key_value_heads=1,
        vocab_size=128_000,
    )
    estimate = plan(
        seed,
        {"code": seed, "math": seed, "lang": seed},
        config(gate_bias=False),
        sequence_length=4,
        dtypes=["bfloat16"],
    )
    assert estimate.stitches.parameters == estimate.together.trained == 245_366_784
    assert 4 * 245_366_784 < estimate.adapter_bytes < 4 * 245_366_784 + 10_000
    assert estimate.memory["bfloat16"].cache_per_token == 4 * 20 * 2 * 128 * 2  # models, layers, k and v, width, bytes


@pytest.mark.parametrize(
    ("experts", "options", "match"),
    [
        ({"a": "llama"}, {"num_stitches": 5}, r"num_stitches=5.*4 layers.*at most 4"),
        ({"a": "llama"}, {"layers_to_stitch": [1, 4]}, r"layers_to_stitch=\[1, 4\].*last layer, 3"),
        ({"a": "wide"}, {"expert_streams": "projected"}, r"'a' has width 48, the hub 32.*intact"),
        ({"a": "short"}, {}, r"'a' has 48 token embeddings, the hub 64"),
        ({"a": UNSUPPORTED[0]}, {}, r"'a' \(mamba\) keeps its state"),
        ({"a.b": "llama"}, {}, r"'a\.b'.*letters, digits and '_'"),
    ],
    ids=str,
)
def test_refuses_what_stitching_refuses(experts, options, match):
    """The very errors of `get_peft_model` and `attach_expert`."""
    special = {"wide": ("llama", {"width": 48}), "short": ("llama", {"vocab": 48})}
    (name, kind), *_ = experts.items()
    arch, sizes = special.get(kind, (kind, {}))
    with pytest.raises(ValueError, match=match) as planned:
        plan(tiny_config("llama"), {name: tiny_config(arch, **sizes)}, config(**options))
    with pytest.raises(ValueError) as stitched:
        get_peft_model(fresh("llama"), config(**options)).attach_expert(name, fresh(arch, **sizes))
    assert str(planned.value) == str(stitched.value)


def test_bad_arguments(tmp_path):
    llama = tiny_config("llama")
    with pytest.raises(ValueError, match=r"No expert is given.*Name at least one"):
        plan(llama, {})
    with pytest.raises(ValueError, match=r"sequence_length must be a whole number of at least 1, got 0"):
        plan(llama, {"a": llama}, sequence_length=0)
    with pytest.raises(ValueError, match=r"'a' could not be loaded from '.*nothing'"):
        plan(llama, {"a": str(tmp_path / "nothing")})
    with pytest.raises(ValueError, match=r"The hub's config could not be read from '.*nothing'"):
        plan(str(tmp_path / "nothing"), {"a": llama})
    with pytest.raises(ValueError, match=r"STITCH adapters cannot be experts"):
        plan(llama, {"a": stitch(fresh("llama"), {"b": fresh("llama", seed=1)})})


def test_the_estimate_reads():
    """Tables for people, plain values for programs."""
    estimate = plan(tiny_config("llama"), {"code": tiny_config("gpt2")}, sequence_length=8)
    text = str(estimate)
    for match in (
        rf"hub +{estimate.hub.parameters:,} +0 .* 1\.00",
        rf"expert 'code' +{estimate.experts['code'].parameters:,} ",
        rf"stitches +{estimate.stitches.parameters:,} +{estimate.stitches.trained:,} ",
        r"models in bfloat16 +models in float32",
        r"training: all but the cache",
    ):
        assert re.search(match, text), (match, text)
    values = json.loads(json.dumps(estimate.to_dict()))
    assert values["together"]["parameters"] == estimate.together.parameters
    assert values["memory"]["float32"]["training"] == estimate.memory["float32"].training
