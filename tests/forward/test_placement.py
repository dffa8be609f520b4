"""Experts and hubs that accelerate keeps in several places: on other devices, in CPU memory, on disk.

There is one device here, the CPU; "disk" and "cpu offload" (weights wait in a state dict, modules hold meta tensors)
go through the same hooks as with a GPU.
"""

import subprocess
import sys
import textwrap

import pytest
import torch
from accelerate import cpu_offload
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from peft_bts import StitchConfig
from tests.helpers.models import IDS, LEFT, assert_near, expected_logits, logits, randomize
from tests.helpers.zoo import tiny_model


ARCHITECTURES = ["llama", "gpt2", "gemma3_text", "bamba"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("placement")
    for seed, arch in enumerate(ARCHITECTURES):
        tiny_model(arch, seed=seed).save_pretrained(root / arch)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(3)
    get_peft_model(AutoModelForCausalLM.from_pretrained(root / "llama"), config).save_pretrained(root / "lora")
    return root


def plain(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def device_map(path):
    """Two layers on disk, the rest on the CPU."""
    model = plain(path)
    backbone = model.base_model
    layers = next(name for name, module in backbone.named_children() if isinstance(module, torch.nn.ModuleList))
    prefix = model.base_model_prefix
    places = {f"{prefix}.{name}": "cpu" for name, _ in backbone.named_children() if name != layers}
    places |= {
        f"{prefix}.{layers}.{i}": "disk" if i in (1, 2) else "cpu" for i in range(len(getattr(backbone, layers)))
    }
    return places | {"lm_head": "cpu"}


def on_disk(path, scratch):
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, device_map=device_map(path), offload_folder=str(scratch)
    )


def in_memory(path, scratch):
    return cpu_offload(plain(path), execution_device=torch.device("cpu"))


PLACES = {"disk": on_disk, "memory": in_memory}
OPTIONS = {"hub": {}, "mixture": {"output": "mixture"}, "gates alone": {"output": "mixture", "num_stitches": 0}}


def offloaded(model):
    return sum(parameter.device.type == "meta" for parameter in model.parameters())


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_offloaded_expert(folder, tmp_path, arch, place, options):
    """An expert whose layers wait elsewhere computes what it would in memory, cached too, and stays where it is."""
    expert = PLACES[place](folder / arch, tmp_path)
    waiting = offloaded(expert)
    assert waiting
    model = get_peft_model(plain(folder / "llama"), StitchConfig(task_type="CAUSAL_LM", **OPTIONS[options]))
    model.attach_expert("a", expert)
    randomize(model).eval()
    expected = expected_logits(model, plain(folder / "llama"), {"a": plain(folder / arch)}, attention_mask=LEFT)
    assert_near(logits(model, attention_mask=LEFT), expected, 1e-5)
    model.to("cpu")
    assert offloaded(expert) == waiting
    assert torch.equal(model.detach_expert("a")(IDS).logits, PLACES[place](folder / arch, tmp_path)(IDS).logits)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_offloaded_hub(folder, tmp_path, arch, place, options):
    """The same for the hub; its stitches are not offloaded, and can be trained."""
    hub = PLACES[place](folder / arch, tmp_path)
    config = StitchConfig(task_type="CAUSAL_LM", experts={"a": str(folder / "gpt2")}, **OPTIONS[options])
    model = get_peft_model(hub, config)
    randomize(model)
    experts = {"a": plain(folder / "gpt2")}
    assert_near(logits(model.eval()), expected_logits(model, plain(folder / arch), experts), 1e-5)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(
        p.device.type == "cpu" and p.grad is not None for p in model.parameters() if p.requires_grad
    )
    unloaded = model.eval().unload()
    assert offloaded(unloaded) and torch.equal(
        unloaded(IDS).logits, PLACES[place](folder / arch, tmp_path)(IDS).logits
    )


def save_stitched(folder, tmp_path, options="hub", **experts):
    config = StitchConfig(task_type="CAUSAL_LM", experts=experts, **OPTIONS[options])
    model = get_peft_model(plain(folder / "llama"), config)
    randomize(model).eval().save_pretrained(tmp_path / "adapter")
    return model


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("how", ["auto class", "peft model", "load_adapter"])
def test_load_with_everything_on_disk(folder, tmp_path, how, options):
    """An adapter loads onto an offloaded hub, with experts on disk; generation gives the same tokens."""
    model = save_stitched(folder, tmp_path, options, a=str(folder / "gpt2"), b=str(folder / "llama"))
    config = StitchConfig.from_pretrained(tmp_path / "adapter")
    for name, arch in (("a", "gpt2"), ("b", "llama")):
        config.experts[name] |= {"device_map": device_map(folder / arch), "offload_folder": str(tmp_path / name)}
    options = {"device_map": device_map(folder / "llama"), "offload_folder": str(tmp_path / "hub")}
    if how == "auto class":
        again = AutoPeftModelForCausalLM.from_pretrained(
            tmp_path / "adapter", config=config, dtype=torch.float32, **options
        )
    else:
        hub = on_disk(folder / "llama", tmp_path / "hub")
        if how == "peft model":
            again = PeftModel.from_pretrained(hub, tmp_path / "adapter", config=config)
        else:
            again = get_peft_model(hub, config)
            again.load_adapter(tmp_path / "adapter", "default")
    experts = again.base_model.experts["default"]
    assert all(map(offloaded, (again.get_base_model(), experts["a"].model, experts["b"].model)))
    assert again.get_base_model().hf_device_map == device_map(folder / "llama")
    assert torch.equal(logits(again.eval()), logits(model))
    call = {"input_ids": IDS, "attention_mask": LEFT, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(again.generate(**call), model.generate(**call))
    again.save_pretrained(tmp_path / "again")
    assert StitchConfig.from_pretrained(tmp_path / "again").experts == model.peft_config["default"].experts


def test_lora_on_an_offloaded_hub(folder, tmp_path):
    """A LoRA of an offloaded hub shares the weights that wait on disk."""
    hub = on_disk(folder / "llama", tmp_path)
    model = get_peft_model(hub, StitchConfig(task_type="CAUSAL_LM", experts={"lora": str(folder / "lora")}))
    alone = PeftModel.from_pretrained(plain(folder / "llama"), folder / "lora").eval()
    randomize(model).eval()
    lora = model.base_model.experts["default"]["lora"].model
    assert_near(logits(lora), logits(alone), 1e-6)
    expected = expected_logits(model, plain(folder / "llama"), {"lora": alone.base_model.model})
    assert_near(logits(model), expected, 1e-5)


def test_files_do_not_say_where(folder, tmp_path):
    """Places are about this machine: they are not saved, and a file that names some is not obeyed."""
    model = save_stitched(folder, tmp_path, a={"model": str(folder / "gpt2"), "device_map": "cpu"})
    assert "device_map" in model.peft_config["default"].experts["a"]
    path = tmp_path / "adapter" / "adapter_config.json"
    assert "device_map" not in path.read_text()
    path.write_text(path.read_text().replace('"model": "', f'"offload_folder": "{tmp_path}/evil", "model": "', 1))
    with pytest.warns(UserWarning, match="says where to put experts"):
        config = StitchConfig.from_pretrained(tmp_path / "adapter")
    assert "offload_folder" not in config.experts["a"]


@pytest.mark.slow
def test_more_than_fits(tmp_path):
    """A composition that does not fit in memory loads and generates the right tokens with its layers on disk."""
    config = {"layers": 8, "width": 768, "vocab": 64, "intermediate_size": 3072}
    for seed, name in enumerate(("seed", "code", "math")):
        tiny_model("llama", seed=seed, **config).save_pretrained(tmp_path / name, max_shard_size="40MB")
    experts = {name: str(tmp_path / name) for name in ("code", "math")}
    model = get_peft_model(
        plain(tmp_path / "seed"), StitchConfig(task_type="CAUSAL_LM", experts=experts, gate="token", r=4)
    )
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    randomize(model).save_pretrained(tmp_path / "adapter")
    expected = model.eval().generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
    script = textwrap.dedent(
        """
        import sys, resource, torch
        from peft import AutoPeftModelForCausalLM
        from peft_bts import StitchConfig
        torch.set_num_threads(1)
        folder, limit, spread = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "disk"
        data = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
        resource.setrlimit(resource.RLIMIT_DATA, (data + limit, data + limit))
        config = StitchConfig.from_pretrained(f"{folder}/adapter")
        places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        places |= {f"model.layers.{i}": "disk" for i in range(8)}
        def placement(name):
            return {"device_map": places, "offload_folder": f"{folder}/{name}-offload"} if spread else {}
        for name in config.experts:
            config.experts[name] |= placement(name)
        model = AutoPeftModelForCausalLM.from_pretrained(
            f"{folder}/adapter", config=config, dtype=torch.float32, **placement("seed")
        )
        ids = torch.load(f"{folder}/ids.pt")
        torch.save(model.eval().generate(input_ids=ids, max_new_tokens=4, do_sample=False), f"{folder}/tokens.pt")
        """
    )
    torch.save(IDS, tmp_path / "ids.pt")

    def run(where):
        command = [sys.executable, "-c", script, str(tmp_path), str(size * 7 // 10), where]
        return subprocess.run(command, capture_output=True, text=True)

    whole = run("memory")
    assert whole.returncode != 0 and "memory" in whole.stderr.lower()  # it really does not fit
    spread = run("disk")
    assert spread.returncode == 0, spread.stderr[-2000:]
    assert torch.equal(torch.load(tmp_path / "tokens.pt"), expected)
