"""TRL's trainers take a `StitchConfig` for a `peft_config`; their losses are those of the reference."""

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from peft_bts import StitchConfig
from tests.helpers.models import expected_logits, fresh, logits, pristine, stitch
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


def config(root, **options):
    experts = {name: str(root / name) for name in EXPERTS}
    return StitchConfig(task_type="CAUSAL_LM", experts=experts, num_stitches=4, **options)


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
    assert trainable == {name for name, _ in trainer.model.named_parameters() if ".stitch_layer." in name}
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


def test_dpo_against_the_adapter_as_it_was(tmp_path):
    """A stitched model is its own reference: a frozen copy of its stitches, with the very same experts."""
    experts = {name: fresh(arch, **o) for name, (arch, o) in EXPERTS.items()}  # objects, which no path leads to
    model = stitch(fresh("llama"), experts)
    before = logits(model)
    trainer = dpo(model, tmp_path)
    assert trainer.evaluate()["eval_rewards/margins"] == 0
    trainer.train()
    assert trainer.evaluate()["eval_rewards/margins"] != 0
    model.eval()
    assert not torch.equal(logits(model), before)
    model.set_adapter("ref")
    assert torch.equal(logits(model), before)
