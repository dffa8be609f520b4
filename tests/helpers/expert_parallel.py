r"""Runs tiny stitched models over several processes: the script that tests/distributed start.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=29500 \
        python -m tests.helpers.expert_parallel FOLDER SCENARIO...

`FOLDER/models` holds the hubs and experts, `FOLDER/NAME` adapters on them (`save_models`, `save_adapter`). What a
scenario returns is written into `FOLDER/results/SCENARIO-RANK.pt`. In one process, without RANK, the same scenarios
run without `expert_parallel`, and say what is expected.
"""

import contextlib
import gc
import os
import sys
from unittest import mock

import torch
import torch.distributed as dist
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

import peft_bts
from peft_bts import StitchConfig
from tests.helpers.harness import TASKS
from tests.helpers.models import IDS, LEFT, randomize
from tests.helpers.text import word_tokenizer
from tests.helpers.zoo import tiny_model


DISTRIBUTED = "RANK" in os.environ
RANK = int(os.environ.get("RANK", 0))
MODELS = {
    "llama": ("llama", {}),
    "deeper": ("llama", {"layers": 6, "seed": 1}),
    "other": ("gpt2", {"layers": 3, "width": 48, "seed": 2}),  # depth, width and architecture of its own
    "third": ("llama", {"seed": 3}),
}
EXPERTS = ("deeper", "other", "third")
STEPS, BATCH = 4, 4
DATA = torch.randint(3, 64, (STEPS * BATCH, 12), generator=torch.Generator().manual_seed(1))


def save_models(folder, architectures=()):
    os.makedirs(f"{folder}/results", exist_ok=True)
    for name, (arch, options) in MODELS.items():
        tiny_model(arch, dtype=torch.float64, **options).save_pretrained(f"{folder}/models/{name}")
    for arch in architectures:
        tiny_model(arch, dtype=torch.float64).save_pretrained(f"{folder}/models/{arch}")
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    get_peft_model(AutoModelForCausalLM.from_pretrained(f"{folder}/models/llama"), lora).save_pretrained(
        f"{folder}/models/lora"
    )


def save_adapter(folder, name, hub="llama", experts=EXPERTS, dtype=torch.float64, **config):
    """An adapter with random stitches."""
    config = {"output": "hub"} | config
    config = StitchConfig(task_type="CAUSAL_LM", experts={x: f"{folder}/models/{x}" for x in experts}, **config)
    hub = AutoModelForCausalLM.from_pretrained(f"{folder}/models/{hub}", dtype=dtype)
    randomize(get_peft_model(hub, config)).save_pretrained(f"{folder}/{name}")


def spread(**options):
    """`expert_parallel` where there are several processes."""
    return peft_bts.expert_parallel(**options) if DISTRIBUTED else contextlib.nullcontext()


def load(folder, adapter, trained=False, dtype=torch.float64, **options):
    with spread(**options):
        return AutoPeftModelForCausalLM.from_pretrained(f"{folder}/{adapter}", dtype=dtype, is_trainable=trained)


def held_layers(model):
    """Names of the models of whose decoder layers any weight is in this process, and how many other weights are."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layers = [
        name for name in names.values() if ".stitch_layer." not in name and (".layers." in name or ".h." in name)
    ]
    found = {name.split(".experts.default.")[1].split(".")[0] if ".experts." in name else "hub" for name in layers}
    gc.collect()
    strays = [
        thing
        for thing in gc.get_objects()
        if type(thing) is torch.nn.Parameter and id(thing) not in names and not isinstance(thing, FakeTensor)
    ]
    return sorted(found), sum(thing.numel() for thing in strays if thing.device.type != "meta")


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def backward(model, **inputs):
    """The loss of a training step, and its gradients."""
    model.train().zero_grad()
    loss = model(**{"input_ids": IDS, "labels": IDS, **inputs}).loss
    loss.backward()
    return {"loss": loss.detach(), "gradients": gradients(model)}


@torch.no_grad()
def decode(model, steps=4):
    """Logits of a prompt, then of tokens one by one, with a cache."""
    model.eval()
    out = model(input_ids=IDS[:, :-steps], use_cache=True)
    logits = [out.logits]
    for i in range(12 - steps, 12):
        out = model(input_ids=IDS[:, i : i + 1], past_key_values=out.past_key_values)
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


def generate(model, **options):
    torch.manual_seed(RANK)  # the processes' random numbers differ
    inputs = {"input_ids": IDS, "attention_mask": LEFT, "max_new_tokens": 6, "do_sample": False}
    return model.eval().generate(**inputs | options)


def basics(folder, adapter, padded=True, dtype=torch.float64):
    """A training step, a forward, cached steps, and generated tokens."""
    model = load(folder, adapter, trained=True, dtype=dtype)
    mask = {"attention_mask": LEFT} if padded else {}
    result = backward(model, **mask)
    with torch.no_grad():
        result["logits"] = model.eval()(input_ids=IDS, **mask).logits
        with model.disable_adapter():
            result["hub"] = model(input_ids=IDS).logits
    result["steps"] = decode(model)
    result["tokens"] = generate(model, **mask) if padded else generate(model, attention_mask=None)
    return result


def memory(folder):
    """Which layers are held, of models loaded by either way and by a placement of the user's."""
    held = {"auto": held_layers(load(folder, "alternating"))}
    held["given"] = held_layers(load(folder, "alternating", placement={"hub": 1, "deeper": 0, "other": 1, "third": 1}))
    return held


