"""`assess` against plain models and against answers that are known in advance."""

import copy
import json
import math
import random

import matplotlib.image
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from peft_bts import assess
from peft_bts.planning import token_losses
from peft_bts_cli import app
from tests.helpers.models import fresh, pristine
from tests.helpers.text import save_model, write_documents


LOW, HIGH = range(3, 33), range(33, 63)  # tokens that one expert knows, and the other


def bigrams(known):
    """A model that predicts token + 1 behind the tokens it knows, with probability 0.9, and nothing behind others.

    Its layers add nothing, its embeddings are one-hot, so its head is a table: 8 is the norm of what the head reads.
    """
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=32, tie_word_embeddings=False,
        )
    )  # fmt: skip
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(64))
        model.lm_head.weight.zero_()
        for token in known:
            model.lm_head.weight[token + 1, token] = math.log(0.9 / (0.1 / 63)) / 8
    return model.eval()


def walks(parts, count=80, length=8, seed=0):
    """Documents that follow the rule within each of some parts, one part after the other."""
    rng = random.Random(seed)
    documents = []
    for _ in range(count):
        document = []
        for part in parts:
            start = rng.randrange(part.start, part.stop - length)
            document += range(start, start + length)
        documents.append(document)
    return documents


UNKNOWN, KNOWN = math.log(64), -math.log(0.9)


@pytest.fixture(scope="module")
def experts():
    return {"low": bigrams(LOW), "high": bigrams(HIGH)}


def test_gates_suffice_where_documents_are_of_one_kind(experts):
    """The gates get as far as the oracle of documents, and no further."""
    data = {"low": walks([LOW]), "high": walks([HIGH], seed=1)}
    found = assess(bigrams([]), experts, data, progress=False)
    for domain, other in (("low", "high"), ("high", "low")):
        losses = found.domains[domain]
        assert losses.models == pytest.approx({"hub": UNKNOWN, domain: KNOWN, other: UNKNOWN}, abs=1e-3)
        assert losses.best_model == domain
        assert losses.best_per_document == losses.best_per_token == pytest.approx(KNOWN, abs=1e-3)
        assert losses.output_gates == pytest.approx(KNOWN, abs=0.05)
    assert found.verdict == "gates" and found.advice.startswith("Gates alone suffice")
    one = (UNKNOWN + KNOWN) / 2  # the best single model knows one domain of the two
    assert found.mean.gain.mean == pytest.approx(one - found.mean.output_gates, abs=1e-3)
    assert found.mean.gain.low <= found.mean.gain.mean <= found.mean.gain.high


def test_stitches_pay_where_kinds_mix_inside_documents(experts):
    """Half of each document is known to one expert, half to the other: no single model is right for a document."""
    found = assess(bigrams([]), experts, {"both": walks([LOW, HIGH])}, progress=False)
    losses = found.domains["both"]
    assert losses.best_per_document > 1.5 > 0.8 > losses.output_gates >= losses.best_per_token
    assert found.verdict == "stitches" and "inside documents" in found.advice
    assert losses == found.mean  # of one domain


def test_nothing_to_gain_from_copies():
    hub = bigrams(LOW)
    found = assess(hub, {"copy": copy.deepcopy(hub)}, {"low": walks([LOW], count=12)}, progress=False)
    assert found.verdict == "nothing" and found.advice.startswith("Nothing to gain")
    assert found.mean.gain.mean == pytest.approx(0, abs=1e-6)
    assert found.mean.weight_average == pytest.approx(KNOWN, abs=1e-3)


def independent(model, document, length):
    """The losses of a document's predicted tokens, row by row, from the plain model's logits."""
    losses = []
    for start in range(0, len(document), length):
        row = torch.tensor(document[start : start + length])
        if len(row) > 1:
            with torch.no_grad():
                logits = model(input_ids=row[None]).logits[0, :-1]
            losses.append(F.cross_entropy(logits, row[1:], reduction="none"))
    return torch.cat(losses)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2"])
