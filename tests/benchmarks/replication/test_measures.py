"""What is measured on the study's text: losses and oracles, answers, intervals."""

import copy
import math

import numpy as np
import pytest
import torch
from peft import get_peft_model

from benchmarks.replication.measures import answers, bootstrap, gates, losses, oracles
from benchmarks.replication.measures.forgetting import btm_losses
from benchmarks.replication.methods.ensembles import BTM
from benchmarks.replication.methods.streams import BTMStream, Stream
from benchmarks.replication.text.documents import Document, Item
from benchmarks.replication.tokens.sequences import document_sequences, item_sequences
from peft_bts import StitchConfig, trace_gates


def predictor(model):
    return lambda tokens, prompt: model(input_ids=tokens, use_cache=False).logits


# --- Losses and oracles ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sequences(tokenizer, corpora):
    mixed = [one for part in corpora.mixed.values() for one in part[:3]]
    return document_sequences(tokenizer, [*mixed, *corpora.documents["test"]["maths"][:4]])


@pytest.fixture(scope="module")
def nats(models, sequences):
    return np.stack([losses.score(predictor(model), sequences, "test", batch=3).nats for model in models])


def test_losses_are_the_models_own(models, sequences):
    found = losses.score(predictor(models[0]), sequences, "test", batch=3)
    for nats, hits, ids in zip(sequences.of(found.nats), sequences.of(found.hits), sequences.of(sequences.tokens)):
        tokens = torch.from_numpy(ids).unsqueeze(0)
        logits = models[0](input_ids=tokens).logits[0, :-1]
        expected = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
        assert nats[0] == 0
        np.testing.assert_allclose(nats[1:], expected, rtol=1e-4, atol=1e-5)
        assert hits[1:].tolist() == (logits.argmax(-1) == tokens[0, 1:]).tolist()


def test_bits_per_byte_is_what_its_name_says(tokenizer):
    """A model that finds every token equally likely."""
    document = Document((("english", "Hello there"), ("french", "Où ça ?")))
    sequences = document_sequences(tokenizer, [document, document])
    nats = np.full(len(sequences.tokens), math.log(len(tokenizer)), np.float32)
    nats[sequences.starts[:-1]] = 0
    count = len(tokenizer.encode("Hello there", add_special_tokens=False))
    more = len(tokenizer.encode("Où ça ?", add_special_tokens=False))
    bits = math.log2(len(tokenizer))
    assert losses.bits_per_byte(nats, sequences) == pytest.approx((count + more) * bits / (11 + 9), rel=1e-5)
    assert losses.bits_per_byte(nats, sequences, "french") == pytest.approx(more * bits / 9, rel=1e-5)


@pytest.mark.parametrize("forgetting", [1.0, 0.8])
def test_btm_from_kept_losses_is_btm(models, nats, sequences, forgetting):
    expected = losses.score(BTM(models, forgetting), sequences, "test", batch=3).nats
    np.testing.assert_allclose(btm_losses(nats, sequences, forgetting), expected, rtol=1e-4, atol=1e-4)


def test_oracles_are_ordered_and_brute_force_agrees(nats, sequences):
    token, document = oracles.best_per_token(nats), oracles.best_per_document(nats, sequences)
    bits = [losses.bits_per_byte(values, sequences) for values in (token, document, *nats)]
    assert bits[0] < bits[1] <= min(bits[2:])
    for found, each, scored in zip(sequences.of(document), sequences.of(nats), sequences.of(sequences.scored)):
        assert found[scored].sum() == pytest.approx(min(model[scored].sum() for model in each), rel=1e-6)


