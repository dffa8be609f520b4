"""TRL's trainers take a `StitchConfig` for a `peft_config`; their losses are those of the reference."""

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from peft_bts import StitchConfig
from peft_bts.forward import mixed_head
from tests.helpers.models import IDS, expected_logits, fresh, logits, pristine, stitch
from tests.helpers.text import save_model, word_tokenizer


trl = pytest.importorskip("trl", reason="TRL needs Python 3.11")

EXPERTS = {"code": ("llama", {"seed": 1, "width": 48}), "math": ("qwen3", {"seed": 2, "layers": 6})}
TOKENIZER = word_tokenizer()
DOCUMENTS = ["w3 w4 w5 w6 w7", "w9 w8 w7", "w20 w21 w22 w23 w24 w25 w26", "w5 w5 w9 w30"]
COMPLETIONS = [("w3 w4 w5", " w6 w7"), ("w9", " w8 w7 w6 w40"), ("w10 w11", " w12")]
PREFERENCES = [(p, c, f" w{i}{c}") for i, (p, c) in enumerate(COMPLETIONS, 50)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, (arch, options) in {"seed": ("llama", {}), **EXPERTS}.items():
        save_model(root / name, arch, **options)
    return root


def paths(root):
    return {name: str(root / name) for name in EXPERTS}


def config(root, **options):
    return StitchConfig(task_type="CAUSAL_LM", experts=paths(root), num_stitches=4, **options)


def arguments(kind, folder, **options):
    options = {"max_steps": 2, "per_device_eval_batch_size": 8, "learning_rate": 1e-2, "save_strategy": "no"} | options
    return kind(output_dir=str(folder), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, **options)


def ids(text):
    return TOKENIZER(text)["input_ids"]


def reference_logits(model, tokens, adapter=True):
    """Of a sequence of tokens by itself; without the adapter, the seed's."""
    tokens = torch.tensor([tokens])
    if not adapter:
        return logits(pristine("llama"), tokens)[0]
    experts = {name: pristine(arch, **o) for name, (arch, o) in EXPERTS.items()}
    return expected_logits(model, pristine("llama"), experts, tokens)[0]


def log_probs(model, given, predicted, **kwargs):
    """Of each of the `predicted` tokens behind the `given` ones."""
    tokens = [*given, *predicted]
    log_probs = reference_logits(model, tokens, **kwargs).log_softmax(-1)[len(given) - 1 : -1]
    return log_probs[torch.arange(len(predicted)), predicted]


def reference_loss(model, sequences):
    return -torch.cat([log_probs(model, given, predicted) for given, predicted in sequences]).mean().item()


def sft(model, folder, rows, peft_config=None, **options):
    """A trainer that has trained two steps on the rows, which it evaluates in one batch."""
    options = {"max_length": 16} | options
    data = Dataset.from_list(rows)
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments(trl.SFTConfig, folder, **options),
        train_dataset=data,
        eval_dataset=data,
        processing_class=TOKENIZER,
        peft_config=peft_config,
    )
    trainer.train()
    return trainer


def test_sft_from_a_path(root, tmp_path):
    """With TRL's defaults: only stitches are trained, and the folder that is saved gives the model back."""
    trainer = sft(str(root / "seed"), tmp_path, [{"text": text} for text in DOCUMENTS], config(root))
    sequences = [(tokens[:1], tokens[1:]) for tokens in (ids(f"{text} <end>") for text in DOCUMENTS)]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(reference_loss(trainer.model, sequences), rel=1e-4)
    trainable = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in trainer.model.named_parameters() if ".stitch_" in name}
    trainer.save_model()
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded.eval()), logits(trainer.model.eval()))


def test_sft_of_completions(root, tmp_path):
    """A model object, and a loss that leaves the prompts out."""
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in COMPLETIONS]
    seed = AutoModelForCausalLM.from_pretrained(root / "seed")
    trainer = sft(seed, tmp_path, rows, config(root, gate="token", r=4))
    sequences = [(ids(prompt), ids(f"{completion} <end>")) for prompt, completion in COMPLETIONS]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(reference_loss(trainer.model, sequences), rel=1e-4)


