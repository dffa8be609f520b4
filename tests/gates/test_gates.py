"""Traced gates are those of the equations, of every token, and tracing leaves no trace."""

import copy
import gc
import json
import math
import threading
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, CompileConfig, DynamicCache, GenerationConfig

from peft_bts import trace_gates
from peft_bts.stitch import HUB
from tests.helpers import reference
from tests.helpers.models import FAMILIES, IDS, LEFT, MASKS, both, expected_logits, fresh, logits, stitch


CHANNEL, TOKEN, INTO_HUB = {}, {"gate": "token", "r": 2}, {"pattern": "experts_into_hub", "gate_bias": False}
# A bloom hub has no positions to give to the reference's gpt2 expert, which counts padding then.
CASES = [(arch, CHANNEL, mask) for arch in FAMILIES for mask in ("full", "left") if (arch, mask) != ("bloom", "left")]
CASES += [(arch, options, "left") for arch in ("llama", "gpt2") for options in (TOKEN, INTO_HUB)]
CASES += [("llama", options, "right") for options in (CHANNEL, TOKEN, INTO_HUB)]
MIXTURE, GATES_ALONE = {"output": "mixture"}, {"output": "mixture", "num_stitches": 0}
CASES += [(arch, options, "left") for arch in FAMILIES[:-2] for options in (MIXTURE, GATES_ALONE)]


def make(arch="llama", **options):
    """A stitched model of one architecture, and plain copies of hub and experts for the reference."""
    hub, plain = both(arch)
    experts = {"code": both(arch, seed=1), "math": both("gpt2", seed=2, layers=3, width=48)}
    model = stitch(hub, {name: mine for name, (mine, _) in experts.items()}, **options)
    return model, plain, {name: other for name, (_, other) in experts.items()}


def reference_gates(model, plain, experts, monkeypatch, mask=None, ids=IDS):
    """By stitch: {model: (B, T)}, from the adapter file's tensors and the hidden states that plain models exchange."""
    met = []
    apply = reference.Stitch.__call__
    monkeypatch.setattr(
        reference.Stitch, "__call__", lambda self, states: met.append((self, states["hub"])) or apply(self, states)
    )
    mixed = []
    mix = reference.output_mixture

    def output_mixture(h_hub, logits, gate, *args):
        mixed.append({name: reference.linear(h_hub, *one)[..., 0] for name, one in gate.items()})
        return mix(h_hub, logits, gate, *args)

    monkeypatch.setattr(reference, "output_mixture", output_mixture)
    expected_logits(model, plain, experts, ids, attention_mask=mask)
    gates = []
    for one, h_hub in met:
        logits = {name: reference.linear(h_hub, *gate) for name, gate in one.gate.items()}
        if one.into_hub:
            total = sum(torch.exp(logit) for logit in logits.values())
            values = {name: torch.exp(logit) / total for name, logit in logits.items()}
        else:
            values = {name: 1 / (1 + torch.exp(-logit)) for name, logit in logits.items()}
        gates.append({name: value.mean(-1) for name, value in values.items()})
    for logits in mixed:
        total = sum(torch.exp(logit) for logit in logits.values())
        gates.append({name: torch.exp(logit) / total for name, logit in logits.items()})
    return gates


