"""What is measured on the study's text: tokens and their bytes, losses and oracles, answers, intervals."""

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.study import answers, bootstrap, losses, oracles, tasks
from benchmarks.study import models as study_models
from benchmarks.study import tokens as study_tokens
from benchmarks.study.building import build
from benchmarks.study.documents import GIVEN, Document, Item
from benchmarks.study.models import EXPERTS, mix_of
from benchmarks.study.sources import SOURCES
from benchmarks.study.tokens import train_tokenizer
from tests.helpers.study_archives import SIZES, write_archives


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    return build(write_archives(tmp_path_factory.mktemp("sources"), SOURCES), SIZES)


@pytest.fixture(scope="module")
def tokenizer(corpora):
    return train_tokenizer(corpora.documents["train"], vocabulary=400)


@pytest.fixture(scope="module")
def models(tokenizer):
    made = []
    for seed in range(3):
        torch.manual_seed(seed)
        config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                             num_attention_heads=2, initializer_range=0.3, pad_token_id=0)  # fmt: skip
        made.append(LlamaForCausalLM(config).eval().requires_grad_(False))
    return made


def predictor(model):
    return lambda tokens, prompt: model(input_ids=tokens, use_cache=False).logits


# --- Questions with examples -----------------------------------------------------------------------------------------


def test_examples_differ_between_items_and_not_between_methods(tokenizer, corpora):
    items, shown = corpora.items["test"]["sums"], corpora.items["examples"]["sums"]
    one, two = (study_tokens.item_sequences(tokenizer, items, shown) for _ in range(2))
    assert np.array_equal(one.tokens, two.tokens)
    texts = [tokenizer.decode(ids) for ids in one.of(one.tokens)]
    assert all(text.count(study_tokens.END) == tasks.EXAMPLES + 2 for text in texts)
    assert all(text.endswith(f"{item.text}{study_tokens.END}") for text, item in zip(texts, items))


def test_examples_that_fit_are_found_or_missed(tokenizer):
    items, long = [Item("1+1=", "2")], Item("1" * 60, "1")
    shown = [long] * 100 + [Item(f"{i}=", "3") for i in range(4)]
    tokens = study_tokens.item_sequences(tokenizer, items, shown, length=40).tokens
    assert tokenizer.decode(tokens).count("3") >= 4
    three = [long, *shown[-3:]]  # the four shortest are too long, three of them are not
    tokens = study_tokens.item_sequences(tokenizer, items, three, length=40).tokens
    assert tokenizer.decode(tokens).count(study_tokens.END) == 3 + 2
    with pytest.raises(ValueError, match=r"with an example, this item takes more than 40 tokens: .*1\+1="):
        study_tokens.item_sequences(tokenizer, items, [long] * 10, length=40)


# --- Tokens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["def f(x):\n\treturn 12", "Où est l'Œuvre ? 日本", "a  b", "\u202f\x00"])
def test_any_text_has_tokens_and_its_bytes_are_counted(tokenizer, text):
    sequences = study_tokens.document_sequences(tokenizer, [Document((("prose", text),))])
    assert tokenizer.decode(sequences.tokens[1:]) == text
    assert sequences.sums(sequences.bytes).sum() == len(text.encode())


def test_what_is_given_is_not_scored(tokenizer):
    document = Document(((GIVEN, "12+30="), ("maths", "42")))
    sequences = study_tokens.document_sequences(tokenizer, [document])
    assert tokenizer.decode(sequences.tokens[sequences.scored]) == "42"
    assert sequences.prompt.tolist() == [1 + len("12+30=")]
    blocks = study_tokens.make_blocks(tokenizer, [document] * 64, "test", seed=0, length=9)
    scored = (blocks[:, 1] != -100).sum(1)
    assert sorted(set(scored.tolist())) == [3, 9]
    assert (scored == 9).float().mean().item() == pytest.approx(1 / 8, abs=0.01)


def test_documents_are_cut_to_the_length(tokenizer):
    document = Document((("prose", "a1" * 100), ("python", "b2" * 100)))
    sequences = study_tokens.document_sequences(tokenizer, [document] * 2, length=250)
    assert np.diff(sequences.starts).tolist() == [250, 250]
    assert sequences.sums(sequences.bytes, "python").tolist() == [49, 49]


