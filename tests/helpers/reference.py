"""An independent, slow and literal Branch-Train-Stitch forward, to hold the package against.

Nothing here comes from the package. Each model is a plain causal LM that runs its own unchanged forward in a thread
of its own; hooks on its decoder layers make all models meet at each stitch, where the paper's equations are applied
with loops over the models. With `output="mixture"` the distributions that the models' own heads give are mixed at the
end. Inputs are the tensors and the config of an adapter *file*, so that the format is checked along with the maths:
every tensor must be used, and none may be missing.

    logits = reference_forward(hub, {"code": model}, load_file("adapter_model.safetensors"), config, input_ids)
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce

import torch


TIMEOUT = 60.0  # seconds that a model waits for the others before it gives up
DECODER_LAYERS = ["model.layers", "model.decoder.layers", "transformer.h", "transformer.blocks", "gpt_neox.layers"]


# ---------------------------------------------------------------------------------------------------- the equations


def linear(x, weight, bias=None):
    """(..., d_in) -> (..., d_out) by a weight of shape (d_out, d_in)."""
    y = x @ weight.transpose(0, 1)
    return y if bias is None else y + bias


def experts_into_hub(h_hub, h, gate, proj, present=None, watch=None):
    """Equation 3. A gate holds d_hub rows, or a single one (a value per token) that is spread over all channels.

    h_hub (..., d_hub); h {expert: (..., d_e)}; gate {"hub" or expert: (weight (d_hub or 1, d_hub), bias or None)};
    proj {expert: (d_hub, d_e)}; present {expert: (B, T), 1 or 0}: where an expert takes part, everywhere if `None`;
    watch is given the gates as they were if it took part everywhere, {model: (B, T, d_hub or 1)}.
    Returns the hub's new state (..., d_hub) and the projected {expert: (..., d_hub)}.
    """
    g = softmax_gates(h_hub, gate, present, watch)
    p = {name: linear(h[name], proj[name]) for name in h}
    new_hub = g["hub"] * h_hub
    for name in h:
        new_hub = new_hub + g[name] * p[name]
    return new_hub, p


def softmax_gates(h_hub, gate, present=None, watch=None, told=None):
    """The gates by model, {model: (..., rows of its gate)}; they add up to 1. Arguments as for `experts_into_hub`."""
    logits = {name: linear(h_hub, weight, bias) for name, (weight, bias) in gate.items()}
    for name in told or ():
        logits[name] = logits[name] + told[name][..., None]
    largest = reduce(torch.maximum, logits.values()).detach()  # cancels in the softmax; keeps exp in range
    scores = {name: torch.exp(logit - largest) for name, logit in logits.items()}
    if watch is not None:
        watch({name: score / sum(scores.values()) for name, score in scores.items()})
    for name in present or ():
        scores[name] = scores[name] * present[name][..., None]
    total = sum(scores.values())
    return {name: score / total for name, score in scores.items()}


def hub_into_experts(h_hub, h, gate, proj):
    """Equation 4. h_hub (..., d_hub); h {expert: (..., d_e)}; gate {expert: (weight (d_e or 1, d_hub), bias or None)};
    proj {expert: (d_e, d_hub)}. Returns the experts' new states {expert: (..., d_e)}; the hub keeps its own."""
    new = {}
    for name in h:
        g = torch.sigmoid(linear(h_hub, *gate[name]))
        new[name] = (1 - g) * h[name] + g * linear(h_hub, proj[name])
    return new