def check_equal(trace, expected, mask=None, ids=IDS):
    """All gates of a trace, against {model: (B, T)} by stitch; padding is to be left out."""
    assert len(trace.stitches) == len(expected)
    assert len(trace.sequences) == len(ids)
    for row, sequence in enumerate(trace.sequences):
        keep = torch.ones(ids.shape[1], dtype=torch.bool) if mask is None else mask[row].bool()
        assert sequence.token_ids == ids[row][keep].tolist()
        for one, gates, by_model in zip(trace.stitches, sequence.gates, expected):
            assert set(one.models) == set(by_model)
            for column, name in enumerate(one.models):
                torch.testing.assert_close(gates[:, column], by_model[name][row][keep], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch, options, mask", CASES)
def test_gates_equal_the_equations(arch, options, mask, monkeypatch):
    """Softmax over all models, or a sigmoid, of a linear map of the hub's state, from the tensors of the file."""
    model, plain, experts = make(arch, **options)
    with trace_gates(model) as trace:
        logits(model, attention_mask=MASKS[mask])
    expected = reference_gates(model, plain, experts, monkeypatch, MASKS[mask])
    check_equal(trace, expected, MASKS[mask])
    assert trace.sequences[0].gates[-1].std(0).min() > 1e-3  # gates do differ from token to token


@pytest.mark.parametrize("options", [CHANNEL, MIXTURE, GATES_ALONE], ids=str)
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("arch", ["llama", "gemma2", "bloom", "bamba"])
def test_generate_equals_one_forward(arch, cache, options):
    """A prompt and cached steps have the gates of one forward over all tokens; the two parts are told apart."""
    model, _, _ = make(arch, **options)
    with trace_gates(model) as trace:
        out = model.generate(IDS, attention_mask=LEFT, max_new_tokens=5, do_sample=False, cache_implementation=cache)
    mask = torch.cat([LEFT, torch.ones(2, 4, dtype=torch.long)], 1)
    with trace_gates(model) as whole:
        places = {} if arch == "bloom" else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}  # as in generate()
        logits(model, out[:, :-1], attention_mask=mask, **places)  # the last token was not fed back
    assert [sum(s.generated) for s in trace.sequences] == [4, 4]
    assert not any(sum(s.generated) for s in whole.sequences)
    for sequence, expected in zip(trace.sequences, whole.sequences, strict=True):
        assert sequence.token_ids == expected.token_ids
        assert sequence.generated == [False] * (len(expected) - 4) + [True] * 4
        torch.testing.assert_close(sequence.gates, expected.gates, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["argument", "config", "model"])
def test_finished_rows_are_left_out(how):
    """Behind its end token a row only waits for the others; it has nothing to say about gates any more."""
    model, _, _ = make()
    model.generation_config.update(max_new_tokens=8, do_sample=False, pad_token_id=0)
    free = model.generate(IDS, max_new_tokens=8, do_sample=False)[:, IDS.shape[1] :]
    end = next(token for token in free[0].tolist() if token not in free[1])
    config = GenerationConfig(eos_token_id=end if how == "config" else None, max_new_tokens=8)
    if how == "model":
        model.generation_config.eos_token_id = end
    with trace_gates(model) as trace:
        model.generate(IDS, **{"eos_token_id": end} if how == "argument" else {"generation_config": config})
    first, second = trace.sequences
    assert first.token_ids[-1] == end
    assert [sum(s.generated) for s in (first, second)] == [free[0].tolist().index(end) + 1, 7]


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": "copy"},
        {"num_return_sequences": 2, "do_sample": True},
        {"guidance_scale": 1.5, "negative_prompt_ids": IDS[:1, :3]},
        {"prefill_chunk_size": 5},
        {"use_cache": False},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("config", [CHANNEL, GATES_ALONE], ids=["stitches", "gates alone"])
def test_modes_of_generate(options, config):
    """Sequences that are continued token by token come out whole, whatever was drafted, rejected or chunked."""
    model, _, _ = make(**config)
    if "assistant_model" in options:
        options = {"assistant_model": fresh("llama")}
    prompt = torch.cat([IDS[:1], IDS[:1]], 1)
    torch.manual_seed(0)
    with trace_gates(model) as trace:
        out = model.generate(prompt, max_new_tokens=8, **{"do_sample": False} | options)
    if "num_beams" in options:
        assert [len(s) for s in trace.sequences] == [31] * 3
        return
    assert len(trace.sequences) == (2 if {"num_return_sequences", "guidance_scale"} & options.keys() else 1)
    if "guidance_scale" in options:
        assert trace.sequences[1].generated == [False] * 3 + [True] * 7
        assert trace.sequences[1].token_ids == [*IDS[0, :3].tolist(), *out[0, 24:-1].tolist()]
    with trace_gates(model) as whole:
        logits(model, out)
    for sequence, row, expected in zip(trace.sequences, out, whole.sequences):
        assert len(sequence) in (31, 32)  # an accepted draft may be the last token
        assert sequence.token_ids == row[: len(sequence)].tolist()
        assert sequence.generated == [False] * 24 + [True] * (len(sequence) - 24)
        torch.testing.assert_close(
            sequence.gates, [gates[: len(sequence)] for gates in expected.gates], rtol=1e-4, atol=1e-5
        )


