"""What tests of adapters share: models on disk, stitched models of them, and what is in those."""

import json

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from peft_bts import StitchConfig, StitchLayer
from tests.helpers.models import IDS, randomize
from tests.helpers.zoo import tiny_model


FIRST = "base_model.model.model.layers.1.stitch_layer"
LAST = "base_model.model.model.layers.3.stitch_layer"
ROWS = torch.randint(3, 64, (16, 12), generator=torch.Generator().manual_seed(1))
DATASET = [{"input_ids": row, "labels": row} for row in ROWS]


def save_models(root):
    """A seed, three experts of other shapes, and a LoRA of the seed."""
    tiny_model("llama").save_pretrained(root / "seed")
    tiny_model("llama", seed=1, width=48).save_pretrained(root / "code")
    tiny_model("qwen3", seed=2, layers=6).save_pretrained(root / "math")
    tiny_model("gpt2", seed=3, layers=3).save_pretrained(root / "law")
    make_lora(root, "lora")


def make_lora(root, name, **options):
    torch.manual_seed(0)
    lora = LoraConfig(
        task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj", "mlp.up_proj"], **options
    )
    model = get_peft_model(load(root, "seed"), lora)
    if options.get("modules_to_save"):
        with torch.no_grad():
            model.base_model.model.lm_head.modules_to_save["default"].weight.add_(0.5)
    model.save_pretrained(root / name)


def load(root, name, **kwargs):
    return AutoModelForCausalLM.from_pretrained(root / name, **kwargs)


def config(root=None, experts="code math", **options):
    """Two stitches of random weights: Hub-into-Experts behind layer 1, Experts-into-Hub behind layer 3."""
    options = {"num_stitches": 2, "init_weights": False, "task_type": "CAUSAL_LM", "output": "hub"} | options
    return StitchConfig(experts={name: str(root / name) for name in experts.split()}, **options)


def make(
    root,
    experts="code math",
    *,
    seed=0,
    dtype="auto",
    adapter_name="default",
    autocast_adapter_dtype=True,
    **options,
):
    """The seed with experts stitched in; `options` are those of `config`."""
    torch.manual_seed(seed)
    return get_peft_model(
        load(root, "seed", dtype=dtype),
        config(root, experts, **options),
        adapter_name=adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
    )


def stitched(seed, experts, **options):
    """A seed, by path or id, with references to experts; its stitches are random, and reach every logit."""
    config = StitchConfig(task_type="CAUSAL_LM", num_stitches=2, experts=experts, **{"output": "hub"} | options)
    return randomize(get_peft_model(AutoModelForCausalLM.from_pretrained(seed), config)).eval()


def two_adapters(root, first="default", second="other"):
    """Other experts, another schedule and another gate in the second adapter; `code` is in both."""
    model = make(root, adapter_name=first)
    model.add_adapter(second, config(root, "code law", num_stitches=1, layers_to_stitch=[0, 2, 3], gate="token"))
    return model


def save(model, root, name="saved", **kwargs):
    folder = root / f"{name}-{len(list(root.iterdir()))}"
    model.save_pretrained(folder, **kwargs)
    return folder


def read(folder):
    """The tensors and the config of an adapter folder."""
    return load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text())


def train(model, steps=2):
    """A few steps on every weight that asks for a gradient; all of them must move."""
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    model.train()
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    still = [name for name, p in model.named_parameters() if name in before and torch.equal(p, before[name])]
    assert before and not still
    return model


def train_by_trainer(model, folder, resume=None, **options):
    """Four steps by Trainer, or as `options` say; return the Trainer."""
    options = {"max_steps": 4, "save_strategy": "no", "learning_rate": 1e-2} | options
    args = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, report_to=[], use_cpu=True, **options
    )
    trainer = Trainer(model=model, args=args, train_dataset=DATASET, eval_dataset=DATASET[:4])
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def state(module):
    return {key: tensor.clone() for key, tensor in module.state_dict().items()}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    different = [key for key in actual if not torch.equal(actual[key], expected[key])]
    assert not different


def assert_untouched(hub):
    """No wrapper, no hook, nothing of PEFT's is left in a hub."""
    assert not [name for name, module in hub.named_modules() if isinstance(module, StitchLayer)]
    assert not [name for name, m in hub.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not [key for key in hub.state_dict() if "stitch" in key]


def stitches(model, adapter="default"):
    parts = (f".stitch_layer.{adapter}.", f".stitch_output.{adapter}.")
    return [p for name, p in model.named_parameters() if any(part in name for part in parts)]


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}