def evidence(logits, input_ids, forgetting, attention_mask=None, position_ids=None):
    """How well each model has predicted the tokens up to each one, {model: (B, T)} in float64, one after the other.

    Padding tells nothing: it is as if it were not there. A position that does not follow that of the token before
    begins another text.
    """
    vocabulary = logits["hub"].shape[-1]
    told = {}
    for name, of_model in logits.items():
        logp = torch.log_softmax(of_model[..., :vocabulary].double(), dim=-1)
        rows = []
        for b in range(input_ids.shape[0]):
            e, row, last = torch.zeros((), dtype=torch.float64), [], None
            for t in range(input_ids.shape[1]):
                if attention_mask is None or attention_mask[b, t]:
                    if last is None or (position_ids is not None and position_ids[b, t] != position_ids[b, last] + 1):
                        e = torch.zeros((), dtype=torch.float64)
                    else:
                        e = forgetting * e + logp[b, last, input_ids[b, t]]
                    last = t
                row.append(e)
            rows.append(torch.stack(row))
        told[name] = torch.stack(rows)
    return told


def output_mixture(h_hub, logits, gate, present=None, watch=None, told=None):
    """log of the sum over models of g_m p_m(x), in float64: the output mixture, (..., V) of the hub's vocabulary.

    told: {model: (B, T)} to be added to the gates' logits, the weighed evidence.
    h_hub (..., d_hub): what the hub's own head reads; logits {model: (..., V_m)}, each by the model's own head; gate
    {model: (weight (1, d_hub), bias (1,))}; present, watch: as for `experts_into_hub`. Models know no token beyond the
    hub's vocabulary, and give no probability to tokens that they have no logit for.
    """
    gate = {n: (w.double(), b.double()) for n, (w, b) in gate.items()}
    g = softmax_gates(h_hub.double(), gate, present, watch, told)
    vocabulary = logits["hub"].shape[-1]
    probability = torch.zeros_like(logits["hub"], dtype=torch.float64)
    for name, of_model in logits.items():
        p = torch.softmax(of_model[..., :vocabulary].double(), dim=-1)
        p = torch.cat([p, p.new_zeros(*p.shape[:-1], vocabulary - p.shape[-1])], dim=-1)
        probability = probability + g[name] * p
    return torch.log(probability)


# ---------------------------------------------------------------------- where stitches sit, and what the file holds


def decoder_layers(model):
    """The dotted path and the list of a causal LM's decoder layers."""
    for path in DECODER_LAYERS:
        try:
            return path, model.get_submodule(path)
        except AttributeError:
            pass
    raise ValueError(f"{type(model).__name__} has its decoder layers at none of {DECODER_LAYERS}")


def width(model):
    return model.get_input_embeddings().weight.shape[1]