def test_caches_are_not_kept():
    """A trace of many generations must not hold the memory of their caches."""
    model, _, _ = make()
    with trace_gates(model) as trace:
        out = model.generate(IDS, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        cache = weakref.ref(out.past_key_values)
        del out
        gc.collect()
        assert cache() is None
    assert [sum(s.generated) for s in trace.sequences] == [2, 2]


def test_conversation():
    """The next turn continues the sequence of its cache; a copied cache starts another."""
    model, _, _ = make()
    cache = DynamicCache(config=model.config)
    with trace_gates(model) as trace:
        first = model.generate(IDS[:1], past_key_values=cache, max_new_tokens=4, do_sample=False)
        other = copy.deepcopy(cache)
        turn = torch.cat([first, IDS[1:, :3]], 1)
        second = model.generate(turn, past_key_values=cache, max_new_tokens=4, do_sample=False)
        model.generate(turn, past_key_values=other, max_new_tokens=4, do_sample=False)
    both_turns, again = trace.sequences
    assert both_turns.token_ids == second[0, :-1].tolist()
    assert both_turns.generated == [False] * 12 + [True] * 3 + [False] * 4 + [True] * 3
    assert again.token_ids == second[0, 15:-1].tolist() and again.generated == [False] * 4 + [True] * 3


def hooks_and_state(model):
    """What a trace could leave behind."""
    hooks = [
        (name, dict(module._forward_hooks), dict(module._forward_pre_hooks), sorted(vars(module)))
        for name, module in model.named_modules()
    ]
    return hooks, dict(vars(model.base_model._forward))


def test_nothing_is_left_behind():
    """Bitwise the same logits during and after, no hook, no attribute, also after errors inside and in a forward."""
    model, _, _ = make()
    before, state = logits(model), hooks_and_state(model)
    with trace_gates(model) as outer:
        assert torch.equal(logits(model), before)
        with pytest.raises(ZeroDivisionError), trace_gates(model) as inner:
            logits(model)
            raise ZeroDivisionError
        with pytest.raises(IndexError):
            logits(model, torch.full((1, 4), 10_000))
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)
    now = hooks_and_state(model)
    assert now[0] == state[0] and now[1].keys() == state[1].keys()
    assert len(outer.sequences) == 6 and len(inner.sequences) == 2  # the forward that failed is not half recorded


def test_a_copy_is_not_traced():
    """A copy made meanwhile starts untraced, and the trace stays with the model."""
    model, _, _ = make()
    with trace_gates(model) as trace:
        logits(copy.deepcopy(model))
        assert not trace.sequences
    assert not copy.deepcopy(model).base_model._forward.settings.observers


def test_other_threads_are_not_recorded():
    """A server's other requests do not get into this one's trace."""
    model, _, _ = make()
    with trace_gates(model) as trace:
        thread = threading.Thread(target=logits, args=(model,))
        thread.start()
        thread.join()
        assert not trace.sequences
        logits(model, IDS[:1])
    assert len(trace.sequences) == 1


def test_other_threads_generate_meanwhile():
    """A call that begins in another thread during a traced one, and outlives it, is served; the flags are our own."""
    model, _, _ = make()
    options = {"max_new_tokens": 5, "do_sample": False}
    with trace_gates(model) as alone:
        expected = [model.generate(IDS[:, :width], **options) for width in (5, 12)]
    theirs_runs, ours_is_over = threading.Event(), threading.Event()

    def theirs_waits(ids, scores):
        theirs_runs.set()
        assert ours_is_over.wait(60)
        return scores

    def ours_waits(ids, scores):
        if ids.shape[1] == 6:
            thread.start()
            assert theirs_runs.wait(60)
        return scores

    found = []
    thread = threading.Thread(
        target=lambda: found.append(model.generate(IDS, logits_processor=[theirs_waits], **options))
    )
    with trace_gates(model) as trace:
        found.append(model.generate(IDS[:, :5], logits_processor=[ours_waits], **options))
        ours_is_over.set()
        thread.join()
    assert len(found) == 2 and all(torch.equal(*pair) for pair in zip(found, expected))
    assert [s.generated for s in trace.sequences] == [s.generated for s in alone.sequences[:2]]


