"""What a stitched model will cost, before any weight is downloaded.

The stitched model itself is made, of fake tensors (blueprint.py), and run: a forward for its operations, one for its
cache, one for what training keeps. So everything is counted on the code that will run, whatever the architecture.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Optional, Union

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import Cache

from .._compat.peft import CausalLM, base_model
from .._compat.transformers import checkpoint_activations, is_mixture
from ..config import StitchConfig
from ..experts.blueprint import ModelLike, expert_blueprint, hub_blueprint, no_weights
from ..formatting import as_text, human, table
from ..forward.cache import held_expert_caches
from ..forward.decoder import find_decoder
from ..keys import is_stitch_weight
from .quantized import QUANTIZATIONS, Quantization, saved_bytes


@dataclass(frozen=True)
class Part:
    """The share of one part: the hub, an expert, or the stitches.

    Attributes:
        parameters: Numbers in its weights; those that a LoRA shares with the hub count for the hub.
        trained: How many of them are trained.
        flops: Per token of a forward over `sequence_length` tokens: 2 for each multiplication with an addition, in
            matrix products, convolutions and attention (over all pairs of tokens, as without a causal shortcut).
    """

    parameters: int
    trained: int
    flops: float


@dataclass(frozen=True)
class Memory:
    """Bytes, with hub and experts in one dtype.

    Attributes:
        weights: Of all models and the stitches (those are float32 beside models in half precision).
        weights_read: Of these, what one decoding step reads, whatever the number of sequences: all but embeddings and,
            with `output="hub"`, the experts' heads. Weights that a LoRA expert shares with the hub count once if it
            runs with the hub as one batch (`StitchModel.describe_execution`), else once more. `None` for mixtures of
            experts, where it depends on the tokens, and for quantised weights, which are not counted here.
        cache: What a `DynamicCache` holds of `batch_size` sequences of `sequence_length` tokens, for all models.
        cache_per_token: By how much that grows with every further token of one sequence.
        recurrent: The part of `cache` that never grows: states of convolutions and linear attention.
        gradients: Gradients of the stitches' weights.
        optimizer: AdamW's two states for those weights.
        activations: What the forward of a training step over `batch_size` sequences of `sequence_length` tokens keeps
            for the backward pass, to within 3%, in padded batches (others keep a little less). With gradient
            checkpointing, the backward pass takes those of one layer more, one after the other. `None` for mixtures
            of experts: it depends on kernels that do not run without numbers.
    """

    weights: int
    weights_read: Optional[int]
    cache: int
    cache_per_token: int
    recurrent: int
    gradients: int
    optimizer: int
    activations: Optional[int]

    @property
    def inference(self) -> int:
        """Weights and cache."""
        return self.weights + self.cache

    @property
    def training(self) -> int:
        """Weights, gradients, optimizer states, and activations where they are known."""
        return self.weights + self.gradients + self.optimizer + (self.activations or 0)


@dataclass(frozen=True)
class Estimate:
    """The result of `plan`. `str(estimate)` is for people, `to_dict()` for programs.

    Attributes:
        hub, experts, stitches: What each part adds; experts by name.
        memory: By dtype of hub and experts, such as `"bfloat16"`.
        adapter_bytes: Size of adapter_model.safetensors.
        batch_size, sequence_length: What cache, activations and operations are counted for.
        quantization: In how many bits the weights of hub and experts are counted, if not in those of the dtype.
        gradient_checkpointing: Whether activations are counted with it.
    """

    hub: Part
    experts: dict[str, Part]
    stitches: Part
    memory: dict[str, Memory]
    adapter_bytes: int
    batch_size: int
    sequence_length: int
    quantization: Optional[Quantization] = None
    gradient_checkpointing: bool = False

    @property
    def together(self) -> Part:
        """The sums over all parts."""
        parts = [self.hub, *self.experts.values(), self.stitches]
        return Part(*(sum(getattr(part, f.name) for part in parts) for f in dataclasses.fields(Part)))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, with the sums, ready for JSON."""
        values = dataclasses.asdict(self)
        for dtype, memory in self.memory.items():
            values["memory"][dtype] |= {"inference": memory.inference, "training": memory.training}
        return {**values, "together": dataclasses.asdict(self.together)}

    def tables(self) -> list[Any]:
        """Return what rich prints: what each part is, what memory it takes, and what was not counted."""
        experts = {f"expert {name!r}": part for name, part in self.experts.items()}
        parts = {"hub": self.hub, **experts, "stitches": self.stitches, "together": self.together}
        rows = [
            (name, part.parameters, part.trained, human(part.flops), f"{part.flops / self.hub.flops:.2f}")
            for name, part in parts.items()
        ]
        labels = {**_LABELS, **({"activations": "activations kept"} if self.gradient_checkpointing else {})}
        memory = [
            (label, *("-" if (n := getattr(m, name)) is None else human(n, "B") for m in self.memory.values()))
            for name, label in labels.items()
        ]
        bits = "" if self.quantization is None else f", models' weights in {self.quantization}"
        size = f"{self.batch_size} x {self.sequence_length:,} tokens"
        again = "the one layer that is computed again at a time, " if self.gradient_checkpointing else ""
        return [
            table("Parts", ["", "parameters", "trained", "FLOPs per token", "hub = 1"], rows),
            table(f"Memory for {size}{bits}", ["", *(f"models in {dtype}" for dtype in self.memory)], memory),
            f"The adapter's file: {human(self.adapter_bytes, 'B')}. FLOPs are of a forward over {size}. Not counted: "
            f"{again}the operations' temporary buffers, and what the libraries take for themselves.",
        ]

    def __str__(self) -> str:
        return as_text(*self.tables())


