"""Experts of one architecture as one batch, over stacked weights: as apart, but for rounding."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache

from peft_bts import StitchConfig
from tests.helpers.generation import NAMES, decode
from tests.helpers.models import IDS, LEFT, assert_near, cache_layers, fresh, logits, randomize, stitch


STACKABLE = ["llama", "gemma2", "gpt2", "gpt_neox", "mixtral"]


def three(arch="llama", dtype=torch.float64, **config):
    experts = {name: fresh(arch, seed=i).to(dtype) for i, name in enumerate(NAMES, 1)}
    return stitch(fresh(arch).to(dtype), experts, autocast_adapter_dtype=False, **config)


def from_folder(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)


def expert(model, name):
    return model.base_model.experts["default"][name].model


def runs_alone(model):
    """Whether some expert's own layers run while it decodes."""
    alone = []
    hooks = [
        layer.register_forward_pre_hook(lambda *_: alone.append(1))
        for name in model.base_model.experts["default"]
        for layer in model.base_model.experts["default"][name].layers
    ]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=IDS[:, :6], past_key_values=cache)
        alone.clear()
        model(input_ids=IDS[:, 6:7], past_key_values=cache)
    for hook in hooks:
        hook.remove()
    return bool(alone)


def storages(model):
    """Bytes of all weights, each storage once."""
    found = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(found.values())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("arch", STACKABLE)
def test_the_same_but_for_rounding(arch, threads):
    # gemma2 itself gives NaN for padding in float64.
    dtype, tolerance = (torch.float32, 1e-5) if arch == "gemma2" else (torch.float64, 1e-12)
    model = three(arch, dtype)
    want, plain, size = decode(model), logits(model), storages(model)
    with model.parallel_streams(threads, stack=True):
        assert not runs_alone(model)
        assert_near(decode(model), want, tolerance)
        assert torch.equal(logits(model), plain)  # prompts run apart
        assert storages(model) == size
    assert storages(model) == size
    assert runs_alone(model)
    assert torch.equal(decode(model), want)


@pytest.mark.parametrize(
    "config",
    [
        {"pattern": "experts_into_hub"},
        {"expert_streams": "projected"},
        {"num_stitches": 1},
        {"r": 4},
        {"output": "mixture"},
        {"output": "mixture", "num_stitches": 0},
    ],
    ids=str,
)
def test_patterns(config):
    model = three(**config)
    want = decode(model)
    with model.parallel_streams(stack=True):
        assert not runs_alone(model)
        assert_near(decode(model), want, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype):
    model = three(dtype=dtype)
    want = decode(model)
    with model.parallel_streams(stack=True):
        assert not runs_alone(model)
        assert_near(decode(model).double(), want.double(), 64 * torch.finfo(dtype).eps)


def test_many_tokens():
    # Caches grow by one token after the other, in one piece of memory for all experts, or not any more.
    model = three()
    ids = torch.randint(3, 64, (1, 40), generator=torch.Generator().manual_seed(1))
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    with torch.no_grad():
        want = [model(input_ids=ids[:, i : i + 1], past_key_values=caches[0]).logits for i in range(40)]
        with model.parallel_streams(1, stack=True):
            for i in range(40):
                got = model(input_ids=ids[:, i : i + 1], past_key_values=caches[1]).logits
                assert_near(got, want[i], 1e-12)
                if i == 20:
                    caches[1].crop(-3)
                    model(input_ids=ids[:, 18:21], past_key_values=caches[1])
                if i == 30:
                    caches[1] = copy.deepcopy(caches[1])
    for one, other in zip(cache_layers(caches[0]), cache_layers(caches[1]), strict=True):
        assert_near(one.keys, other.keys, 1e-12)