def test_every_column_against_plain_models(arch):
    """Documents of many lengths, one too short to count, in several rows and batches; experts of the same shape."""
    rng = random.Random(0)
    data = {
        name: [[rng.randrange(3, 64) for _ in range(rng.randrange(2, 20))] for _ in range(9)] for name in ("a", "b")
    }
    plain = {"hub": pristine(arch), "x": pristine(arch, seed=1), "y": pristine(arch, seed=2)}
    mean = copy.deepcopy(plain["hub"])
    states = [model.state_dict() for model in plain.values()]
    mean.load_state_dict({key: sum(state[key] for state in states) / 3 for key in states[0]})
    found = assess(
        fresh(arch),
        {"y": fresh(arch, seed=2), "x": fresh(arch, seed=1)},
        {name: [[5], *documents] for name, documents in data.items()},
        sequence_length=7,
        batch_size=3,
        progress=False,
    )
    for domain, documents in data.items():
        tested = documents[1::2]
        losses = {name: [independent(model, one, 7) for one in tested] for name, model in plain.items()}
        number = sum(map(len, losses["hub"]))
        assert found.data[domain].predicted_tokens == number and found.data[domain].tested == len(tested)
        here = found.domains[domain]
        assert here.models == pytest.approx(
            {k: torch.cat(v).sum().item() / number for k, v in losses.items()}, rel=1e-4
        )
        by_document = [min(losses[name][i].sum().item() for name in plain) for i in range(len(tested))]
        assert here.best_per_document == pytest.approx(sum(by_document) / number, rel=1e-4)
        by_token = torch.stack([torch.cat(v) for v in losses.values()]).min(0).values
        assert here.best_per_token == pytest.approx(by_token.mean().item(), rel=1e-4)
        average = torch.cat([independent(mean, one, 7) for one in tested]).mean().item()
        assert here.weight_average == pytest.approx(average, rel=1e-4)
        fitted = {
            name: torch.cat([independent(model, one, 7) for one in documents[::2]]).mean()
            for name, model in plain.items()
        }
        assert here.best_model == min(fitted, key=fitted.get)
        assert here.gain.mean == pytest.approx(here.models[here.best_model] - here.output_gates)
    assert found.no_average is None


def test_models_stay_as_they_are_and_numbers_repeat(experts):
    hub = bigrams([]).train()
    before = {name: value.clone() for name, value in hub.state_dict().items()}
    data = {"both": walks([LOW, HIGH], count=8)}
    first, second = (assess(hub, experts, data, progress=False).to_dict() for _ in range(2))
    assert first | {"fit_seconds": 0} == second | {"fit_seconds": 0}
    assert hub.training and all(torch.equal(value, before[name]) for name, value in hub.state_dict().items())


def test_experts_of_another_width_have_no_average_with_the_hub():
    data = {"a": walks([LOW], count=6)}
    found = assess(fresh("llama"), {"wide": fresh("gpt2", seed=1, width=48)}, data, progress=False)
    assert "Expert 'wide' has weights of other names or shapes" in found.no_average
    assert found.mean.weight_average is None and "No average of weights" in str(found)


@pytest.fixture
def folders(tmp_path):
    """A hub, an expert and a LoRA of the hub, saved, and two files of documents."""
    hub, expert = save_model(tmp_path / "hub"), save_model(tmp_path / "expert", seed=1)
    lora = get_peft_model(fresh("llama"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False, r=2))
    lora.save_pretrained(tmp_path / "lora")
    for domain in (1, 3):
        write_documents(tmp_path / f"{domain}.jsonl", domain, count=8, length=10)
    return tmp_path, hub, {"full": expert, "lora": str(tmp_path / "lora")}


def call(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["assess", *map(str, arguments)])