_LABELS = {
    "weights": "weights",
    "weights_read": "  read per decoding step",
    "cache": "cache",
    "cache_per_token": "  further per token",
    "recurrent": "  thereof constant",
    "inference": "inference: weights, cache",
    "gradients": "gradients of the stitches",
    "optimizer": "AdamW states",
    "activations": "activations",
    "training": "training: all but the cache",
}


def plan(
    hub: ModelLike,
    experts: Optional[Mapping[str, ModelLike]] = None,
    config: Optional[StitchConfig] = None,
    *,
    batch_size: int = 1,
    sequence_length: int = 2048,
    dtypes: Iterable[Union[str, torch.dtype]] = (torch.bfloat16, torch.float32),
    quantization: Optional[Quantization] = None,
    gradient_checkpointing: bool = False,
) -> Estimate:
    """Count what stitching these models will take: weights, memory, operations, and the adapter's file.

    Only config and tokenizer files are read, never weights, so little memory is needed.

    Args:
        hub: A model, an id, a path, a reference dict, or a config.
        experts: The experts by name; each is given like `hub`, or as the id or path of a LoRA of the hub. `None` for
            `config.experts`.
        config: Options of the stitches; `None` for the defaults.
        batch_size, sequence_length: What cache, activations and operations are counted for.
        dtypes: The dtypes of hub and experts to count for.
        quantization: Count the weights of hub and experts as bitsandbytes keeps them, `"4bit"` or `"8bit"`; all but
            embeddings, heads, norms and LoRAs, which stay in their dtype.
        gradient_checkpointing: Count what a training step keeps with it: layers keep their inputs alone, and compute
            the rest again in the backward pass.

    Raises:
        ValueError: For all that `get_peft_model` and `attach_expert` would refuse, with their messages.
    """
    config = StitchConfig(task_type="CAUSAL_LM") if config is None else config
    references = dict(config.experts if experts is None else experts)
    if not references:
        raise ValueError("No expert is given, so there is nothing to stitch. Name at least one in `experts`.")
    for option, value in (("batch_size", batch_size), ("sequence_length", sequence_length)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{option} must be a whole number of at least 1, got {value!r}.")
    if quantization not in (None, *QUANTIZATIONS):
        raise ValueError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, or None, got {quantization!r}.")
    of_models = [getattr(torch, dtype) if isinstance(dtype, str) else dtype for dtype in dtypes]
    memory: dict[str, Memory] = {}
    try:
        with no_weights():
            tokens = torch.zeros(batch_size, sequence_length, dtype=torch.long)
            for dtype in of_models:
                model, blueprints, smaller = _stitched(hub, references, config, dtype, quantization)
                of_dtype = _memory(model, tokens, gradient_checkpointing)
                if quantization is not None:
                    of_dtype = dataclasses.replace(of_dtype, weights=of_dtype.weights - smaller, weights_read=None)
                memory[str(dtype).removeprefix("torch.")] = of_dtype
            # The same for every dtype of the models, as is the file.
            parts = _parts(model, blueprints, tokens, heads=config.output == "mixture")
            size = _file_size(model)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(
            f"These models cannot be counted without their weights: what they compute depends on numbers ({error})."
        ) from error
    return Estimate(*parts, memory, size, batch_size, sequence_length, quantization, gradient_checkpointing)


def _stitched(
    hub: ModelLike,
    experts: Mapping[str, ModelLike],
    config: StitchConfig,
    dtype: torch.dtype,
    quantization: Optional[Quantization],
) -> tuple[PeftModel, dict[str, CausalLM], int]:
    """The stitched model, without weights, the experts in it by name, and the bytes that quantisation saves."""
    seed = hub_blueprint(hub, dtype)
    blueprints = {name: expert_blueprint(name, expert, seed, dtype) for name, expert in sorted(experts.items())}
    # Before there are stitches, which stay as they are.
    smaller = 0 if quantization is None else saved_bytes([seed, *blueprints.values()], quantization)
    model = get_peft_model(seed, dataclasses.replace(config, experts={}))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Expert .* came from no id or path")  # blueprints are not for saving
        for name, expert in blueprints.items():
            model.attach_expert(name, expert)
    return model.eval(), blueprints, smaller


def _parts(
    model: PeftModel, experts: Mapping[str, CausalLM], tokens: Tensor, heads: bool
) -> tuple[Part, dict[str, Part], Part]:
    """Hub, experts (with their heads, or without) and stitches, which get what is left of the whole."""
    counted: set[int] = set()

    def new(weights: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        fresh = [weight for weight in weights if id(weight) not in counted]
        counted.update(map(id, fresh))
        return fresh

    def part(weights: list[nn.Parameter], flops: int) -> Part:
        trained = sum(weight.numel() for weight in weights if weight.requires_grad)
        return Part(sum(weight.numel() for weight in weights), trained, flops / tokens.numel())

    stitch_weights = new(weight for name, weight in model.named_parameters() if is_stitch_weight(name))
    hub_weights = new(model.get_base_model().parameters())
    with model.disable_adapter():
        hub_flops = _flops(model, tokens)
    found, others = {}, hub_flops
    for name, expert in experts.items():
        flops = _flops(expert if heads else find_decoder(expert, name).backbone, tokens)
        found[name], others = part(new(expert.parameters()), flops), others + flops
    return part(hub_weights, hub_flops), found, part(stitch_weights, _flops(model, tokens) - others)


# Torch has the formula, but not under the name of its attention kernel for CPUs.
_ATTENTION_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
}


@torch.no_grad()
def _flops(model: nn.Module, tokens: Tensor) -> int:
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION_ON_CPU) as counter:
        model(input_ids=tokens, use_cache=False)
    return counter.get_total_flops()