def test_blocks_hold_all_documents_in_an_order_that_depends_on_the_seed(tokenizer, corpora):
    documents = corpora.documents["train"]["python"]
    one, same, other = (study_tokens.make_blocks(tokenizer, documents, "test", seed=s, length=64) for s in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert abs(one.numel() - other.numel()) <= 2 * 64
    assert documents[0].text[:40] in tokenizer.decode(one[:, 0].flatten())


# --- Seeds and experts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [size for size in study_models.SIZES if size != "smoke"])
def test_models_are_as_large_as_they_are_called(tokenizer, size):
    model = study_models.new_model(size, tokenizer)
    more = (study_tokens.VOCABULARY - len(tokenizer)) * model.config.hidden_size
    assert (model.num_parameters() + more) / 1e6 == pytest.approx(float(size[:-1]), rel=0.02)


@pytest.mark.parametrize("share, tries", [(2.0, 1), (0.1, 3)])
def test_an_expert_that_has_not_learned_is_trained_again(
    tmp_path, monkeypatch, models, tokenizer, corpora, share, tries
):
    models[0].save_pretrained(tmp_path / "seed")
    orders = []

    def train(model, rows, **_):
        orders.append(rows)
        return {"loss": 0.0}

    monkeypatch.setattr(study_models, "train", train)
    monkeypatch.setitem(study_models.LEARNED, "maths", share)
    blocks = study_tokens.training_blocks(tokenizer, corpora, seed=0)
    found = study_models.branch_expert(
        "maths", tmp_path / "seed", tmp_path / "maths", blocks, corpora, tokenizer, study_models.Stage(2, 1e-3), seed=0
    )
    assert (found["learned"], len(found["tries"]), len(orders)) == (tries == 1, tries, tries)
    assert all(not torch.equal(one, orders[0]) for one in orders[1:])
    assert found["tries"] == pytest.approx([found["seed"]] * tries)  # nothing was trained
    assert LlamaForCausalLM.from_pretrained(tmp_path / "maths").num_parameters() == models[0].num_parameters()


def test_mixes_are_shares():
    for name in ["seed", *EXPERTS]:
        assert sum(mix_of(name).values()) == pytest.approx(1)
        assert name == "seed" or max(mix_of(name), key=mix_of(name).get) == name


# --- Losses and oracles ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sequences(tokenizer, corpora):
    mixed = [one for part in corpora.mixed.values() for one in part[:3]]
    return study_tokens.document_sequences(tokenizer, [*mixed, *corpora.documents["test"]["maths"][:4]])


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
    sequences = study_tokens.document_sequences(tokenizer, [document, document])
    nats = np.full(len(sequences.tokens), math.log(len(tokenizer)), np.float32)
    nats[sequences.starts[:-1]] = 0
    count = len(tokenizer.encode("Hello there", add_special_tokens=False))
    more = len(tokenizer.encode("Où ça ?", add_special_tokens=False))
    bits = math.log2(len(tokenizer))
    assert losses.bits_per_byte(nats, sequences) == pytest.approx((count + more) * bits / (11 + 9), rel=1e-5)
    assert losses.bits_per_byte(nats, sequences, "french") == pytest.approx(more * bits / 9, rel=1e-5)


def test_losses_are_kept_and_guarded(tmp_path, models, sequences, tokenizer):
    path = tmp_path / "model" / "text.npz"
    first = losses.stored(path, sequences, lambda: losses.score(predictor(models[0]), sequences, "test"))
    again = losses.stored(path, sequences, lambda: pytest.fail("computed twice"))
    assert np.array_equal(first.nats, again.nats)
    assert np.array_equal(first.hits, again.hits)
    other = study_tokens.document_sequences(tokenizer, [Document((("prose", "something else"),))])
    with pytest.raises(ValueError, match=r"text.npz holds losses of .* other tokens .* Delete the folder"):
        losses.stored(path, other, lambda: pytest.fail("computed"))


def test_btm_from_kept_losses_is_bayes_rule(nats, sequences):
    mixed = sequences.of(oracles.btm(nats, sequences))
    for row, each in enumerate(sequences.of(nats)):
        p = np.exp(-each.astype(np.float64))
        for place in range(1, p.shape[1]):
            weights = p[:, :place].prod(1)
            if weights.sum() < 1e-200:  # too unlikely for plain numbers
                break
            expected = (weights / weights.sum()) @ p[:, place]
            assert mixed[row][place] == pytest.approx(-math.log(expected), rel=1e-4, abs=1e-6)


def test_oracles_are_ordered_and_brute_force_agrees(nats, sequences):
    token, document = oracles.best_per_token(nats), oracles.best_per_document(nats, sequences)
    bits = [losses.bits_per_byte(values, sequences) for values in (token, document, *nats)]
    assert bits[0] < bits[1] <= min(bits[2:])
    for found, each, scored in zip(sequences.of(document), sequences.of(nats), sequences.of(sequences.scored)):
        assert found[scored].sum() == pytest.approx(min(model[scored].sum() for model in each), rel=1e-6)


def test_the_likeliest_model_looks_at_the_prompt_only(nats, sequences):
    before = oracles.likeliest_by_prompt(nats, sequences)
    behind = np.concatenate([np.arange(n) >= p for n, p in zip(np.diff(sequences.starts), sequences.prompt)])
    changed = nats + np.where(behind, np.array([[0], [9], [99]]), 0)
    assert np.array_equal(oracles.likeliest_by_prompt(changed, sequences), before)
    best = int(before[0])
    worse = nats.copy()
    worse[best, 1 : sequences.prompt[0]] += 99
    assert oracles.likeliest_by_prompt(worse, sequences)[0] != best


# --- Answers --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompts(tokenizer, corpora):
    return answers.prompts_of(study_tokens.item_sequences(tokenizer, corpora.items["test"]["stories"][:5]))


def test_greedy_answers_are_those_of_generate(models, prompts, tokenizer):
    end = tokenizer.eos_token_id
    found = answers.greedy(lambda: answers.Stream(models[0]), prompts, end, "test", longest=8)
    for answer, prompt in zip(found, prompts):
        made = models[0].generate(prompt.unsqueeze(0), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=8,
                                  do_sample=False, eos_token_id=end, pad_token_id=end)[0, len(prompt):]  # fmt: skip
        assert answer == [token for token in made.tolist() if token != end]


def test_btm_answers_are_those_of_the_rule_without_caches(models, prompts, tokenizer):
    end = tokenizer.eos_token_id
    found = answers.greedy(lambda: answers.BTMStream(models), prompts, end, "test", longest=6)
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
    asked = answers.prompts_of(study_tokens.item_sequences(tokenizer, prompts))
    said = answers.greedy(lambda: answers.Stream(models[1]), asked, -1, "test", longest=3)
    items = [Item(item.prompt, tokenizer.decode(ids) if i % 2 else "wrong", ends=False)
             for i, (item, ids) in enumerate(zip(prompts, said))]  # fmt: skip
    sequences = study_tokens.item_sequences(tokenizer, items)
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
