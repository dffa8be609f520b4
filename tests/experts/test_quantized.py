"""Frozen models in 4 and 8 bits: as hub and as experts, next to each other and to plain ones.

What is right is what the quantised models compute by themselves: the reference stitches plain forwards of equally
quantised models by the paper's equations.
"""

import functools

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from peft_bts import StitchConfig
from peft_bts.inference.joint_model import JointLinear
from tests.helpers.models import IDS, LEFT, assert_near, expected_logits, logits, randomize
from tests.helpers.zoo import tiny_model


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*MatMul8bitLt.*"),
    pytest.mark.filterwarnings("ignore:.*torchao.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def int8_weight_only():
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


QUANTIZATIONS = {
    "bitsandbytes 4 bit": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
    "bitsandbytes nf4": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "bitsandbytes 8 bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao int8": int8_weight_only,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints of a seed and two experts, and a LoRA of the seed."""
    root = tmp_path_factory.mktemp("quantized")
    for name, seed, arch in (("seed", 0, "llama"), ("code", 1, "llama"), ("math", 2, "qwen3")):
        tiny_model(arch, seed=seed, width=64).save_pretrained(root / name)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(3)
    get_peft_model(AutoModelForCausalLM.from_pretrained(root / "seed"), config).save_pretrained(root / "lora")
    return root


# The 4-bit kernels of CPUs round their inputs to bfloat16, so that differences in the last bit grow.
TOLERANCE = {"bitsandbytes 4 bit": 1e-2, "bitsandbytes nf4": 1e-2, "bitsandbytes 8 bit": 1e-4, "torchao int8": 1e-4}


@functools.cache
def load(path, quantization=None):
    """For the reference, which only reads."""
    return load_anew(path, quantization)


def load_anew(path, quantization=None):
    how = {} if quantization is None else {"quantization_config": QUANTIZATIONS[quantization]()}
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **how)


def stitched(hub, output="hub", **experts):
    model = get_peft_model(hub, StitchConfig(task_type="CAUSAL_LM", num_stitches=3, output=output))
    for name, (expert, how) in experts.items():
        model.attach_expert(name, expert, **how)
    return randomize(model).eval()


@pytest.mark.parametrize("output", ["hub", "mixture"])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("who", ["hub", "expert", "both"])
def test_forward(folder, quantization, who, output):
    """Quantised models beside plain ones compute what they compute alone; stitches are in float32."""
    hub = quantization if who != "expert" else None
    expert = quantization if who != "hub" else None
    how = {} if expert is None else {"quantization_config": QUANTIZATIONS[expert]()}
    model = stitched(load_anew(folder / "seed", hub), output, code=(folder / "code", how), math=(folder / "math", {}))
    experts = {"code": load(folder / "code", expert), "math": load(folder / "math")}
    actual = logits(model, attention_mask=LEFT)[:, -3:]
    expected = expected_logits(model, load(folder / "seed", hub), experts, attention_mask=LEFT)[:, -3:]
    assert_near(actual, expected, TOLERANCE[quantization])
    experts["code"] = load(folder / "code")
    unquantized = expected_logits(model, load(folder / "seed"), experts, attention_mask=LEFT)[:, -3:]
    assert (actual - unquantized).abs().max() > 2 * TOLERANCE[quantization] * unquantized.abs().max()
    stitches = [p for p in model.parameters() if p.requires_grad]
    assert stitches and {p.dtype for p in stitches} == {torch.float32}


@pytest.mark.parametrize("output", ["hub", "mixture"])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_train_save_load(folder, quantization, output, tmp_path):
    """Gradients reach the stitches only; the adapter names experts with their quantisation, and loads as it was."""
    config = QUANTIZATIONS[quantization]()
    code = load_anew(folder / "code", quantization)  # as an object: what it was loaded from and how is noted
    model = stitched(
        load_anew(folder / "seed", quantization),
        output,
        code=(code, {}),
        math=(folder / "math", {"quantization_config": config}),
        plain=(folder / "code", {}),
    )
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not [n for n, p in model.named_parameters() if p.grad is not None and ".stitch_" not in n]

    model.eval()
    alone = logits(load_anew(folder / "code", quantization))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(code.eval()), alone)  # training and saving leave quantised experts what they were
    references = StitchConfig.from_pretrained(tmp_path).experts
    method = {"quant_method": config.to_dict()["quant_method"]}
    assert references["code"]["quantization_config"].items() >= method.items()
    assert references["math"]["quantization_config"].items() >= method.items()
    assert "quantization_config" not in references["plain"]
    again = AutoPeftModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=QUANTIZATIONS[quantization](), dtype=torch.float32
    ).eval()
    assert torch.equal(logits(again), logits(model))
    options = {"max_new_tokens": 5, "do_sample": False}
    tokens = model.generate(input_ids=IDS, **options)
    assert torch.equal(again.generate(input_ids=IDS, **options), tokens)
    if quantization != "bitsandbytes 8 bit":  # which treats a token by what else is in the call: with a cache, nothing
        assert torch.equal(model.generate(input_ids=IDS, use_cache=False, **options), tokens)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_loaded_model_is_the_saved_one(folder, quantization, tmp_path):
    """Saving, before a forward or after, spoils no quantised weights, and neither does loading."""
    how = {"quantization_config": QUANTIZATIONS[quantization]()}
    model = stitched(load_anew(folder / "seed", quantization), code=(folder / "code", how))
    model.save_pretrained(tmp_path / "before")
    expected = logits(model)
    model.save_pretrained(tmp_path / "after")
    assert torch.equal(logits(model), expected)
    for when in ("before", "after"):
        again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / when, dtype=torch.float32, **how)
        assert torch.equal(logits(again.eval()), expected)
    again.state_dict()
    plain = load_anew(folder / "seed", quantization), {"code": load_anew(folder / "code", quantization)}
    assert_near(logits(again), expected_logits(model, *plain), TOLERANCE[quantization])


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_stored_quantized(folder, quantization, tmp_path):
    """A checkpoint that is quantised itself needs no word about it in the reference."""
    load_anew(folder / "code", quantization).save_pretrained(tmp_path / "code")
    expert = AutoModelForCausalLM.from_pretrained(tmp_path / "code", dtype=torch.float32)
    model = stitched(load_anew(folder / "seed"), object=(expert, {}), path=(tmp_path / "code", {}))
    assert all(not ref.get("quantization_config") for ref in model.peft_config["default"].experts.values())
    alone = load(tmp_path / "code")
    logits(alone)  # bitsandbytes' first forward, which repacks weights, is not for two threads at once
    experts = dict.fromkeys(["object", "path"], alone)
    assert_near(logits(model), expected_logits(model, load(folder / "seed"), experts), TOLERANCE[quantization])


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_lora_of_a_quantized_hub(folder, quantization):
    """A LoRA of the hub shares the hub's quantised weights and equals the standalone PeftModel."""
    hub = load_anew(folder / "seed", quantization)
    size = hub.get_memory_footprint()
    model = stitched(hub, lora=(folder / "lora", {}), code=(folder / "code", {}))
    actual = logits(model)
    alone = PeftModel.from_pretrained(load_anew(folder / "seed", quantization), folder / "lora")
    lora = model.base_model.experts["default"]["lora"].model
    assert torch.equal(logits(lora), logits(alone.eval()))
    shared = {p.data_ptr() for p in hub.parameters()}
    own = [p for p in lora.parameters() if p.data_ptr() not in shared]
    assert sum(p.numel() * p.element_size() for p in own) < size / 4
    experts = {"lora": alone.base_model.model, "code": load(folder / "code")}
    expected = expected_logits(model, load(folder / "seed", quantization), experts)
    assert_near(actual, expected, TOLERANCE[quantization])


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_loras_in_one_batch_with_a_quantized_hub(folder, quantization, monkeypatch):
    """Its layers are called once for the rows of all, where they give what each model gives alone.

    8-bit layers may not, which treat a row by what else is in the batch: these experts run by themselves then, and
    this is said.
    """
    model = stitched(load_anew(folder / "seed", quantization), lora=(folder / "lora", {}), again=(folder / "lora", {}))
    together = model.describe_execution().count("one batch with the hub")
    separate = model.describe_execution().count("by itself (a batch of all gives other results")
    assert (together, separate) == (2, 0) or (quantization == "bitsandbytes 8 bit" and separate == 2)
    rows, forward = [], JointLinear.forward
    monkeypatch.setattr(JointLinear, "forward", lambda self, x: rows.append(len(x)) or forward(self, x))
    actual = logits(model, attention_mask=LEFT)[:, -3:]
    assert set(rows) == ({3 * len(IDS)} if together else set())
    alone = PeftModel.from_pretrained(load_anew(folder / "seed", quantization), folder / "lora").eval()
    logits(alone)  # bitsandbytes repacks nf4 weights in the first forward; the reference runs models in two threads
    experts = dict.fromkeys(["lora", "again"], alone.base_model.model)
    expected = expected_logits(model, load(folder / "seed", quantization), experts, attention_mask=LEFT)[:, -3:]
    assert_near(actual, expected, TOLERANCE[quantization])


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("move", ["cpu", "bfloat16", "half"])
def test_to(folder, quantization, move):
    """Moving and casting the whole model does to quantised experts what it does to a quantised hub: no harm."""
    how = {"quantization_config": QUANTIZATIONS[quantization]()}
    model = stitched(load_anew(folder / "seed", quantization), code=(folder / "code", how))
    before = logits(model)
    if move == "cpu":
        model.to("cpu")
        assert torch.equal(logits(model), before)
        return
    dtype = getattr(torch, move)
    model.to(dtype)
    plain = [load_anew(folder / name, quantization) for name in ("seed", "code")]
    hub, expert = (torch.nn.Module.to(m, dtype) for m in plain)  # transformers' own `to` refuses to cast these
    assert_near(logits(model), expected_logits(model, hub, {"code": expert}), 0.15)


def test_bad_quantization(folder):
    """What is no quantisation is refused, and so is one for a loaded model or for a LoRA of the hub."""
    model = stitched(load_anew(folder / "seed"), code=(folder / "code", {}))
    before = logits(model)
    with pytest.raises(ValueError, match=r"'a'.*quantization_config='4bit'.*BitsAndBytesConfig"):
        model.attach_expert("a", folder / "code", quantization_config="4bit")
    with pytest.raises(ValueError, match=r"'a' is a loaded model; \['quantization_config'\]"):
        model.attach_expert("a", load_anew(folder / "code"), quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    with pytest.raises(ValueError, match=r"(?s)'a'.*LoRA on the hub's own weights.*quantization_config"):
        model.attach_expert("a", folder / "lora", quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    assert torch.equal(logits(model), before)