@pytest.mark.parametrize("options", [CHANNEL, MIXTURE, GATES_ALONE], ids=str)
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["stored", "recomputed", "reentrant"])
def test_train_mode(reentrant, options, monkeypatch):
    """In training every token is recorded once, also where activations are recomputed; gradients do not change."""
    model, plain, experts = make(**options)
    model.train()
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})

    def gradients():
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    expected = gradients()
    with trace_gates(model) as trace:
        actual = gradients()
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    check_equal(trace, reference_gates(model, plain, experts, monkeypatch))


def test_dropout_is_recorded_as_used():
    """In training with gate dropout, the gates are those that the forward used, not those it might have used."""
    model, _, _ = make(gate_dropout=0.5)
    with trace_gates(model) as trace:
        logits(model)
        logits(model.train())
    calm, dropped = trace.sequences[0].gates[-1], trace.sequences[2].gates[-1]
    assert (calm - dropped).abs().max() > 0.01
    torch.testing.assert_close(dropped.sum(1), torch.ones(12))


@pytest.mark.parametrize("options", [CHANNEL, MIXTURE, GATES_ALONE], ids=str)
def test_active_experts_and_switched_off_adapter(options):
    """Gates exist for models that ran; a forward of the hub alone has none."""
    model, _, _ = make(**options)
    with trace_gates(model) as trace:
        with model.disable_adapter():
            logits(model)
        with model.set_active_experts(["math"]):
            logits(model)
        logits(model)
    assert len(trace.sequences) == 4 and trace.stitches[-1].models == (HUB, "code", "math")
    for sequence in trace.sequences[:2]:
        assert sequence.gates[-1][:, 1].isnan().all()
        torch.testing.assert_close(sequence.gates[-1][:, [0, 2]].sum(1), torch.ones(12))
    assert "gate.code" not in trace.records[0]
    assert not torch.stack([s.gates[-1] for s in trace.sequences[2:]]).isnan().any()


@pytest.mark.parametrize("config", [CHANNEL, MIXTURE, GATES_ALONE], ids=str)
def test_exported_composition(config, tmp_path):
    """The standalone checkpoint runs the same stitches, and is traced alike."""
    model, _, _ = make(**config)
    model.export(tmp_path)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path)
    options = {"attention_mask": LEFT, "max_new_tokens": 4, "do_sample": False}
    with trace_gates(model) as expected, trace_gates(alone) as trace:
        assert torch.equal(model.generate(IDS, **options), alone.generate(IDS, **options))
    assert trace.stitches == expected.stitches
    for sequence, other in zip(trace.sequences, expected.sequences, strict=True):
        assert (sequence.token_ids, sequence.generated) == (other.token_ids, other.generated)
        torch.testing.assert_close(sequence.gates, other.gates)
    assert not alone.model._runner.settings.observers


@pytest.mark.parametrize("wrap", [lambda m: m.base_model, torch.nn.DataParallel], ids=["tuner", "wrapped"])
def test_what_can_be_traced(wrap):
    model, _, _ = make()
    with trace_gates(wrap(model)) as trace:
        logits(model)
    assert len(trace.sequences) == 2


def test_what_cannot_be_traced():
    for model in (fresh("llama"), get_peft_model(fresh("llama"), LoraConfig(task_type="CAUSAL_LM"))):
        with pytest.raises(TypeError, match="stitch"), trace_gates(model):
            pass


def test_embeddings_instead_of_ids():
    """Tokens that came as embeddings have gates and no ids."""
    model, _, _ = make()
    model.detach_expert("math")  # of another width
    with trace_gates(model) as trace:
        model(inputs_embeds=model.get_input_embeddings()(IDS))
    assert trace.sequences[0].token_ids == [None] * 12 and len(trace.sequences[0].gates[-1]) == 12


