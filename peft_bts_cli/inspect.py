"""`peft-bts inspect`: what is in this adapter? Reads the adapter's files alone; no model is loaded."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from .common import Adapter, Result, stitch_config


if TYPE_CHECKING:
    from torch import Tensor


_KEY = re.compile(r".*\.(?P<layer>\d+)\.stitch_layer\.(?P<role>gate|proj)\.(?P<model>\w+)\.(?P<rest>.+)")
_OUTPUT_KEY = re.compile(r".*\.stitch_output\.(?P<role>gate)\.(?P<model>\w+)\.(?P<rest>.+)")
_EVIDENCE_KEY = ".stitch_output.evidence_weight"
_OPTIONS = (
    *("output", "evidence", "pattern", "expert_streams"),
    *("gate", "gate_bias", "gate_dropout", "r", "modules_to_save"),
)


def inspect(adapter: Adapter) -> Result:
    """Show the experts and stitches of an adapter, and how far training has moved them. Loads no model."""
    from peft.utils import SAFETENSORS_WEIGHTS_NAME
    from safetensors import safe_open
    from transformers.utils import cached_file

    config = stitch_config(adapter)
    weights = others = 0
    stitches: dict[int, dict[str, dict[str, Tensor]]] = {}  # by layer, model, and place in the model
    output: dict[str, dict[str, Tensor]] = {}  # of an output mixture: by model, and place in the model
    evidence = None  # the weight that its gates give to evidence
    with safe_open(cached_file(adapter, SAFETENSORS_WEIGHTS_NAME), framework="pt") as file:
        keys: list[str] = file.keys()
        for key in keys:
            tensor, match, of_output = file.get_tensor(key), _KEY.match(key), _OUTPUT_KEY.match(key)
            weights += tensor.numel()
            if match is not None:
                model = stitches.setdefault(int(match["layer"]), {}).setdefault(match["model"], {})
            elif of_output is not None:
                match, model = of_output, output.setdefault(of_output["model"], {})
            elif key.endswith(_EVIDENCE_KEY):
                evidence = tensor.item()
                continue
            else:
                others += tensor.numel()
                continue
            model[f"{match['role']}.{match['rest']}"] = tensor
    layers = {layer: _stitch(models) for layer, models in sorted(stitches.items())}
    options = {option: getattr(config, option) for option in _OPTIONS}
    data = {
        "adapter": adapter,
        "hub": {"model": config.base_model_name_or_path, "revision": config.revision},
        "experts": config.experts,
        "options": options,
        "weights": weights,
        "weights_outside_of_stitches": others,
        "stitches": layers,
        "output_gates": {name: _moved(tensors) for name, tensors in sorted(output.items())},
        "evidence_weight": evidence,
    }
    return Result(_tables(data), data)


def _stitch(models: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    """One stitch: its kind (only Experts-into-Hub has a gate for the hub), and per model how far it has come."""
    from peft_bts.config import EXPERTS_INTO_HUB, HUB_INTO_EXPERTS
    from peft_bts.stitch import HUB

    return {
        "kind": EXPERTS_INTO_HUB if HUB in models else HUB_INTO_EXPERTS,
        "models": {name: _moved(tensors) for name, tensors in sorted(models.items())},
    }


def _moved(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Root mean squares of a gate's weights and biases, and the projection's relative distance from the identity.

    Both started at zero, unless the adapter was made with `init_weights=False`. The distance is
    |P - I| / |I| in Frobenius norms.
    """
    import torch

    found: dict[str, Any] = {"weights": sum(tensor.numel() for tensor in tensors.values())}
    for role in ("weight", "bias"):
        gate = tensors.get(f"gate.{role}")
        found[f"gate_{role}_rms"] = None if gate is None else gate.double().square().mean().sqrt().item()
    found["proj_distance"] = found["proj_shape"] = None
    if "proj.weight" in tensors:
        full = tensors["proj.weight"].float()
        shape, distance = full.shape, (full - torch.eye(*full.shape)).norm().item()
    elif "proj.up.weight" in tensors:
        up, down = tensors["proj.up.weight"].double(), tensors["proj.down.weight"].double()
        # |up @ down|^2 = trace(up' up down down'), without the large product
        shape = torch.Size((up.shape[0], down.shape[1]))
        distance = ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt().item()
    else:
        return found
    return {**found, "proj_distance": distance / min(shape) ** 0.5, "proj_shape": list(shape)}


def _tables(data: dict[str, Any]) -> list[Any]:
    from peft_bts.formatting import table

    hub, revision = data["hub"]["model"] or "(a model object)", data["hub"]["revision"]
    experts = []
    for name, reference in sorted(data["experts"].items()):
        sizes = reference.get("config") or {}
        source = reference.get("adapter") or reference.get("model") or "(a model object)"
        kind = f"LoRA on {reference.get('model') or 'the hub'}" if reference.get("adapter") else ""
        size = f"{sizes['model_type']}, {sizes['num_hidden_layers']} x {sizes['hidden_size']}" if sizes else ""
        experts.append((name, source, kind, reference.get("revision") or "", size))

    def number(value: Any) -> str:
        return "" if value is None else f"{value:.3g}"

    def row(layer: str, kind: str, name: str, found: dict[str, Any]) -> tuple[Any, ...]:
        figures = (number(found[key]) for key in ("gate_weight_rms", "gate_bias_rms", "proj_distance"))
        return layer, kind, name, found["weights"], *figures

    stitches = [
        row(str(layer), stitch["kind"].replace("_", "-"), name, found)
        for layer, stitch in data["stitches"].items()
        for name, found in stitch["models"].items()
    ]
    gates = [row("", "output", name, found) for name, found in data["output_gates"].items()]
    and_gates = " and output gates" if gates else ""
    options = ", ".join(f"{option}={value!r}" for option, value in data["options"].items() if value is not None)
    columns = ["layer", "kind", "model", "weights", "gate", "bias", "projection"]
    return [
        f"Stitch adapter {data['adapter']}: {data['weights']:,} weights in {len(data['stitches'])} stitches"
        f"{and_gates}.",
        f"Hub: {hub}" + (f" at {revision}" if revision else ""),
        f"Options: {options}",
        *([] if data["evidence_weight"] is None else [f"Weight of the evidence: {data['evidence_weight']:.3g}"]),
        table("Experts", ["expert", "model", "", "revision", "layers x width"], experts, left=5),
        table(f"Stitches{and_gates}", columns, [*stitches, *gates], left=3),
        "layer: of the hub, from 0. gate, bias: root mean square. projection: relative distance from the identity.",
    ]