def modes(folder):
    """`generate()` in its modes."""
    model = load(folder, "alternating")
    draft = tiny_model("llama", seed=3, dtype=torch.float64)
    tokens = {
        "sampled": generate(model, do_sample=True, temperature=2.0),
        "beams": generate(model, num_beams=3),
        "static": generate(model, cache_implementation="static"),
        "lookup": generate(model, input_ids=IDS[:1], attention_mask=None, prompt_lookup_num_tokens=2),
        "assisted": generate(model, input_ids=IDS[:1], attention_mask=None, assistant_model=draft),
        "dropped": generate(model, max_active_experts=1),
        "threshold": generate(model, expert_threshold=0.2),
        "several": generate(model, do_sample=True, num_return_sequences=2),
    }
    with model.set_active_experts(["other"]):
        tokens["active"] = generate(model)
    with model.disable_adapter():
        tokens["hub"] = generate(model)
    with runs(model) as counts, peft_bts.trace_gates(model) as trace:
        tokens["traced"] = generate(model, max_active_experts=1)
    tokens["gates"] = torch.tensor([gate for row in trace.table().rows for gate in row["gates"].values()])
    return tokens | {f"runs of {name}": count for name, count in counts.items()}


@contextlib.contextmanager
def runs(model):
    """How often each expert's first layer runs, in whichever process it is; known behind the `with`."""
    counts, hooks = {}, []
    for name, expert in model.base_model.experts["default"].items():
        counts[name] = torch.zeros((), dtype=torch.int64)
        hooks.append(expert.layers[0].register_forward_hook(lambda *_, count=counts[name]: count.add_(1) and None))
    yield counts
    for hook in hooks:
        hook.remove()
    for count in counts.values() if DISTRIBUTED else ():
        dist.all_reduce(count)


def check_room(folder, model):
    """Where an expert was detached there is room again, so that the next one goes there."""
    parallel, owners = model.base_model._parallel, []
    loads = list(parallel.placement.loads)
    for name in ("first", "second", "third_one"):
        model.attach_expert(name, f"{folder}/models/other")
        owners.append(parallel.owner(model.base_model.experts["default"][name]))
        assert sum(parallel.placement.loads) > sum(loads)
        model.detach_expert(name)
        assert parallel.placement.loads == loads
    assert len(set(owners)) == 1


def life(folder):
    """Made by `get_peft_model`, experts attached and detached, trained a step, saved by all, and loaded again."""
    with spread():
        hub = AutoModelForCausalLM.from_pretrained(f"{folder}/models/llama", dtype=torch.float64)
        config = StitchConfig(task_type="CAUSAL_LM", experts={"deeper": f"{folder}/models/deeper"})
        model = get_peft_model(hub, config)
    model.attach_expert("third", f"{folder}/models/third")
    randomize(model)
    result = {"two": backward(model)}
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    model.attach_expert("object", tiny_model("gpt2", seed=4, dtype=torch.float64), init="closed")
    result["three"] = backward(model)
    model.detach_expert("object")
    if DISTRIBUTED:
        check_room(folder, model)
    model.detach_expert("deeper")
    result["one"] = backward(model)
    target = f"{folder}/saved-{'spread' if DISTRIBUTED else 'alone'}"
    model.save_pretrained(target)
    if DISTRIBUTED:
        dist.barrier()
    result["again"] = decode(load(*os.path.split(target)))
    return result


def checkpointing(folder):
    """Gradients with both kinds of gradient checkpointing."""
    found = {}
    for reentrant in (False, True):
        model = load(folder, "alternating", trained=True)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        found[str(reentrant)] = backward(model, attention_mask=LEFT, use_cache=False)
    return found