def _memory(model: PeftModel, tokens: Tensor, checkpointing: bool) -> Memory:
    weights = list({id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values())
    trained = sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
    with torch.no_grad():
        cache = model(input_ids=tokens, use_cache=True).past_key_values
        held, recurrent = _cache_bytes(cache)
        model(input_ids=tokens[:, :1], past_key_values=cache)
        grown = _cache_bytes(cache)[0]
    return Memory(
        weights=sum(tensor.nbytes for tensor in weights),
        weights_read=_weights_read(model),
        cache=held,
        cache_per_token=(grown - held) // len(tokens),
        recurrent=recurrent,
        gradients=trained,
        optimizer=2 * trained,  # AdamW: running means of the gradient and of its square
        activations=_activations(model, tokens, weights, checkpointing),
    )


def _weights_read(model: PeftModel) -> Optional[int]:
    """Bytes of weights that a forward over one token reads."""
    if any(map(is_mixture, model.modules())):
        return None
    tuner: Any = model.base_model
    hub = model.get_base_model()
    looked_up = {id(m.weight) for m in tuner.modules() if isinstance(m, nn.Embedding)}

    def multiplied(module: nn.Module) -> dict[int, int]:
        return {id(p): p.nbytes for p in module.parameters() if id(p) not in looked_up}

    def head(model: Any) -> int:
        return sum(weight.nbytes for weight in model.get_output_embeddings().parameters())

    weights = multiplied(hub)  # with the stitches
    for weight in tuner.model.get_output_embeddings().parameters():
        weights.pop(id(weight), None)
    read = sum(weights.values()) + head(hub)
    adapter, together = tuner.active_adapters[0], tuner.experts_in_one_batch()
    for name, expert in tuner.experts[adapter].items():
        own = multiplied(find_decoder(expert.model, name).backbone)
        read += sum(size for key, size in own.items() if name not in together or key not in weights)
        read += head(expert.model) if tuner.peft_config[adapter].output == "mixture" else 0
    return read


def _cache_bytes(cache: Cache) -> tuple[int, int]:
    """Bytes that a cache holds, and those among them whose number does not depend on how many tokens it holds."""
    held = {"keys": 0, "values": 0, "conv_states": 0, "recurrent_states": 0}
    experts = held_expert_caches(cache)
    for layer in [*cache.layers, *(() if experts is None else experts.layers)]:
        for kind in held:
            states = getattr(layer, kind, None)
            for state in states.values() if isinstance(states, dict) else [states]:
                held[kind] += 0 if state is None else state.nbytes
    memory = 0 if experts is None or experts.memory is None else experts.memory.nbytes  # of gates with evidence
    constant = held["conv_states"] + held["recurrent_states"] + memory
    return sum(held.values()) + memory, constant


def _activations(model: PeftModel, tokens: Tensor, weights: list[Tensor], checkpointing: bool) -> Optional[int]:
    """Bytes of what autograd keeps from a training forward, besides weights. Tensors that share memory count once."""
    if any(map(is_mixture, model.modules())):
        return None
    alive: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def save(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        alive.add(saved)
        return saved

    model.train()
    if checkpointing:
        checkpoint_activations(base_model(model))
    with torch.autograd.graph.saved_tensors_hooks(save, lambda saved: saved.tensor):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss  # keeps its graph alive, and that alone
    model.eval()
    storages = {saved.tensor.untyped_storage()._cdata: saved.tensor.untyped_storage() for saved in alive}
    for tensor in (*weights, tokens, loss):
        storages.pop(tensor.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in storages.values())


class _Saved:
    """A tensor that autograd keeps; it goes when the part of the graph that needs it goes."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _file_size(model: PeftModel) -> int:
    """Bytes of adapter_model.safetensors: eight for the header's length, the header, the tensors."""
    tensors = get_peft_model_state_dict(model)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, tensor in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        start, end = end, end + tensor.nbytes
        dtype = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[
            tensor.dtype
        ]
        header[key] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + end
