"""LoRA experts of the hub run with it as rows of one batch: held against the same models run by themselves."""

import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from peft_bts import StitchConfig, trace_gates
from peft_bts.forward.state import run_in_turn
from peft_bts.inference.joint_lora import JointExecutor
from tests.helpers.caches import Device
from tests.helpers.models import FAMILIES, IDS, LEFT, MASKS, assert_near, expected_logits, fresh, logits, randomize
from tests.helpers.zoo import ARCHITECTURES


# Position biases of their attention have a row for each head: they run by themselves.
ALIBI = ["bloom", "mpt"]
# PEFT's "all-linear" trains the weights of their mixture's experts, which are no linear layers.
MIXTURES = ["mixtral", "qwen3_moe", "deepseek_v3", "qwen3_next"]
# Caches of recurrent layers are not put together; without a cache they run as one batch.
RECURRENT = ["lfm2", "bamba"]
JOINT = [arch for arch in ARCHITECTURES if arch not in ALIBI + MIXTURES + RECURRENT]
RANKS = {"code": {"r": 4, "lora_alpha": 16}, "math": {"r": 6, "lora_alpha": 3, "use_rslora": True}}


def lora(folder, name, arch="llama", dtype=torch.float64, **options):
    """Save a LoRA of the hub in `folder`; return the plain model with it, which the reference runs."""
    torch.manual_seed(sum(map(ord, name)))
    seed = AutoModelForCausalLM.from_pretrained(folder / "hub", dtype=dtype)
    options = {"target_modules": "all-linear", "r": 4, "init_lora_weights": False, **RANKS.get(name, {}), **options}
    model = get_peft_model(seed, LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    model.save_pretrained(folder / name)
    return model.get_base_model()  # with the LoRA in its layers


def make(folder, arch="llama", dtype=torch.float64, others=None, loras=("code", "math"), attach=None, **config):
    """A hub with LoRA experts, and others; and plain copies of all for the reference."""
    fresh(arch).to(dtype).save_pretrained(folder / "hub")
    plain = {name: lora(folder, name, arch, dtype, **(attach or {}).get(name, {})) for name in loras}
    hub = AutoModelForCausalLM.from_pretrained(folder / "hub", dtype=dtype)
    config = StitchConfig(
        task_type="CAUSAL_LM", **{"num_stitches": 2, "experts": {name: str(folder / name) for name in loras}, **config}
    )
    model = get_peft_model(hub, config, autocast_adapter_dtype=False)
    for name, expert in (others or {}).items():
        model.attach_expert(name, expert.to(dtype))
    return randomize(model).eval(), AutoModelForCausalLM.from_pretrained(folder / "hub", dtype=dtype).eval(), plain


@pytest.fixture
def joint_forwards(monkeypatch):
    """A list that grows with every forward of a batch of all."""
    made, run_hub = [], JointExecutor.run_hub

    def note(self, hub):
        if self._state.composition.schedule or self._state.composition.mixture:  # no check at attaching
            made.append(self)
        return run_hub(self, hub)

    monkeypatch.setattr(JointExecutor, "run_hub", note)
    return made


def precision(arch):
    """The dtype to compare in, and the tolerance: a mixture's kernel after loading knows no float64."""
    return (torch.float32, 1e-4) if arch == "gpt_oss" else (torch.float64, 1e-10)


def alone(model, function):
    """What `function` returns while every expert runs by itself."""
    forward = model.base_model._forward
    before, forward.make_executor = forward.make_executor, run_in_turn
    try:
        return function()
    finally:
        forward.make_executor = before


@pytest.mark.parametrize("mask", ["full", "left"])
@pytest.mark.parametrize("arch", JOINT)
def test_equals_the_reference(arch, mask, tmp_path, joint_forwards):
    if arch == "gemma2" and mask == "left":
        pytest.skip("float64 and padding give NaN in transformers' own gemma2")
    dtype, tolerance = precision(arch)
    model, hub, plain = make(tmp_path, arch, dtype)
    got = logits(model, attention_mask=MASKS[mask])
    assert joint_forwards
    assert_near(got, expected_logits(model, hub, plain, attention_mask=MASKS[mask]), tolerance)


@pytest.mark.parametrize("arch", JOINT)
def test_token_by_token(arch, tmp_path, joint_forwards):
    dtype, tolerance = precision(arch)
    model, _, _ = make(tmp_path, arch, dtype)

    def decode():
        cache, found = DynamicCache(config=model.get_base_model().config), []
        with torch.no_grad():
            for part in (IDS[:, :7], *IDS[:, 7:].split(1, dim=1)):
                found.append(model(input_ids=part, past_key_values=cache).logits)
        return torch.cat(found, dim=1)

    got = decode()
    assert len(joint_forwards) == 6
    assert_near(got, alone(model, decode), tolerance)


@pytest.mark.parametrize("arch", [*ALIBI, *MIXTURES, *RECURRENT])
def test_what_runs_by_itself(arch, tmp_path, joint_forwards):
    """It is said why, and the results are right."""
    model, hub, plain = make(tmp_path, arch, torch.float32)
    got = logits(model)
    assert not joint_forwards
    assert_near(got, expected_logits(model, hub, plain), 1e-4)
    if arch not in RECURRENT:
        assert model.describe_execution().count("by itself") == 2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"do_sample": True, "top_k": 5},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2},
        {"use_cache": False},
        {"max_active_experts": 1},
        {"num_return_sequences": 2, "do_sample": True},
    ],
)
@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2"])
def test_generate(arch, options, tmp_path):
    model, _, _ = make(tmp_path, arch, torch.float32)
    rows = IDS[:1] if "prompt_lookup_num_tokens" in options else IDS
    mask = None if len(rows) == 1 else LEFT

    def run():
        torch.manual_seed(0)
        return model.generate(input_ids=rows, attention_mask=mask, max_new_tokens=8, pad_token_id=0, **options)

    assert torch.equal(run(), alone(model, run))