def test_command(folders):
    """It prints what the function returns, and draws it. A LoRA of the hub is loaded, and merged for the average."""
    root, hub, experts = folders
    options = ["--hub", hub, *(f"--expert={name}={place}" for name, place in experts.items())]
    options += ["--data", f"one={root / '1.jsonl'}", "--data", f"three={root / '3.jsonl'}", "--device", "cpu"]
    result = call(*options, "--json", "--plot", root / "bars.png")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    documents = {
        name: [json.loads(line)["text"] for line in (root / file).read_text().splitlines()]
        for name, file in {"one": "1.jsonl", "three": "3.jsonl"}.items()
    }
    expected = assess(hub, experts, documents, device="cpu", progress=False).to_dict()
    assert {key: printed[key] for key in expected} == expected | {"fit_seconds": printed["fit_seconds"]}
    assert printed["written"] == [str(root / "bars.png")] and matplotlib.image.imread(root / "bars.png").std() > 0
    size, loss = printed["data"]["one"], printed["domains"]["one"]["models"]["hub"]
    assert printed["bits_per_byte"]["one"]["hub"] == pytest.approx(loss / math.log(2) / size["bytes_per_token"])
    assert size["bytes_per_token"] == pytest.approx(sum(map(len, documents["one"])) / (8 * 10))
    text = call(*options).stdout
    assert "lora expert" in text and "output gates" in text and expected["advice"][:20] in text


def test_an_id_that_an_expert_does_not_know(tmp_path):
    """A hub with a padded vocabulary has ids that an expert has no embedding for: said before any model runs."""
    hub, short = save_model(tmp_path / "hub", vocab_size=80), save_model(tmp_path / "short", seed=1)
    with pytest.raises(ValueError, match=r"Domain 'a' has the token id 70; the expert 'short' knows ids from 0 to 63"):
        assess(hub, {"short": short}, {"a": [[3, 4, 70]] * 6})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"data": {}}, "No data is given"),
        ({"experts": {}}, "No expert is given"),
        ({"data": {"a": [[3, 4]]}}, "Domain 'a' has 1 document(s); expected at least 4"),
        ({"data": {"a": [[3], [4], [5], [6], [3, 4]]}}, "Domain 'a' has 1 document(s) of two tokens or more"),
        ({"data": {"a": [[3, 4]] * 9}, "max_tokens": 4}, "2 document(s) of two tokens or more within its first 4"),
        ({"data": {"a": "w3 w4"}}, "Domain 'a' is a str; expected a list of documents"),
        ({"data": {"a": [[3, 64]] * 4}}, "Domain 'a' has the token id 64; the hub knows ids from 0 to 63"),
        ({"experts": {"hub": "full"}}, "Expert name 'hub' is taken"),
        ({"experts": {"full": "nowhere/at-all"}}, "nowhere/at-all"),
        ({"sequence_length": 1}, "sequence_length must be a whole number of at least 2, got 1"),
        ({"sequence_length": 10**6}, "is more than the"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_anything_is_loaded(folders, monkeypatch, change, message):
    _, hub, experts = folders
    monkeypatch.setattr(token_losses.ModelLoader, "hub", lambda self: pytest.fail("a model was loaded"))
    given = {"experts": experts, "data": {"a": [[3, 4, 5]] * 4}} | change
    with pytest.raises(ValueError) as error:
        assess(hub, given.pop("experts"), given.pop("data"), progress=False, **given)
    assert message in str(error.value)


def test_bad_input_of_the_command(folders, monkeypatch):
    root, hub, experts = folders
    monkeypatch.setattr(token_losses.ModelLoader, "hub", lambda self: pytest.fail("a model was loaded"))
    start = ["--hub", hub, "--expert", f"full={experts['full']}"]
    data = f"--data=one={root / '1.jsonl'}"
    missing = call(*start, "--data", f"one={root / 'missing.jsonl'}")
    assert missing.exit_code == 1 and "missing.jsonl" in missing.stderr
    for twice in ([*start, data, data], [*start, *start[2:], data]):
        clash = call(*twice)
        assert clash.exit_code == 2 and "every value needs a name of its own" in clash.stderr
    (root / "whole.txt").write_text("w3 w4 w5")
    whole = call(*start, "--data", f"one={root / 'whole.txt'}")
    assert whole.exit_code == 1 and "Domain 'one' has 1 document(s)" in whole.stderr
    nowhere = call(*start, data, "--plot", root / "no" / "bars.png")
    assert nowhere.exit_code == 1 and "There is no folder" in nowhere.stderr