@pytest.mark.slow
@torch.no_grad()
def test_compiled_model():
    """A compiled model records too, and goes back to one graph afterwards."""
    torch._dynamo.reset()
    model = stitch(fresh("llama", layers=2), {"code": fresh("llama", seed=1, layers=2)}, num_stitches=2)
    fast = torch.compile(model, backend="aot_eager")
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)
    with trace_gates(model) as expected:
        logits(model)
    with trace_gates(fast) as trace:
        fast(input_ids=IDS, use_cache=False)
    for sequence, other in zip(trace.sequences, expected.sequences, strict=True):
        assert sequence.token_ids == other.token_ids
        torch.testing.assert_close(sequence.gates, other.gates)
    config = CompileConfig(backend="aot_eager", fullgraph=False, mode=None)
    config._compile_all_devices = True  # as generate() does by itself on a GPU, with a static cache
    options = {"attention_mask": LEFT, "max_new_tokens": 5, "do_sample": False, "cache_implementation": "static"}
    with trace_gates(model) as expected:
        model.generate(IDS, **options)
    with trace_gates(model) as trace:
        model.generate(IDS, **options, compile_config=config)
    for sequence, other in zip(trace.sequences, expected.sequences, strict=True):
        assert (sequence.token_ids, sequence.generated) == (other.token_ids, other.generated)
        torch.testing.assert_close(sequence.gates, other.gates)
    torch.testing.assert_close(whole(input_ids=IDS, use_cache=False).logits, logits(model), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


# --------------------------------------------------------------------------------------------------------- the table


def test_table():
    """Means, entropies and shares, computed again from the records."""
    model, _, _ = make()
    with trace_gates(model) as trace:
        with trace.domain("math"):
            logits(model, attention_mask=LEFT)
        with trace.domain("code"):
            model.generate(IDS, attention_mask=LEFT, max_new_tokens=3, do_sample=False)
    assert [(s.domain, len(s)) for s in trace.sequences] == [("math", 12), ("math", 8), ("code", 14), ("code", 10)]

    rows = trace.table().rows
    assert [(row["domain"], row["tokens"], row["layer"]) for row in rows] == [("math", 20, 3), ("code", 24, 3)]
    rows = trace.table(by=("domain", "phase", "stitch")).rows
    assert len(rows) == 3 * 4
    for row in rows:
        tokens = [
            {name: record[f"gate.{name}"] for name in row["gates"]}
            for record in trace.records
            if (record["domain"], record["stitch"]) == (row["domain"], row["stitch"])
            and record["generated"] == (row["phase"] == "generated")
        ]
        assert len(tokens) == row["tokens"]
        entropies, largest = [], math.log(3)
        for gates in tokens:
            if row["kind"] == "experts_into_hub":
                entropies.append(-sum(g * math.log(g) for g in gates.values()))
            else:
                binary = [-g * math.log(g) - (1 - g) * math.log(1 - g) for g in gates.values()]
                entropies.append(sum(binary) / len(binary))
                largest = math.log(2)
        assert row["entropy"] == pytest.approx(sum(entropies) / len(tokens))
        assert row["normalised_entropy"] == pytest.approx(sum(entropies) / len(tokens) / largest)
        for name, mean in row["gates"].items():
            assert mean == pytest.approx(sum(gates[name] for gates in tokens) / len(tokens))
            if row["kind"] == "experts_into_hub":
                wins = [max(gates, key=gates.get) == name for gates in tokens]
            else:
                wins = [gates[name] > 0.5 for gates in tokens]
            assert row["dominant"][name] == pytest.approx(sum(wins) / len(tokens))


def test_table_can_be_printed_and_read():
    model, _, _ = make()
    with trace_gates(model) as trace, trace.domain("code"):
        logits(model)
    table = trace.table(by=("domain", "stitch"))
    assert json.loads(table.to_json()) == table.to_dict() and len(table.to_dict()["rows"]) == 4
    printed = str(table)
    mean = f"{table.rows[-1]['gates']['hub']:.3f}"
    for word in ("domain", "code", "math", "hub", "normalised", "into experts", mean):
        assert word in printed


def test_table_errors():
    model, _, _ = make()
    with trace_gates(model) as trace:
        with pytest.raises(ValueError, match="Nothing was recorded"):
            trace.table()
        logits(model)
    with pytest.raises(ValueError, match="domain, sequence, phase, stitch"):
        trace.table(by="expert")
    with pytest.raises(IndexError):
        trace.table(stitch=4)