def low_precision(folder):
    """Models in bfloat16, and float32 under autocast."""
    model = load(folder, "alternating", trained=True, dtype=torch.bfloat16)
    found = {"bfloat16": backward(model)}
    model = load(folder, "alternating", trained=True, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found["autocast"] = backward(model)
    return found


def mixture(folder, adapter):
    """The output mixture: loss and gradients, logits, cached steps, tokens, also with experts left out.

    While it is trained, no process has the logits: they would have to be sent for nothing.
    """
    model = load(folder, adapter, trained=True)
    assert (model(input_ids=IDS, labels=IDS).logits is None) == DISTRIBUTED
    assert model(input_ids=IDS).logits.requires_grad
    found = backward(model, attention_mask=LEFT)
    with torch.no_grad():
        found["logits"] = model.eval()(input_ids=IDS, labels=IDS).logits
    found |= {"steps": decode(model), "tokens": generate(model), "beams": generate(model, num_beams=3)}
    if model.peft_config["default"].evidence is None:  # else all experts are needed
        found["dropped"] = generate(model, max_active_experts=1)
    return found


def refusals(folder):
    """Messages of what is refused, and that models work afterwards."""
    messages = {}

    def refused(name, call):
        try:
            call()
        except (ValueError, RuntimeError) as error:
            messages[name] = str(error)

    with mock.patch.object(PreTrainedModel, "from_pretrained", side_effect=AssertionError("loaded")):
        refused("too many processes", lambda: load(folder, "lora_only"))
        refused("idle process", lambda: load(folder, "alternating", placement={"hub": 0, "deeper": 0}))
        refused("no such process", lambda: load(folder, "alternating", placement={"hub": 0, "deeper": 2}))
        refused("no hub", lambda: load(folder, "alternating", placement={"deeper": 0, "other": 1}))
        refused("no expert", lambda: load(folder, "alternating", placement={"hub": 0, "deeper": 1}))
    hub = AutoModelForCausalLM.from_pretrained(f"{folder}/models/llama")
    with spread():
        refused("loaded before", lambda: get_peft_model(hub, StitchConfig(task_type="CAUSAL_LM")))
        half = AutoModelForCausalLM.from_pretrained(f"{folder}/models/llama")
        refused("modules", lambda: get_peft_model(half, StitchConfig(modules_to_save=["lm_head"])))
        refused("dropout", lambda: get_peft_model(half, StitchConfig(gate_dropout=0.1)))
    model = load(folder, "alternating", check_inputs=True)
    refused("inputs", lambda: model(input_ids=IDS + RANK))
    refused("lengths", lambda: model(input_ids=IDS[:, : 12 - RANK]))
    with peft_bts.trace_gates(model) if RANK else contextlib.nullcontext():
        refused("traced", lambda: model(input_ids=IDS))
    decode(model)  # what is exchanged is known: nothing but the checks would find other experts from here on
    with model.set_active_experts(["other"]) if RANK else contextlib.nullcontext():
        refused("experts", lambda: model(input_ids=IDS))
    refused("limits", lambda: generate(model, max_active_experts=1 + RANK))
    refused("labels", lambda: model(input_ids=IDS, labels=IDS.flip(1) if RANK else IDS))
    refused("items", lambda: model(input_ids=IDS, labels=IDS, num_items_in_batch=7 + RANK))
    unchecked = load(folder, "alternating")
    with unchecked.set_active_experts(["other"]) if RANK else contextlib.nullcontext():
        refused("active", lambda: unchecked(input_ids=IDS))
    refused("draft", lambda: model.generate(input_ids=IDS, draft="hub"))
    refused("hidden states", lambda: model(input_ids=IDS, output_hidden_states=True))
    refused("seconds", lambda: model.generate(input_ids=IDS, max_time=1.0))
    refused("export", lambda: model.export("nowhere"))
    refused("threads", lambda: model.parallel_streams(2))
    refused("sharding", lambda: model.base_model._no_split_modules)
    refused("quantised", lambda: model.attach_expert("q", f"{folder}/models/third", quantization_config={"x": 1}))
    refused("missing", lambda: model.attach_expert("q", f"{folder}/nowhere"))
    return {"messages": messages, "logits": decode(model), "unchecked": decode(unchecked)}


def trainer(folder, mesh=None):
    """Trainer: a run that saves half-way, and one that resumes from there; with evaluation."""
    losses, where = [], "spread" if DISTRIBUTED else "alone"
    output = f"{folder}/trainer-{where}-{'data' if mesh else 'plain'}"
    data = [{"input_ids": x, "labels": x} for x in DATA]
    evaluated = 8 if mesh else 7  # as ever, Trainer fills up uneven shares with rows that it counts in the loss
    shares = 2 if mesh and DISTRIBUTED else 1
    for resume in (False, True):
        if mesh and DISTRIBUTED:
            axes = {"mesh": init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "expert"))}
        else:
            axes = {}
        model = load(folder, "alternating", trained=True, dtype=torch.float32, **axes)
        arguments = TrainingArguments(
            output_dir=output,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH // shares,
            per_device_eval_batch_size=BATCH // shares,
            eval_strategy="steps",
            eval_steps=STEPS // 2,
            learning_rate=1e-2,
            adam_epsilon=1e-4,
            save_steps=STEPS // 2,
            logging_steps=1,
            train_sampling_strategy="sequential",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        run = Trainer(model, arguments, train_dataset=data, eval_dataset=data[:evaluated])
        run.train(resume_from_checkpoint=f"{output}/checkpoint-{STEPS // 2}" if resume else None)
        losses.append([entry[key] for entry in run.state.log_history for key in ("loss", "eval_loss") if key in entry])
    weights = {name: p.detach() for name, p in run.model.named_parameters() if p.requires_grad}
    return {"losses": torch.tensor(losses, dtype=torch.float64), "weights": weights}


def trl(folder):
    """TRL's SFTTrainer, two steps over documents: its losses, its other metrics, the weights."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    texts = [" ".join(f"w{token}" for token in row.clamp(max=61).tolist()) for row in DATA]
    found = {}
    for adapter in ("alternating", "mixture"):
        arguments = SFTConfig(
            output_dir=f"{folder}/trl-{'spread' if DISTRIBUTED else 'alone'}",
            max_steps=2,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-2,
            adam_epsilon=1e-4,
            logging_steps=1,
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        )
        run = SFTTrainer(
            model=load(folder, adapter, trained=True, dtype=torch.float32),
            args=arguments,
            train_dataset=Dataset.from_list([{"text": text} for text in texts]),
            processing_class=word_tokenizer(),
        )
        run.train()
        for key in ("loss", "entropy", "mean_token_accuracy", "num_tokens"):
            found[f"{adapter} {key}"] = torch.tensor([log[key] for log in run.state.log_history if key in log])
        found |= {f"{adapter} {n}": p.detach() for n, p in run.model.named_parameters() if p.requires_grad}
    return found


def harness(folder):
    """lm-evaluation-harness on a model object: what it finds, log-likelihoods and texts."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=load(folder, "alternating"), tokenizer=word_tokenizer(), batch_size=4)
    results = simple_evaluate(model, tasks=[*TASKS], task_manager=TaskManager(include_path=folder))
    if RANK:
        assert results is None  # the harness tells the first process alone
        return None
    choices, texts = (results["samples"][name] for name in TASKS)
    return {
        "likelihoods": torch.tensor([float(answer[0]) for row in choices for answer in row["filtered_resps"]]),
        "accuracy": torch.tensor(results["results"]["tiny_choice"]["acc,none"]),
        "texts": torch.tensor([ord(char) for row in texts for char in row["resps"][0][0]]),
    }


def dying(folder):
    """The last process goes amid a forward."""
    model = load(folder, "alternating")
    model(input_ids=IDS)
    if dist.get_world_size() - 1 == RANK:
        os._exit(7)
    model(input_ids=IDS)


SCENARIOS = {
    "memory": memory,
    "modes": modes,
    "life": life,
    "checkpointing": checkpointing,
    "low_precision": low_precision,
    "mixture": lambda folder: mixture(folder, "mixture"),
    "gates_alone": lambda folder: mixture(folder, "gates_alone"),
    "evidence": lambda folder: mixture(folder, "evidence"),
    "refusals": refusals,
    "trainer": trainer,
    "trainer_and_data": lambda folder: trainer(folder, mesh=True),
    "trl": trl,
    "harness": harness,
    "dying": dying,
}


def run(folder, scenario):
    """The name of an adapter is a scenario, too; how it is to be run may stand behind it."""
    if scenario in SCENARIOS:
        return SCENARIOS[scenario](folder)
    adapter, _, how = scenario.partition("-in-")
    return basics(folder, adapter, **{"": {}, "full": {"padded": False}, "float32": {"dtype": torch.float32}}[how])


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder, *scenarios = sys.argv[1:]
    for scenario in scenarios:
        if RANK == 0:
            print("scenario", scenario, flush=True)
        torch.save(run(folder, scenario), f"{folder}/results/{scenario}-{RANK}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