def test_beside_a_full_expert(tmp_path, joint_forwards):
    full = {"big": fresh("gpt2", width=48, layers=6)}
    model, hub, plain = make(tmp_path, others=full)
    assert "big: by itself (it is a full model)" in model.describe_execution()
    plain["big"] = fresh("gpt2", width=48, layers=6).double()
    got = logits(model)
    assert len(joint_forwards) == 1
    assert_near(got, expected_logits(model, hub, plain), 1e-10)


@pytest.mark.parametrize(
    "config",
    [
        {"pattern": "experts_into_hub"},
        {"expert_streams": "projected"},
        {"num_stitches": 4},
        {"num_stitches": 1},
        {"output": "mixture"},
        {"output": "mixture", "num_stitches": 0},
        {"output": "mixture", "num_stitches": 0, "evidence": 0.8},
    ],
)
def test_patterns(config, tmp_path, joint_forwards):
    model, _, _ = make(tmp_path, **config)
    got = logits(model)
    assert joint_forwards
    assert_near(got, alone(model, lambda: logits(model)), 1e-10)


def test_experts_that_are_left_out_have_no_rows(tmp_path, joint_forwards):
    model, _, _ = make(tmp_path)
    with model.set_active_experts(["math"]):
        got = logits(model)
        assert list(joint_forwards[-1].rows) == ["math"] and joint_forwards[-1].number_of_rows == 2 * len(IDS)
        assert_near(got, alone(model, lambda: logits(model)), 1e-10)
    model.detach_expert("code")
    assert_near(logits(model), got, 1e-10)