def schedule(config, depth):
    """[(hub layer index, into_hub)], first stitch first."""
    indices = config.get("layers_to_stitch")
    if indices is None:
        k = config.get("num_stitches", 4)
        if k == 0:
            return []
        indices = [i * (depth // k) - 1 for i in range(1, k)] + [depth - 1]
    if config.get("pattern", "alternating") == "experts_into_hub":
        return [(index, True) for index in indices]
    return [(index, (len(indices) - 1 - i) % 2 == 0) for i, index in enumerate(indices)]


@dataclass
class Stitch:
    into_hub: bool
    boundary: dict  # model -> how many of its layers run before this stitch
    gate: dict  # model -> (weight, bias or None)
    proj: dict  # expert -> matrix
    projected: bool  # an Experts-into-Hub stitch hands the projected states on to the experts
    present: dict | None = None  # where experts take part in Experts-into-Hub stitches, see `experts_into_hub`
    watch: Callable | None = None

    def __call__(self, states):
        """{model: (B, T, d_model)} -> the same, after the stitch; the maths runs in the stitch's dtype."""
        dtype = next(iter(self.proj.values())).dtype
        h = {name: states[name].to(dtype) for name in self.proj}
        h_hub = states["hub"].to(dtype)
        if self.into_hub:
            h_hub, p = experts_into_hub(h_hub, h, self.gate, self.proj, self.present, self.watch)
            new = {"hub": h_hub, **(p if self.projected else {})}
        else:
            new = hub_into_experts(h_hub, h, self.gate, self.proj)
        return {name: new[name].to(state.dtype) if name in new else state for name, state in states.items()}


def make_stitches(hub, experts, config, take):
    """All stitches, in order, the gates of the output mixture, or `None`, and the weight of evidence, or `None`.

    `take(key, shape)` supplies each tensor of the file: this is the format's definition.
    """
    path, hub_layers = decoder_layers(hub)
    depth = {name: len(decoder_layers(model)[1]) for name, model in {"hub": hub, **experts}.items()}
    dim = {name: width(model) for name, model in {"hub": hub, **experts}.items()}
    projected = config.get("expert_streams", "intact") == "projected"
    if projected and len(set(dim.values())) > 1:
        raise ValueError(f"projected expert streams take one width for all models, found {dim}")

    stitches = []
    for index, into_hub in schedule(config, len(hub_layers)):
        prefix = f"base_model.model.{path}.{index}.stitch_layer"

        gate = {}
        for name in ["hub", *experts] if into_hub else experts:
            rows = 1 if config.get("gate", "channel") == "token" else dim["hub" if into_hub else name]
            weight = take(f"{prefix}.gate.{name}.weight", (rows, dim["hub"]))
            bias = take(f"{prefix}.gate.{name}.bias", (rows,)) if config.get("gate_bias", True) else None
            gate[name] = weight, bias

        proj = {}
        for name in experts:
            d_out, d_in = (dim["hub"], dim[name]) if into_hub else (dim[name], dim["hub"])
            if (r := config.get("r")) is None:
                proj[name] = take(f"{prefix}.proj.{name}.weight", (d_out, d_in))
            else:
                down = take(f"{prefix}.proj.{name}.down.weight", (r, d_in))
                up = take(f"{prefix}.proj.{name}.up.weight", (d_out, r))
                proj[name] = torch.eye(d_out, d_in, dtype=up.dtype) + up @ down

        # Halves go to the even side: the middle of the hub meets 5 layers after the 2nd, 7 layers after the 4th.
        boundary = {name: round((index + 1) * depth[name] / depth["hub"]) for name in depth}
        stitches.append(Stitch(into_hub, boundary, gate, proj, projected))

    if config.get("output", "hub") == "hub":
        return stitches, None, None
    prefix = "base_model.model.stitch_output"
    gates = {
        name: (take(f"{prefix}.gate.{name}.weight", (1, dim["hub"])), take(f"{prefix}.gate.{name}.bias", (1,)))
        for name in ["hub", *experts]
    }
    return stitches, gates, None if config.get("evidence") is None else take(f"{prefix}.evidence_weight", (1,))


def read_stitches(hub, experts, config, tensors):
    """`make_stitches` of an adapter file; KeyError or ValueError for a missing, misshapen or leftover tensor."""
    unused = dict(tensors)

    def take(key, shape):
        tensor = unused.pop(key)
        if tensor.shape != shape:
            raise ValueError(f"{key} has shape {tuple(tensor.shape)}, expected {shape}")
        return tensor

    made = make_stitches(hub, experts, config, take)
    if unused:
        raise ValueError(f"no stitch uses {sorted(unused)}")
    return made


def random_stitch_tensors(hub, experts, config, seed=0, dtype=torch.float32):
    """A random adapter file: gates far from uniform (but not saturated), projections near the identity."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}

    def take(key, shape):
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        if key.endswith(("bias", "evidence_weight")):
            tensor = noise
        elif ".gate." in key or ".down." in key:
            tensor = noise / shape[1] ** 0.5
        elif ".up." in key:
            tensor = 0.5 * noise
        else:
            tensor = torch.eye(*shape, dtype=torch.float64) + 0.5 * noise / shape[1] ** 0.5
        tensors[key] = tensor.to(dtype)
        return tensors[key]

    make_stitches(hub, experts, config, take)
    return tensors


# ------------------------------------------------------------------------------------------------------- the forward


class Meeting:
    """All models hand in their states, the last to arrive stitches them, each leaves with its new state."""

    def __init__(self, stitch, parties):
        self.stitch, self.states = stitch, {}
        self.barrier = threading.Barrier(parties, action=self.apply, timeout=TIMEOUT)

    def apply(self):
        self.states = self.stitch(self.states)

    def attend(self, name, state):
        self.states[name] = state
        self.barrier.wait()
        return self.states[name]


def hook_layers(name, model, meetings, this_thread):
    """Hooks that send `model` to its meetings; the same module may serve several models, each in its own thread."""
    _, layers = decoder_layers(model)

    def attend(boundary, state):
        if this_thread.name == name:
            for meeting in meetings:
                if meeting.stitch.boundary[name] == boundary:
                    state = meeting.attend(name, state)
        return state

    def before_first(layer, args, kwargs):
        if args:
            return (attend(0, args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": attend(0, kwargs["hidden_states"])}

    def after(boundary):
        def hook(layer, args, output):
            if isinstance(output, torch.Tensor):
                return attend(boundary, output)
            return (attend(boundary, output[0]), *output[1:])

        return hook

    yield layers[0].register_forward_pre_hook(before_first, with_kwargs=True)
    for i, layer in enumerate(layers):
        yield layer.register_forward_hook(after(i + 1))


def reference_forward(
    hub, experts, tensors, config, input_ids, attention_mask=None, present=None, watch=None, **kwargs
):
    """The hub's logits (B, T, V) with `experts` {name: model}, all plain causal LMs, stitched into it.

    With `output="mixture"` they are log probabilities of the mixture, in float64.

    tensors: what adapter_model.safetensors holds; config: what adapter_config.json holds (gate_dropout is ignored);
    present, watch: see `experts_into_hub`; watch is told of the output gates, or of the last stitch where there are
    none. kwargs go to every model. An error in any model is raised here; BrokenBarrierError is a model that never came
    to a stitch. Gradients reach `tensors` (and the models) if grad mode is on.
    """
    models = {"hub": hub, **experts}
    stitches, output_gate, evidence_weight = read_stitches(hub, experts, config, tensors)
    for stitch in stitches:
        stitch.present = present
    if output_gate is None:
        stitches[-1].watch = watch
    meetings = [Meeting(stitch, len(models)) for stitch in stitches]
    grad = torch.is_grad_enabled()
    this_thread = threading.local()

    def run(name):
        this_thread.name = name
        try:
            with torch.set_grad_enabled(grad):  # grad mode belongs to a thread
                inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False, **kwargs}
                return models[name](**inputs).logits
        except BaseException:
            for meeting in meetings:  # nobody shall wait for this model
                meeting.barrier.abort()
            raise

    hooks, read_by_head = [], {}

    def note(head, args):
        read_by_head[this_thread.name] = args[0]

    try:
        for name, model in models.items():
            hooks.extend(hook_layers(name, model, meetings, this_thread))
        hooks.append(hub.get_output_embeddings().register_forward_pre_hook(note))
        with ThreadPoolExecutor(len(models)) as pool:
            runs = {name: pool.submit(run, name) for name in models}
    finally:
        for hook in hooks:
            hook.remove()

    errors = [error for error in (future.exception() for future in runs.values()) if error]
    errors.sort(key=lambda error: isinstance(error, threading.BrokenBarrierError))  # the cause, not who waited for it
    if errors:
        raise errors[0]
    logits = {name: run.result() for name, run in runs.items()}
    if output_gate is None:
        return logits["hub"]
    told = None
    if evidence_weight is not None:
        told = evidence(logits, input_ids, config["evidence"], attention_mask, kwargs.get("position_ids"))
        told = {name: evidence_weight.double() * e.detach() for name, e in told.items()}
    return output_mixture(read_by_head["hub"], logits, output_gate, present, watch, told)