def test_generate():
    model = three()
    options = {"attention_mask": LEFT[:1], "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    for more in ({}, {"num_beams": 2}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}):
        want = model.generate(input_ids=IDS[:1], **options, **more)
        with model.parallel_streams(2, stack=True):
            assert torch.equal(model.generate(input_ids=IDS[:1], **options, **more), want)


def test_experts_of_several_architectures():
    archs = {"a": "gpt2", "b": "llama", "c": "llama", "d": "llama"}
    experts = {name: fresh(arch, seed=i).double() for i, (name, arch) in enumerate(archs.items())}
    model = stitch(fresh("llama").double(), experts, autocast_adapter_dtype=False)
    want = decode(model)
    with model.parallel_streams(stack=True):
        (stack,) = model.base_model._forward.settings.make_executor.stacks
        assert list(stack.experts) == ["b", "c", "d"]
        assert_near(decode(model), want, 1e-12)


@pytest.mark.parametrize("arch, why", [("bloom", "beside hidden states"), ("bamba", "BambaMixer has weights")])
def test_what_cannot_be_stacked(arch, why):
    model = three(arch, torch.float32)
    want, size = decode(model), storages(model)
    with pytest.raises(ValueError, match=why), model.parallel_streams(stack=True):
        pass
    assert storages(model) == size and torch.equal(decode(model), want)
    with model.parallel_streams(2):  # nothing is left on
        assert torch.equal(decode(model), want)


def test_nothing_to_stack():
    one = stitch(fresh("llama"), {"a": fresh("llama", seed=1)})
    with pytest.raises(ValueError, match="there is only 'a'"), one.parallel_streams(stack=True):
        pass
    unlike = stitch(fresh("llama"), {"a": fresh("llama", seed=1), "b": fresh("gpt2", seed=2)})
    with pytest.raises(ValueError, match="'a' and 'b': their architectures"), unlike.parallel_streams(stack=True):
        pass
    with pytest.raises(ValueError, match="at least 1"), three().parallel_streams(0, stack=True):
        pass


def test_layers_that_read_weights_past_their_modules():
    class Reads(torch.nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.inner, self.first = mlp, [mlp.down_proj]

        def forward(self, x):
            return self.inner(x) + F.linear(F.linear(x, self.first[0].weight.T), self.first[0].weight)

    model = three()
    for name in NAMES:
        expert(model, name).model.layers[1].mlp = Reads(expert(model, name).model.layers[1].mlp)
    other = pytest.raises(ValueError, match="layer 1 of a batch of all gives other results")
    with other, model.parallel_streams(stack=True):
        pass


def test_changed_weights():
    model = three()
    with model.parallel_streams(2, stack=True):
        with torch.no_grad():
            expert(model, "lang").model.layers[0].mlp.up_proj.weight.mul_(2)  # in place: the stack has it too
        assert not runs_alone(model)
        got = decode(model)
    assert_near(got, decode(model), 1e-12)
    with model.parallel_streams(2, stack=True):
        model.float()  # other storage: they run apart
        assert runs_alone(model)
        got = decode(model)
    assert torch.equal(got, decode(model))


def replace_weight(expert):
    up = expert.model.layers[0].mlp.up_proj
    up.weight = torch.nn.Parameter(3 * up.weight.detach(), requires_grad=False)


def load_state(expert):
    expert.load_state_dict({name: 2 * tensor for name, tensor in expert.state_dict().items()}, assign=True)


def replace_module(expert):
    expert.model.layers[0].mlp = copy.deepcopy(expert.model.layers[1].mlp)


def add_lora(expert):
    get_peft_model(expert, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False))


@pytest.mark.parametrize("change", [replace_weight, load_state, replace_module, add_lora])
def test_replaced_parts(change):
    model = three()
    before = decode(model)
    with model.parallel_streams(1, stack=True):
        change(expert(model, "lang"))
        got = decode(model)
    assert torch.equal(got, decode(model)) and not torch.equal(got, before)


@pytest.mark.parametrize("change", ["set_adapter", "merge_adapter", "disable_adapter_layers", "set_scale"])
def test_adapters_of_an_expert_change(change):
    experts = {}
    for i, name in enumerate(NAMES):
        torch.manual_seed(i)
        lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=False)
        experts[name] = get_peft_model(fresh("llama").double(), lora)
        experts[name].add_adapter("two", lora)
    model = stitch(fresh("llama").double(), experts, autocast_adapter_dtype=False)
    before = decode(model)
    with model.parallel_streams(1, stack=True):
        assert not runs_alone(model)
        tuner = experts["lang"].base_model
        if change == "set_scale":
            tuner.model.model.layers[0].self_attn.q_proj.set_scale("default", 5.0)
        else:
            getattr(tuner, change)(*["two"] * (change == "set_adapter"))
        got = decode(model)
    assert torch.equal(got, decode(model))
    assert change == "merge_adapter" or not torch.equal(got, before)


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        model = three()
        want = decode(model)
    with pytest.raises(ValueError, match="inference mode"), model.parallel_streams(1, stack=True):
        pass
    with torch.inference_mode():
        assert torch.equal(decode(model), want)