@pytest.mark.parametrize("config", [{}, {"output": "mixture", "num_stitches": 0}, {"expert_streams": "projected"}])
@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_dropped_experts_have_no_rows(arch, config, tmp_path, joint_forwards):
    """Sequences drop different experts, which catch up by themselves when they are called back."""
    model, _, _ = make(tmp_path, arch, loras=("code", "law", "math"), **config)
    torch.manual_seed(3)
    ids = torch.randint(0, 64, (3, 30))

    def decode():
        cache, found = DynamicCache(config=model.get_base_model().config), []
        with torch.no_grad(), model.drop_experts(1):
            for part in (ids[:, :4], *ids[:, 4:].split(1, dim=1)):
                found.append(model(input_ids=part, past_key_values=cache).logits)
        return torch.cat(found, dim=1)

    got = decode()
    sizes = [executor.number_of_rows for executor in joint_forwards]
    assert sizes[0] == 4 * len(ids) and set(sizes[1:]) <= {4, 5, 6} and 6 in sizes[1:]
    assert any(len(executor.rows) == 2 for executor in joint_forwards[1:])
    assert_near(got, alone(model, decode), 1e-10)


@pytest.mark.parametrize("family", [arch for arch in FAMILIES if arch in JOINT])
def test_training_is_as_ever(family, tmp_path, joint_forwards):
    model, _, _ = make(tmp_path, family, torch.float32)
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert not joint_forwards


@pytest.mark.parametrize(
    "options, why",
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "beyond decoder layers"),
    ],
)
def test_adapters_that_run_by_themselves(options, why, tmp_path, joint_forwards):
    model, hub, plain = make(tmp_path, attach={"math": options})
    assert "math: by itself (its LoRA" in model.describe_execution() and why in model.describe_execution()
    got = logits(model)
    assert list(joint_forwards[0].rows) == ["code"]
    assert_near(got, expected_logits(model, hub, plain), 1e-10)


def test_a_lora_of_another_model(tmp_path):
    model, _, _ = make(tmp_path)
    other = get_peft_model(
        fresh("llama", seed=5).double(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    )
    model.attach_expert("other", other)
    assert "other: by itself (it is an adapter on a model of its own)" in model.describe_execution()


def test_exchanged_modules_are_noticed(tmp_path, joint_forwards):
    """An expert that somebody changes runs by itself, and what it has become counts."""
    model, _, _ = make(tmp_path)
    before = logits(model)
    expert = model.base_model.experts["default"]["code"]
    expert.layers[0].mlp.up_proj = expert.layers[0].mlp.up_proj.get_base_layer()
    count = len(joint_forwards)
    changed = logits(model)
    assert len(joint_forwards) == count and not torch.equal(changed, before)
    assert torch.equal(changed, alone(model, lambda: logits(model)))


def test_hidden_states_are_collected(tmp_path):
    model, _, _ = make(tmp_path)
    got = model(input_ids=IDS, output_hidden_states=True).hidden_states
    want = alone(model, lambda: model(input_ids=IDS, output_hidden_states=True).hidden_states)
    assert len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want))


def test_traced_in_threads_and_compiled(tmp_path):
    model, _, _ = make(tmp_path)
    want = logits(model)
    with trace_gates(model) as trace:
        assert torch.equal(logits(model), want)
    assert len(trace.sequences) == len(IDS)
    found = []
    threads = [threading.Thread(target=lambda: found.append(logits(model))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got, want) for got in found) and len(found) == 4


@pytest.mark.slow
def test_compiled_without_recompilation(tmp_path):
    """One graph for a token, with a static cache, whatever the place of the token."""
    model, _, _ = make(tmp_path, dtype=torch.float32)
    want = logits(model)
    cache = StaticCache(config=model.get_base_model().config, max_cache_len=16)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    with torch.no_grad():
        model(input_ids=IDS[:, :7], past_key_values=cache)
        step = torch.compile(model, fullgraph=True, backend=count)
        for i in range(7, 12):
            got = step(input_ids=IDS[:, i : i + 1], past_key_values=cache, position_ids=torch.tensor([[i]])).logits
            assert_near(got[:, 0], want[:, i], 1e-4)
    assert len(graphs) <= 2