# --- Gates ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gated(models):
    """Output gates that say something."""
    torch.manual_seed(0)
    config = StitchConfig(task_type="CAUSAL_LM", num_stitches=0, output="mixture")
    model = get_peft_model(copy.deepcopy(models[0]), config)
    model.attach_expert("python", copy.deepcopy(models[1]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    return model.eval()


@pytest.fixture(scope="module")
def mixed(tokenizer):
    """Two changes of domain, in documents of different lengths; nobody owns English."""
    documents = [
        Document((("prose", "Some words come first. "), ("python", "def f(x):\n    return x\n"))),
        Document((("python", "import os\n"), ("prose", "The end."))),
        Document((("prose", "Nothing changes here, however long it takes to say so."),)),
        Document((("english", "Hello "), ("python", "x = 1\n"))),
    ]
    return document_sequences(tokenizer, documents)


def test_gates_are_those_of_sequences_alone(gated, mixed):
    names, found = gates.gates_of(gated, mixed, batch=3)
    assert names == ["hub", "python"]
    for tokens, mine in zip(mixed.of(mixed.tokens), found):
        with torch.no_grad(), trace_gates(gated) as trace:
            gated(input_ids=torch.from_numpy(tokens)[None])
        np.testing.assert_allclose(mine, trace.sequences[0].gates[-1].numpy(), atol=1e-5)


def test_gates_around_changes_of_domain(gated, mixed):
    owners = {"prose": "hub", "python": "python"}
    (first, place, *both), second = gates.changes(mixed, owners)
    assert (first, both, second[0], second[2:]) == (0, ["hub", "python"], 1, ("python", "hub"))
    assert mixed.names[mixed.of(mixed.kinds)[0][place]] == "python"
    found = gates.measure_gates(gated, {"all": mixed}, mixed, owners)
    _, by_token = gates.gates_of(gated, mixed)
    assert found["mean"]["all"]["hub"] == pytest.approx(np.concatenate(by_token)[:, 0].mean(), abs=1e-6)
    here = found["turn"]["tokens"].index(0)  # where the new domain's first token is predicted
    expected = [by_token[0][place - 1][0], by_token[1][second[1] - 1][1]]
    assert found["turn"]["old"][here] == pytest.approx(np.mean(expected), abs=1e-6)
    assert found["changes"] == 2


# --- Answers --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompts(tokenizer, corpora):
    return answers.prompts_of(item_sequences(tokenizer, corpora.items["test"]["stories"][:5]))


def test_greedy_answers_are_those_of_generate(models, prompts, tokenizer):
    end = tokenizer.eos_token_id
    found = answers.greedy(lambda *_: Stream(models[0]), prompts, end, "test", longest=8)
    for answer, prompt in zip(found, prompts):
        made = models[0].generate(prompt.unsqueeze(0), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=8,
                                  do_sample=False, eos_token_id=end, pad_token_id=end)[0, len(prompt):]  # fmt: skip
        assert answer == [token for token in made.tolist() if token != end]


def test_btm_answers_are_those_of_the_rule_without_caches(models, prompts, tokenizer):
    end = tokenizer.eos_token_id
    found = answers.greedy(lambda *_: BTMStream(models), prompts, end, "test", longest=6)
    for answer, prompt in zip(found, prompts):
        tokens = prompt
        for token in [*answer, *([] if len(answer) == 6 else [end])]:
            log_p = torch.stack([m(input_ids=tokens.unsqueeze(0)).logits[0].log_softmax(-1) for m in models])
            evidence = log_p[:, :-1].gather(-1, tokens[1:].expand(3, -1).unsqueeze(-1)).sum((1, 2))
            mixed = (evidence.log_softmax(0).unsqueeze(-1) + log_p[:, -1]).logsumexp(0)
            assert mixed[token] == pytest.approx(mixed.max().item(), abs=1e-4)
            tokens = torch.cat([tokens, torch.tensor([token])])


def test_exact_from_kept_losses_is_what_greedy_decoding_answers(models, tokenizer):
    """Items whose answers are the model's own, and some that are not."""
    prompts = [Item(f"{i}+{i}=", "") for i in range(1, 7)]
    asked = answers.prompts_of(item_sequences(tokenizer, prompts))
    said = answers.greedy(lambda *_: Stream(models[1]), asked, -1, "test", longest=3)
    items = [Item(item.prompt, tokenizer.decode(ids) if i % 2 else "wrong", ends=False)
             for i, (item, ids) in enumerate(zip(prompts, said))]  # fmt: skip
    sequences = item_sequences(tokenizer, items)
    found = losses.exact(losses.score(predictor(models[1]), sequences, "test").hits, sequences)
    same = [tokenizer.encode(item.answer, add_special_tokens=False) == ids for item, ids in zip(items, said)]
    assert any(same)
    assert found.tolist() == same


def test_chrf():
    scores = answers.chrf(["Ouvrir le fichier", "Ouvrir", ""], ["Ouvrir le fichier"] * 3)
    assert scores[0] == 100
    assert 0 < scores[1] < 100
    assert scores[2] == 0


# --- Intervals ------------------------------------------------------------------------------------------------------


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng, held = np.random.default_rng(0), 0
    for trial in range(200):
        amounts = {"a": 2 + rng.normal(size=(20, 1)) + rng.normal(size=(1, 40)) + rng.normal(size=(20, 40))}
        found = bootstrap.interval(amounts, {"a": np.ones(40)}, draws=300, seed=trial)
        held += found.low <= 2 <= found.high
    assert 0.88 <= held / 200 <= 0.99


def test_paired_differences_cancel_what_is_shared():
    rng = np.random.default_rng(0)
    hard = {"a": 100 * rng.random((3, 50)), "b": 10 * rng.random((3, 80))}
    better = {domain: values - 0.5 for domain, values in hard.items()}
    sizes = {"a": np.full(50, 2.0), "b": np.ones(80)}
    found = bootstrap.paired(better, hard, sizes)
    assert (found.value, found.low, found.high) == pytest.approx((-0.375, -0.375, -0.375))
    alone = bootstrap.interval(hard, sizes)
    assert alone.low < alone.value < alone.high
    assert alone.value == pytest.approx((hard["a"].mean() / 2 + hard["b"].mean()) / 2)


def test_intervals_refuse_what_does_not_match():
    ones = np.ones((2, 3))
    with pytest.raises(ValueError, match="must be the same"):
        bootstrap.interval({"a": ones}, {"b": np.ones(3)})
    with pytest.raises(ValueError, match="the same sets"):
        bootstrap.interval({"a": ones, "b": np.ones((3, 3))}, {"a": np.ones(3), "b": np.ones(3)})
    with pytest.raises(ValueError, match="a has amounts of 3 documents"):
        bootstrap.interval({"a": ones}, {"a": np.ones(4)})
    with pytest.raises(ValueError, match="different domains"):
        bootstrap.paired({"a": ones}, {"b": ones}, {"a": np.ones(3)})