def test_sft_of_assistants(root, tmp_path):
    """Chats, and a loss that leaves the user's turns out; on a model that is stitched already."""
    chats = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion.strip()}]
        for prompt, completion in COMPLETIONS
    ]
    model = stitch(fresh("llama"), {name: fresh(arch, **o) for name, (arch, o) in EXPERTS.items()})
    trainer = sft(model, tmp_path, [{"messages": chat} for chat in chats], assistant_only_loss=True)
    sequences = [(ids(f"user {prompt} assistant"), ids(f"{completion} <end>")) for prompt, completion in COMPLETIONS]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(reference_loss(trainer.model, sequences), rel=1e-4)


def test_sft_packed(root, tmp_path):
    """Documents in one row see nothing of each other, in no model: their losses are those of each by itself."""
    rows = [{"text": text} for text in DOCUMENTS]
    trainer = sft(str(root / "seed"), tmp_path, rows, config(root), packing=True)
    assert len(trainer.eval_dataset) < len(rows)
    sequences = [(tokens[:1], tokens[1:]) for tokens in (ids(f"{text} <end>") for text in DOCUMENTS)]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(reference_loss(trainer.model, sequences), rel=1e-4)


MIXTURES = {
    "alone": {"num_stitches": 0},
    "stitched": {"num_stitches": 2, "gate": "token", "r": 4},
    "evidence": {"num_stitches": 0, "evidence": 0.8},
}


@pytest.mark.parametrize("options", MIXTURES)
def test_sft_of_a_mixture(options, root, tmp_path):
    """TRL's fused head would read the weight of the hub's head; its loss is the mixture's all the same."""
    mixture = StitchConfig(task_type="CAUSAL_LM", experts=paths(root), output="mixture", **MIXTURES[options])
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in COMPLETIONS]
    trainer = sft(str(root / "seed"), tmp_path, rows, mixture, max_steps=30, logging_steps=1, learning_rate=0.1)
    sequences = [(ids(prompt), ids(f"{completion} <end>")) for prompt, completion in COMPLETIONS]
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(reference_loss(trainer.model, sequences), rel=1e-4)
    expected = torch.cat([reference_logits(trainer.model, [*g, *p])[len(g) - 1 : -1] for g, p in sequences])
    assert metrics["eval_entropy"] == pytest.approx(-(expected.exp() * expected).sum(-1).mean().item(), rel=1e-4)
    hits = expected.argmax(-1) == torch.cat([torch.tensor(p) for _, p in sequences])
    assert metrics["eval_mean_token_accuracy"] == pytest.approx(hits.float().mean().item())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    trainer.save_model()
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded.eval()), logits(trainer.model.eval()))
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert options == "stitched" or all("stitch_output" in key for key in keys)


def test_dft_of_a_mixture(root, tmp_path):
    """A loss of TRL's own, made of the log probabilities."""
    mixture = StitchConfig(task_type="CAUSAL_LM", experts=paths(root), output="mixture", num_stitches=0)
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in COMPLETIONS]
    trainer = sft(str(root / "seed"), tmp_path, rows, mixture, loss_type="dft")
    sequences = [(ids(prompt), ids(f"{completion} <end>")) for prompt, completion in COMPLETIONS]
    each = torch.cat([log_probs(trainer.model, given, predicted) for given, predicted in sequences])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(-(each * each.exp()).mean().item(), rel=1e-4)


FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
LABELS = IDS.masked_fill(torch.arange(12) < torch.tensor([[3], [7]]), -100)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("options", MIXTURES)
def test_the_fused_head(options, temperature, shifted, monkeypatch):
    """Every field is what the logits of the mixture give, in one chunk or many, and so are the gradients."""
    experts = {name: fresh(arch, **o) for name, (arch, o) in EXPERTS.items()}
    model = stitch(fresh("llama"), experts, output="mixture", **MIXTURES[options])
    add_fused_lm_head(model.get_base_model(), temperature=temperature, outputs=FIELDS)
    monkeypatch.setattr(mixed_head, "_CHUNK", 64 * 4)
    targets = F.pad(LABELS, (0, 1), value=-100)[:, 1:] if shifted else LABELS[:, 1:]
    given = {"labels": None, "shift_labels": targets} if shifted else {"labels": LABELS}

    def expected():
        scaled = model(input_ids=IDS).logits[:, : targets.shape[1]] / temperature
        logp, mask = scaled.log_softmax(-1), targets != -100
        values = {
            "log_probs": logp.gather(-1, targets.clamp(min=0)[..., None])[..., 0],
            "entropy": -(logp.exp() * logp).sum(-1),
            "log_sum_sq_probs": logp.exp().square().sum(-1).log(),
            "mean_logits": scaled.mean(-1),
            "is_top1": logp.argmax(-1) == targets,
        }
        return {name: value.masked_fill(~mask, 0) for name, value in values.items()} | {"label_mask": mask}

    def backward(values):
        model.zero_grad()
        (values["log_probs"].square().sum() + values["entropy"].sum()).backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    fused, plain = model(input_ids=IDS, fused_lm_head=True, **given), expected()
    for name, value in plain.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-4, atol=1e-5)
    assert fused.loss.item() == pytest.approx(-plain["log_probs"].sum().item() / plain["label_mask"].sum().item())
    halved = model(input_ids=IDS, fused_lm_head=True, num_items_in_batch=2 * plain["label_mask"].sum(), **given)
    assert halved.loss.item() == pytest.approx(fused.loss.item() / 2)
    torch.testing.assert_close(backward(fused), backward(plain), rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS, fused_lm_head=True, **given).log_probs, fused.log_probs)
    with model.disable_adapter(), torch.no_grad():  # TRL's own, of the hub
        seed = pristine("llama")(input_ids=IDS).logits[:, : targets.shape[1]] / temperature
        alone = model(input_ids=IDS, fused_lm_head=True, **given).log_probs
    expected = seed.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0].masked_fill(targets == -100, 0)
    torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-5)