def test_no_memory(monkeypatch):
    model = three("gpt2", torch.float32)
    want, stack, calls = decode(model), torch.stack, []

    def fails_at_the_fourth(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise MemoryError
        return stack(*args, **kwargs)

    sizes = [p.untyped_storage().nbytes() for p in model.parameters()]
    monkeypatch.setattr(torch, "stack", fails_at_the_fourth)
    with pytest.raises(MemoryError), model.parallel_streams(1, stack=True):
        pass
    monkeypatch.undo()
    assert [p.untyped_storage().nbytes() for p in model.parameters()] == sizes
    assert torch.equal(decode(model), want)
    with model.parallel_streams(1, stack=True):
        assert not runs_alone(model)


def test_settings_outside_of_configs():
    class Scaled(torch.nn.Module):
        def __init__(self, inner, by):
            super().__init__()
            self.inner, self.by = inner, torch.tensor(by, dtype=torch.bfloat16)

        def forward(self, x):
            return self.inner(x) * self.by

    model = three(dtype=torch.bfloat16)
    for name, by in zip(NAMES, (1.0, 0.8, 0.8)):
        for layer in expert(model, name).model.layers:
            layer.mlp = Scaled(layer.mlp, by)
    with pytest.raises(ValueError, match="gives other results"), model.parallel_streams(1, stack=True):
        pass


def test_other_tokenizers():
    model = three()
    expert(model, "code").config.eos_token_id = 7
    with model.parallel_streams(1, stack=True):
        assert not runs_alone(model)


def test_other_experts_meanwhile():
    model = three()
    with model.parallel_streams(2, stack=True):
        model.set_active_experts(["code", "lang"])
        two = decode(model)
        model.set_active_experts(None)
        model.attach_expert("more", fresh("llama", seed=9).double())
        assert runs_alone(model)  # the new one
        four = decode(model)
        model.detach_expert("lang")
        assert runs_alone(model)
        left = decode(model)
    assert torch.equal(left, decode(model))
    assert len({two.sum().item(), four.sum().item(), left.sum().item()}) == 3


def test_left_out_experts_run_apart():
    model = three()
    with model.drop_experts(max_active_experts=1):
        want = decode(model)
        with model.parallel_streams(1, stack=True):
            assert torch.equal(decode(model), want)


def test_lora_experts_share_the_weights_of_the_seed(tmp_path):
    fresh("llama").double().save_pretrained(tmp_path / "seed")
    for i, name in enumerate(NAMES, 1):
        torch.manual_seed(i)
        lora = LoraConfig(task_type="CAUSAL_LM", r=4 - (i == 3), target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(from_folder(tmp_path / "seed"), lora).save_pretrained(tmp_path / name)
    config = StitchConfig(task_type="CAUSAL_LM", experts={name: str(tmp_path / name) for name in NAMES})
    model = randomize(get_peft_model(from_folder(tmp_path / "seed"), config, autocast_adapter_dtype=False)).eval()
    want, size = decode(model), storages(model)
    with model.parallel_streams(stack=True):
        (stack,) = model.base_model._forward.settings.make_executor.stacks
        assert list(stack.experts) == ["code", "lang"]  # "math" has another rank
        assert_near(decode(model), want, 1e-12)
        assert storages(model) == size
    with model.parallel_streams(3):
        assert torch.equal(decode(model), want)
    with model.drop_experts(max_active_experts=3):
        assert_near(decode(model), want, 1e-12)


def test_copies_run_apart():
    model = three()
    want = decode(model)
    with model.parallel_streams(1, stack=True):
        twin = copy.deepcopy(model)
        assert runs_alone(twin) and torch.equal(decode(twin), want)
        with twin.parallel_streams(1, stack=True):
            assert not runs_alone(twin)
    assert torch.equal(decode(twin), want)


def test_gradients_and_autocast():
    model = three(dtype=torch.float32)
    with model.parallel_streams(1, stack=True):
        cache = DynamicCache(config=model.config)
        model(input_ids=IDS[:, :1], past_key_values=cache, labels=IDS[:, :1])
        model(input_ids=IDS, labels=IDS).loss.backward()
    with torch.inference_mode(), model.parallel_streams(1, stack=True):
        assert not runs_alone(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = decode(model)
        with model.parallel_streams(1, stack=True):
            assert not runs_alone(model)
            assert_near(decode(model).float(), want.float(), 0.2)
