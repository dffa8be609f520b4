"""What the demo streams is what `generate()` gives, each token with the gates that it was chosen by."""

import threading

import pytest
import torch

from peft_bts import trace_gates
from peft_bts.demo.generation import Choice, stitches_of, stream
from tests.helpers.models import fresh, stitch


PROMPT = [5, 9, 3, 17]
EXPERTS = ("code", "math")


def make(**options):
    experts = {"code": fresh("llama", seed=1), "math": fresh("gpt2", seed=2, layers=3, width=48)}
    model = stitch(fresh("llama"), experts, **options)
    model.generation_config.eos_token_id = None
    return model


def last(model, choice, prompt=PROMPT, **generation):
    *_, answer = stream(model, prompt, choice, **generation)
    return answer


def generated(model, **options):
    ids = torch.tensor([PROMPT])
    return model.generate(input_ids=ids, do_sample=False, max_new_tokens=8, **options)[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize(
    "options", [{}, {"output": "mixture"}, {"output": "mixture", "num_stitches": 0}, {"gate": "token"}], ids=str
)
def test_tokens_and_gates(options):
    """The tokens of `generate()`; the gates that a trace has at the position before each."""
    model = make(**options)
    stitches = stitches_of(model)
    answers = []
    for answer in stream(model, PROMPT, Choice(EXPERTS, max_new_tokens=8)):
        answers.append((len(answer.token_ids), len(answer.gates)))
    assert answers == [(n, n) for n in range(1, 9)]  # as they come
    with trace_gates(model) as trace:
        assert answer.token_ids == generated(model)
    assert trace.stitches == stitches
    (sequence,) = trace.sequences
    for number, gates in enumerate(answer.gates, start=len(PROMPT) - 1):
        assert sorted(gates) == list(range(len(stitches)))
        for place, stitch_ in enumerate(stitches):
            expected = dict(zip(stitch_.models, sequence.gates[place][number].tolist()))
            assert gates[place] == pytest.approx(expected, abs=1e-6)
    assert answer.tokens_per_second > 0


def test_experts_are_switched_off():
    """Those take no part for as long as it runs; without any, the hub speaks alone, and there are no gates."""
    model = make()
    answer = last(model, Choice(("math",), max_new_tokens=8))
    assert all({"code"}.isdisjoint(gates) for token in answer.gates for gates in token.values())
    with model.set_active_experts(["math"]):
        assert answer.token_ids == generated(model)
    everyone = generated(model)
    with model.disable_adapter():
        alone = generated(model)
    for choice in (Choice((), max_new_tokens=8), Choice(EXPERTS, stitched=False, max_new_tokens=8)):
        answer = last(model, choice)
        assert answer.token_ids == alone and answer.gates == [{}] * 8
    assert generated(model) == everyone != alone


def test_at_most_so_many_experts():
    """The prompt is for all; after it, a token's gates are of the hub and one expert, and zero for the other."""
    model = make()
    answer = last(model, Choice(EXPERTS, max_active_experts=1, max_new_tokens=8))
    assert answer.token_ids == generated(model, max_active_experts=1)
    assert [sum(gate > 0 for gate in gates[3].values()) for gates in answer.gates] == [3] + [2] * 7
    assert last(model, Choice(EXPERTS, max_active_experts=2, max_new_tokens=8)).token_ids == generated(model)


def test_the_reader_goes_away():
    """Nothing is generated for nobody, and the model is as it was."""
    model = make()
    expected, before = generated(model), threading.active_count()
    tokens = stream(model, PROMPT, Choice(("math",), max_new_tokens=10_000))
    next(tokens)
    tokens.close()  # waits for the thread
    assert threading.active_count() == before
    assert generated(model) == expected
    assert model.base_model._forward.settings.observers == ()


def test_an_error_reaches_the_reader():
    model = make()
    with pytest.raises(ValueError, match="num_return_sequences"):
        last(model, Choice(EXPERTS), num_return_sequences=3)
    with pytest.raises(ValueError, match="the prompt has no tokens"):
        last(model, Choice(EXPERTS), prompt=[])
    assert last(model, Choice(EXPERTS, max_new_tokens=8)).token_ids == generated(model)


def test_temperature():
    """Sampled, and as the seed has it."""
    model = make()
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(last(model, Choice(EXPERTS, temperature=2.0, max_new_tokens=8)).token_ids)
    assert found[0] == found[1] != generated(model)


def test_other_threads_are_not_shown():
    """A forward of somebody else meanwhile leaves the gates alone."""
    model = make()
    expected = last(model, Choice(EXPERTS, max_new_tokens=8))
    tokens = stream(model, PROMPT, Choice(EXPERTS, max_new_tokens=8))
    for _ in range(8):
        answer = next(tokens)
        with torch.no_grad():
            model(input_ids=torch.tensor([[7, 7, 7]]))
    assert answer.gates == expected.gates