def test_the_fused_head_without_any_label():
    """As TRL's own: a differentiable zero, so that one empty part of a batch does not end the training."""
    model = stitch(fresh("llama"), {"a": fresh("llama", seed=1)}, output="mixture", num_stitches=0)
    add_fused_lm_head(model.get_base_model(), outputs=FIELDS)
    out = model(input_ids=IDS, labels=torch.full_like(IDS, -100), fused_lm_head=True)
    out.loss.backward()
    assert out.loss.item() == 0
    assert all(not p.grad.any() for p in model.parameters() if p.requires_grad)


def test_dpo_of_a_mixture(root, tmp_path):
    """The policy is the mixture, the reference the seed alone."""
    mixture = StitchConfig(task_type="CAUSAL_LM", experts=paths(root), output="mixture", num_stitches=0)
    trainer = dpo(str(root / "seed"), tmp_path, mixture)
    trainer.train()

    def reward(prompt, answer):
        tokens = ids(prompt), ids(f"{answer} <end>")
        policy, reference = (log_probs(trainer.model, *tokens, adapter=a).sum() for a in (True, False))
        return 0.1 * (policy - reference)

    margins = torch.stack([reward(p, chosen) - reward(p, rejected) for p, chosen, rejected in PREFERENCES])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(-F.logsigmoid(margins).mean().item(), rel=1e-4)


def dpo(model, folder, peft_config=None):
    data = Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), row)) for row in PREFERENCES])
    return trl.DPOTrainer(
        model=model,
        args=arguments(trl.DPOConfig, folder),
        train_dataset=data,
        eval_dataset=data,
        processing_class=TOKENIZER,
        peft_config=peft_config,
    )


def test_dpo_against_the_seed(root, tmp_path):
    """Without a reference model, the reference is the model with the adapter disabled: the seed."""
    trainer = dpo(str(root / "seed"), tmp_path, config(root))
    trainer.train()

    def reward(prompt, answer):
        tokens = ids(prompt), ids(f"{answer} <end>")
        policy, reference = (log_probs(trainer.model, *tokens, adapter=a).sum() for a in (True, False))
        return 0.1 * (policy - reference)

    margins = torch.stack([reward(p, chosen) - reward(p, rejected) for p, chosen, rejected in PREFERENCES])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(-F.logsigmoid(margins).mean().item(), rel=1e-4)


@pytest.mark.parametrize("output", ["hub", "mixture"])
def test_dpo_against_the_adapter_as_it_was(output, tmp_path):
    """A stitched model is its own reference: a frozen copy of its stitches, with the very same experts."""
    experts = {name: fresh(arch, **o) for name, (arch, o) in EXPERTS.items()}  # objects, which no path leads to
    model = stitch(fresh("llama"), experts, output=output)
    before = logits(model)
    trainer = dpo(model, tmp_path)
    assert trainer.evaluate()["eval_rewards/margins"] == 0
    trainer.train()
    assert trainer.evaluate()["eval_rewards/margins"] != 0
    model.eval()
    assert not torch.equal(logits(model), before)
    model.set_adapter("ref")
    assert torch.equal(logits(model), before)