def test_a_hub_with_trained_embeddings(tmp_path, joint_forwards):
    """What the hub has trained besides is the hub's alone: its LoRA experts read the seed's embeddings."""
    model, _, _ = make(tmp_path, loras=("code",), modules_to_save=["embed_tokens"])
    model.attach_expert("math", str(tmp_path / "code"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens.modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    assert "math: by itself (the hub has trained modules" in model.describe_execution()
    got = logits(model)
    assert not joint_forwards and torch.equal(got, alone(model, lambda: logits(model)))


@pytest.mark.parametrize("who", ["hub", "expert"])
def test_hooks_of_users_are_called(who, tmp_path, joint_forwards):
    """Probes and steering see the rows of their own model; without them, all is as before."""
    model, _, _ = make(tmp_path)
    hub, expert = model.get_base_model(), model.base_model.experts["default"]["code"].model.get_base_model()
    layers, shapes = (hub if who == "hub" else expert).model.layers, []

    def note(module, args, output):
        shapes.append((output[0] if isinstance(output, tuple) else output).shape)

    want = logits(model)
    hooks = [part.register_forward_hook(note) for part in (layers[0].mlp, layers[2], layers[1].self_attn.o_proj)]
    joint_forwards.clear()
    assert_near(logits(model), want, 1e-10)
    assert shapes == [(*IDS.shape, 32)] * 3 and not joint_forwards
    for hook in hooks:
        hook.remove()
    logits(model)
    assert joint_forwards


def test_bfloat16(tmp_path, joint_forwards):
    """LoRAs have their part in half precision as well; the check at attaching would tell if one were left out."""
    model, _, _ = make(tmp_path, dtype=torch.bfloat16)
    found = logits(model)
    assert joint_forwards
    model.base_model._forward.settings.make_executor = run_in_turn
    assert_near(found.float(), logits(model).float(), 0.03)


def test_an_adapter_that_a_batch_leaves_out_is_noticed_in_bfloat16(tmp_path, monkeypatch):
    monkeypatch.setattr("peft_bts.inference.joint_model._add_lora", lambda *args: None)
    model, _, _ = make(tmp_path, dtype=torch.bfloat16)
    assert "gives other results" in model.describe_execution()


def test_layers_that_fail_in_a_batch(tmp_path, monkeypatch):
    """Whatever is wrong, the experts are attached, and run by themselves."""

    def fail(self, hub):
        raise AttributeError("no attribute")

    monkeypatch.setattr(JointExecutor, "run_hub", fail)
    model, hub, plain = make(tmp_path)
    assert "code: by itself (a batch of all fails: no attribute)" in model.describe_execution()
    assert_near(logits(model), expected_logits(model, hub, plain), 1e-5)


def test_an_offloaded_cache_is_offloaded(tmp_path, monkeypatch, joint_forwards):
    """On a device that is made up. Every model updates its own cache, which sees to one layer at a time."""
    model, _, _ = make(tmp_path, dtype=torch.float32)
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 4, "do_sample": False}
    expected = model.generate(input_ids=IDS, **options)
    assert joint_forwards
    del joint_forwards[:]
    device = Device(monkeypatch)
    assert torch.equal(model.generate(input_ids=IDS, cache_implementation="offloaded", **options), expected)
    assert device.away > 4 and not joint_forwards


def test_a_filled_dynamic_cache_compiles(tmp_path):
    model, _, _ = make(tmp_path, dtype=torch.float32)
    cache, plain_cache = DynamicCache(config=model.config), DynamicCache(config=model.config)
    with torch.no_grad():
        for one in (cache, plain_cache):
            model(input_ids=IDS, past_key_values=one)
        expected = model(input_ids=IDS[:, :1], past_key_values=plain_cache).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert_near(compiled(input_ids=IDS[:, :1], past_key_values=cache).logits, expected, 1e-5)
    torch._dynamo.reset()
