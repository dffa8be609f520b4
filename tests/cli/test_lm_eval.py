"""Stitched models in lm-evaluation-harness, as in docs/evaluating.md. Needs `pip install ".[eval]"`."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from peft_bts import StitchConfig
from peft_bts_cli import app
from tests.helpers.harness import TASKS, write_tasks
from tests.helpers.models import randomize
from tests.helpers.text import save_model, word_tokenizer


pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow


@pytest.fixture(params=[64, 80], ids=["vocabulary", "padded vocabulary"])
def folder(request, tmp_path):
    """A stitch adapter on saved models, an export of it, and two tasks over a file.

    The tokenizer has 64 tokens; harness and PEFT shrink embeddings that have more rows than that.
    """
    for seed, (name, arch) in enumerate({"seed": "llama", "code": "llama", "math": "gpt2"}.items()):
        save_model(tmp_path / name, arch, seed=seed, vocab=request.param)
    config = StitchConfig(task_type="CAUSAL_LM", experts={name: str(tmp_path / name) for name in ("code", "math")})
    model = randomize(get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "seed"), config)).eval()
    model.save_pretrained(tmp_path / "my-stitch")
    model.export(tmp_path / "exported")
    word_tokenizer().save_pretrained(tmp_path / "exported")
    write_tasks(tmp_path)
    return tmp_path


def evaluate(folder, model_args):
    """Run the harness; return its results and its samples, by task."""
    out = folder / "out"
    command = ["run", "lm_eval", "--model", "hf", "--model_args", f"{model_args},dtype=float32", "--device", "cpu"]
    command += ["--tasks", ",".join(TASKS), "--include_path", folder, "--batch_size", 4, "--log_samples"]
    run = CliRunner().invoke(app, [str(word) for word in [*command, "--output_path", out]])
    assert run.exit_code == 0, run.output
    (results,) = out.rglob("results_*.json")
    samples = {}
    for name in TASKS:
        (file,) = out.rglob(f"samples_{name}_*.jsonl")
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        samples[name] = sorted(rows, key=lambda row: row["doc_id"])
    return json.loads(results.read_text())["results"], samples


@torch.no_grad()
def assert_computed_by(model, results, samples):
    """What the harness found is what `model` gives: log-likelihoods of every choice, and greedy texts."""
    model, tokenizer, right = model.eval(), word_tokenizer(), 0
    for row in samples["tiny_choice"]:
        question, sums = tokenizer(row["doc"]["question"])["input_ids"], []
        for choice in row["doc"]["choices"]:
            answer = tokenizer(choice)["input_ids"]
            log_probabilities = model(input_ids=torch.tensor([question + answer])).logits[0].log_softmax(-1)
            sums.append(sum(log_probabilities[len(question) + i - 1, t].item() for i, t in enumerate(answer)))
        found = [float(response[0]) for response in row["filtered_resps"]]
        assert found == pytest.approx(sums, rel=1e-4)
        right += sums.index(max(sums)) == row["doc"]["answer"]
    assert results["tiny_choice"]["acc,none"] == pytest.approx(right / len(samples["tiny_choice"]))
    for row in samples["tiny_text"]:
        ids = tokenizer(row["doc"]["question"], return_tensors="pt").input_ids
        text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert (
            row["resps"][0][0].split() == tokenizer.decode(text[0, ids.shape[1] :], skip_special_tokens=True).split()
        )


def test_adapter(folder):
    """`pretrained=` the seed, `peft=` the adapter: the logits of a hub whose vocabulary is the tokenizer's."""
    found = evaluate(folder, f"pretrained={folder / 'seed'},peft={folder / 'my-stitch'}")
    hub = AutoModelForCausalLM.from_pretrained(folder / "seed")
    hub.resize_token_embeddings(64)
    assert_computed_by(PeftModel.from_pretrained(hub, folder / "my-stitch"), *found)


def test_export(folder):
    """An exported composition is a model like any other, and is not resized."""
    found = evaluate(folder, f"pretrained={folder / 'exported'}")
    assert_computed_by(AutoPeftModelForCausalLM.from_pretrained(folder / "my-stitch"), *found)
