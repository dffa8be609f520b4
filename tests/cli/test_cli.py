"""The command line: what it prints, for people and programs, and its exit codes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import peft_bts
from peft_bts import StitchConfig, check_compatibility, plan, trace_gates
from peft_bts_cli import app
from tests.helpers.models import IDS, fresh, logits, randomize
from tests.helpers.text import word_tokenizer, write_documents
from tests.helpers.zoo import tiny_config


@pytest.fixture
def folders(tmp_path):
    """Configs of a hub and of experts that fit (`code`) or do not (`short`); no weights."""
    for name, sizes in {"hub": {}, "code": {"layers": 6, "width": 48}, "short": {"vocab": 48}}.items():
        tiny_config("llama", **sizes).save_pretrained(tmp_path / name)
    return tmp_path


@pytest.fixture
def adapter(tmp_path):
    """A saved adapter on saved models, and the model as it was saved."""
    fresh("llama").save_pretrained(tmp_path / "hub")
    fresh("gpt2", seed=1, width=48).save_pretrained(tmp_path / "gpt")
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(fresh("llama"), lora).save_pretrained(tmp_path / "lora")
    experts = {"code": str(tmp_path / "gpt"), "tax": str(tmp_path / "lora")}

    def make(**options):
        hub = AutoModelForCausalLM.from_pretrained(tmp_path / "hub")
        config = StitchConfig(task_type="CAUSAL_LM", experts=experts, **{"num_stitches": 2, "output": "hub"} | options)
        model = get_peft_model(hub, config)
        randomize(model).eval().save_pretrained(tmp_path / "adapter")
        return str(tmp_path / "adapter"), model

    return make


def call(*arguments, code=0):
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output

    return result


def test_check(folders):
    """Exit code 0 if all experts fit, else 1, with the reports on stdout either way."""
    hub = ("check", "--hub", folders / "hub", "--expert", f"code={folders / 'code'}")
    assert "Expert 'code' fits the hub." in call(*hub).stdout
    data = json.loads(call(*hub, "--json").stdout)
    report = check_compatibility(str(folders / "hub"), str(folders / "code"), name="code")
    assert data == {"ok": True, "experts": {"code": report.to_dict()}}
    both = (*hub, "--expert", f"s={folders / 'short'}")
    result = call(*both, code=1)
    assert "Expert 'code' fits" in result.stdout and "Expert 's' does not fit" in result.stdout
    data = json.loads(call(*both, "--json", code=1).stdout)
    assert not data["ok"] and data["experts"]["code"]["ok"] and not data["experts"]["s"]["ok"]


def test_plan(folders):
    """The options reach the config; the figures are those of `plan`."""
    options = ["--num-stitches", 2, "--gate", "token", "--no-gate-bias", "--r", 4, "--pattern", "experts_into_hub"]
    options += ["--gate-dropout", 0.5]
    command = ("plan", "--hub", folders / "hub", "--expert", f"code={folders / 'code'}", "--sequence-length", 8)
    data = json.loads(call(*command, *options, "--json").stdout)
    config = StitchConfig(
        task_type="CAUSAL_LM",
        num_stitches=2,
        gate="token",
        gate_bias=False,
        r=4,
        pattern="experts_into_hub",
        gate_dropout=0.5,
    )
    estimate = plan(str(folders / "hub"), {"code": str(folders / "code")}, config, sequence_length=8)
    assert data == estimate.to_dict()
    text = call(*command).stdout
    assert "stitches" in text and "models in bfloat16" in text
    layers = json.loads(call(*command, "--layers-to-stitch", 1, "--layers-to-stitch", 3, "--json").stdout)
    assert layers["stitches"] == json.loads(call(*command, "--num-stitches", 2, "--json").stdout)["stitches"]


def test_inspect(adapter):
    """Everything an adapter's files tell; norms against the loaded model's own weights."""
    folder, model = adapter()
    data = json.loads(call("inspect", folder, "--json").stdout)
    tensors = load_file(f"{folder}/adapter_model.safetensors")
    assert data["weights"] == sum(t.numel() for t in tensors.values()) and data["weights_outside_of_stitches"] == 0
    assert data["experts"]["code"]["model"].endswith("gpt") and data["experts"]["tax"]["adapter"].endswith("lora")
    assert {layer: stitch["kind"] for layer, stitch in data["stitches"].items()} == {
        "1": "hub_into_experts",
        "3": "experts_into_hub",
    }
    layers = model.base_model.model.model.layers
    for layer, stitch in data["stitches"].items():
        real = layers[int(layer)].stitch_layer["default"]
        assert list(stitch["models"]) == sorted(real.gate.names())
        for name, found in stitch["models"].items():
            gate = real.gate.of(name)
            assert found["gate_weight_rms"] == pytest.approx(gate.weight.pow(2).mean().sqrt().item(), rel=1e-5)
            assert found["gate_bias_rms"] == pytest.approx(gate.bias.pow(2).mean().sqrt().item(), rel=1e-5)
            if name == "hub":
                assert found["proj_distance"] is None
                continue
            weight = real.proj.of(name).weight
            identity = torch.eye(*weight.shape)
            assert found["proj_shape"] == list(weight.shape)
            assert found["proj_distance"] == pytest.approx(
                ((weight - identity).norm() / identity.norm()).item(), rel=1e-4
            )
    text = call("inspect", folder).stdout
    for word in ("code", "tax", "LoRA on the hub", "experts-into-hub", f"{data['weights']:,} weights in 2 stitches"):
        assert word in text


@pytest.mark.parametrize("options", [{}, {"num_stitches": 0}, {"evidence": 0.8}], ids=str)
def test_inspect_output_gates(adapter, options):
    folder, model = adapter(output="mixture", **options)
    data = json.loads(call("inspect", folder, "--json").stdout)
    assert data["options"]["output"] == "mixture" and data["weights_outside_of_stitches"] == 0
    gates = model.base_model.model.stitch_output["default"].gate
    assert list(data["output_gates"]) == sorted(gates.names())
    for name, found in data["output_gates"].items():
        expected = gates.of(name).weight.pow(2).mean().sqrt().item()
        assert found["gate_weight_rms"] == pytest.approx(expected, rel=1e-5)
    weight = model.base_model.model.stitch_output["default"].evidence_weight.item() if "evidence" in options else None
    assert data["evidence_weight"] == weight and data["options"]["evidence"] == options.get("evidence")
    text = call("inspect", folder).stdout
    assert "stitches and output gates" in text and ("Weight of the evidence" in text) == ("evidence" in options)
    assert "mixture of what all models say" in Path(folder, "README.md").read_text()


def test_inspect_low_rank(adapter):
    """The distance of a low-rank projection is that of the matrix it stands for; models need not be there."""
    folder, model = adapter(r=3, gate_bias=False)
    found = json.loads(call("inspect", folder, "--json").stdout)["stitches"]["3"]["models"]["code"]
    proj = model.base_model.model.model.layers[3].stitch_layer["default"].proj.of("code")
    matrix = proj(torch.eye(48)).T.detach()  # of which the identity is a part
    identity = torch.eye(32, 48)
    assert found["proj_distance"] == pytest.approx(((matrix - identity).norm() / identity.norm()).item(), rel=1e-4)
    assert found["gate_bias_rms"] is None and found["proj_shape"] == [32, 48]


def test_export(adapter, tmp_path):
    folder, model = adapter()
    assert json.loads(call("export", folder, tmp_path / "out", "--json").stdout) == {"folder": str(tmp_path / "out")}
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(exported(input_ids=IDS).logits, logits(model), atol=1e-4)


@pytest.fixture
def texts(tmp_path):
    """Files of documents of unequal lengths, and the documents of each, as the tokens of `word_tokenizer`."""
    write_documents(tmp_path / "code.jsonl", 2, count=5, length=9)
    with open(tmp_path / "code.jsonl", "a") as file:
        file.write(json.dumps({"text": "w7"}) + "\n\n" + json.dumps({"text": "w8 w9 w10", "other": 1}) + "\n")
    (tmp_path / "plain.txt").write_text("w3 w4\nw5 " * 10)
    code = [json.loads(line)["text"] for line in (tmp_path / "code.jsonl").read_text().splitlines() if line]
    tokens = {"code": code, "plain": [(tmp_path / "plain.txt").read_text()]}
    return {name: [[int(word[1:]) for word in text.split()] for text in docs] for name, docs in tokens.items()}


@torch.no_grad()
def plain_loss(model, rows):
    """Mean negative log-likelihood, row by row, without padding."""
    total = count = 0
    for row in rows:
        log_probabilities = model(input_ids=torch.tensor([row])).logits[0].double().log_softmax(-1)
        total -= sum(log_probabilities[i, token].item() for i, token in enumerate(row[1:]))
        count += len(row) - 1
    return total / count


def test_eval(adapter, texts, tmp_path):
    """Hub, experts and stitched model against transformers' and PEFT's own models, row by row."""
    folder, model = adapter()
    word_tokenizer().save_pretrained(tmp_path / "hub")
    domains = ["--data", f"code={tmp_path / 'code.jsonl'}", "--data", f"plain={tmp_path / 'plain.txt'}"]
    command = ("eval", folder, *domains, "--device", "cpu")
    result = call(*command, "--sequence-length", 8, "--batch-size", 3, "--json")
    assert "100%" in result.stderr
    data = json.loads(result.stdout)
    rows = {name: [doc[i : i + 8] for doc in docs for i in range(0, len(doc), 8)] for name, docs in texts.items()}
    rows = {name: [row for row in found if len(row) > 1] for name, found in rows.items()}
    plain = {
        "hub": AutoModelForCausalLM.from_pretrained(tmp_path / "hub"),
        "code": AutoModelForCausalLM.from_pretrained(tmp_path / "gpt"),
        "tax": PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "hub"), tmp_path / "lora"),
        "stitched": model,
    }
    found = {"hub": data["hub"], **data["experts"], "stitched": data["stitched"]}
    for who, one in plain.items():
        for name in texts:
            expected = plain_loss(one.eval(), rows[name])
            assert found[who][name]["loss"] == pytest.approx(expected, rel=1e-5)
            assert found[who][name]["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert len({found[who]["code"]["loss"] for who in plain}) == 4
    assert data["sequence_length"] == 8 and data["data"]["plain"] == {
        "file": str(tmp_path / "plain.txt"),
        "documents": 1,
        "bytes": os.path.getsize(tmp_path / "plain.txt"),
        "rows": 4,
        "predicted_tokens": 30 - 4,
    }
    text = call(*command).stdout
    assert "tax expert" in text and "rows of 128 tokens" in text  # the models' positions, fewer than 1024


UNMARKED = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% if m['role'] == 'assistant' %}<end> {% endif %}"
)
UNMARKED += "{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"


@pytest.mark.parametrize("template", [None, UNMARKED], ids=["marked", "unmarked"])
def test_eval_of_chats(adapter, tmp_path, template):
    """The loss is over what the assistant says, in every turn and row, whether or not the template marks it."""
    folder, model = adapter()
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    chats = [
        [("user", "w3 w4"), ("assistant", "w5 w6 w7"), ("user", "w8"), ("assistant", "w9")],
        [("user", "w10"), ("assistant", "w11 w12")],
    ]
    rows = [{"messages": [{"role": role, "content": content} for role, content in chat]} for chat in chats]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"text": "w13 w14 w15"}]))
    command = ("eval", folder, "--data", f"chat={tmp_path / 'chat.jsonl'}", "--device", "cpu")
    data = json.loads(call(*command, "--json").stdout)
    total = count = 0
    for chat in [*chats, None]:
        words, said = ["w13", "w14", "w15"], [True] * 3
        if chat is not None:
            words, said = [], []
            for role, content in chat:
                content = content.split() + ["<end>"] * (role == "assistant")
                words += [role, *content]
                said += [False, *[role == "assistant"] * len(content)]
        ids = tokenizer.convert_tokens_to_ids(words)
        with torch.no_grad():
            log_probabilities = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        places = [place for place in range(1, len(ids)) if said[place]]
        total -= sum(log_probabilities[place - 1, ids[place]].item() for place in places)
        count += len(places)
    assert data["data"]["chat"]["predicted_tokens"] == count == 4 + 2 + 3 + 2
    assert data["stitched"]["chat"]["loss"] == pytest.approx(total / count, rel=1e-5)
    gates = json.loads(call("gates", folder, "--file", tmp_path / "chat.jsonl", "--device", "cpu", "--json").stdout)
    assert gates["rows"][0]["tokens"] == 13 + 6 + 3  # every token has gates

    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    (tmp_path / "adapter" / "chat_template.jinja").unlink(missing_ok=True)
    assert "no chat template" in call(*command, code=1).stderr


def test_eval_limits(adapter, texts, tmp_path):
    """`--max-tokens` ends amid a document; the adapter's own tokenizer comes before the hub's."""
    folder, model = adapter()
    word_tokenizer().save_pretrained(folder)
    command = ("eval", folder, "--data", f"code={tmp_path / 'code.jsonl'}", "--device", "cpu")
    data = json.loads(call(*command, "--max-tokens", 13, "--json").stdout)
    rows = [texts["code"][0], texts["code"][1][:4]]
    assert data["stitched"]["code"]["loss"] == pytest.approx(plain_loss(model, rows), rel=1e-5)
    size = sum(len(f"w{token}") + 1 for row in rows for token in row) - 2
    assert data["data"]["code"]["bytes"] == size and data["data"]["code"]["documents"] == 2
    result = call(*command, "--sequence-length", 200, code=1)
    assert "--sequence-length 200 is more than the 128 positions of the hub." in result.stderr
    assert "--device nowhere cannot be used" in call(*command[:-1], "nowhere", code=1).stderr
    (tmp_path / "one.txt").write_text("w3")
    assert "no two tokens" in call("eval", folder, "--data", f"a={tmp_path / 'one.txt'}", code=1).stderr


def test_gates(adapter, texts, tmp_path):
    """The gates are those of the texts' tokens one by one, whatever the batches; page and figure are written."""
    folder, model = adapter()
    word_tokenizer().save_pretrained(folder)
    page, figure = tmp_path / "gates.html", tmp_path / "gates.png"
    files = ("--file", f"a={tmp_path / 'code.jsonl'}", "--file", tmp_path / "plain.txt", "--text", "w3 w4")
    command = ("gates", folder, *files, "--device", "cpu")
    data = json.loads(call(*command, "--html", page, "--png", figure, "--json").stdout)
    with trace_gates(model) as trace:
        for name, docs in {"a": texts["code"], "plain": texts["plain"], "text": [[3, 4]]}.items():
            for doc in docs:
                with trace.domain(name):
                    logits(model, torch.tensor([doc]))

    def assert_same(rows, expected):
        assert len(rows) == len(expected)
        for row, one in zip(rows, expected):
            for key in ("domain", "layer", "kind", "tokens"):
                assert row[key] == one[key]
            assert row["gates"] == pytest.approx(one["gates"], rel=1e-5)
            assert row["entropy"] == pytest.approx(one["entropy"], rel=1e-5)

    assert_same(data["rows"], trace.table().rows)
    assert data["data"]["text"] == {"documents": 1, "bytes": 5, "tokens": 2}
    assert data["written"] == [str(page), str(figure)]
    assert "<html" in page.read_text() and figure.read_bytes().startswith(b"\x89PNG")
    by_stitch = json.loads(call(*command, "--by", "stitch", "--json").stdout)
    assert_same(by_stitch["rows"], trace.table(by=("domain", "stitch")).rows)
    first = json.loads(call(*command, "--stitch", 0, "--max-tokens", 3, "--json").stdout)
    assert [row["tokens"] for row in first["rows"]] == [3, 3, 2] and first["rows"][0]["layer"] == 1
    assert "plain" in call(*command).stdout
    assert "2 stitches" in call(*command, "--stitch", 2, code=1).stderr
    assert "no tokens" in call("gates", folder, "--text", " ", code=1).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "--hub", "HUB", "--expert", "code=CODE", "--num-stitches", "9"), "num_stitches=9 does not fit"),
        (("plan", "--hub", "HUB", "--expert", "s=SHORT"), "'s' has 48 token embeddings"),
        (("plan", "--hub", "HUB", "--expert", "a.b=CODE"), "'a.b' is not usable"),
        (("check", "--hub", "NOTHING", "--expert", "code=CODE"), "hub's config could not be read"),
        (("check", "--hub", "LORA", "--expert", "code=CODE"), "is a LORA adapter, not a model"),
        (("plan", "--hub", "NOTHING", "--expert", "code=CODE"), "there is no such folder"),
        (("plan", "--hub", "TEXT", "--expert", "code=CODE"), "text.txt' is a file"),
        (("inspect", "NOTHING"), "there is no such folder"),
        (("inspect", "HUB"), "no adapter_config.json"),
        (("inspect", "LORA"), "is a LORA adapter, expected a STITCH adapter"),
        (("export", "NOTHING", "out"), "there is no such folder"),
        (("export", "LORA", "out"), "is a LORA adapter, expected a STITCH adapter"),
        (("eval", "LORA", "--data", "code=NOTHING"), "No such file"),
        (("eval", "LORA", "--data", "code=EMPTY"), "empty.txt holds no text"),
        (("eval", "LORA", "--data", "code=ROWS"), "rows.jsonl, line 2: expected a JSON object with 'text'"),
        (("eval", "LORA", "--data", "code=CHATS"), "chats.jsonl, line 1: expected `messages` to be a list"),
        (("eval", "LORA", "--data", "code=ROWS", "--text-column", "n"), "rows.jsonl, line 1: 'n' is not a string"),
        (("eval", "LORA", "--data", "code=BYTES"), "not UTF-8"),
        (("eval", "LORA", "--data", "code=TEXT"), "is a LORA adapter, expected a STITCH adapter"),
        (("gates", "NOTHING", "--text", "w3"), "NOTHING"),
        (("gates", "x", "--text", "w3", "--png", "NOTHING/a.png"), "There is no folder"),
        (("run", "no_such_module"), "no module 'no_such_module'"),
    ],
    ids=" ".join,
)
def test_problems(folders, arguments, message):
    """A problem is one line on stderr, no traceback, and exit code 1."""
    LoraConfig(task_type="CAUSAL_LM").save_pretrained(folders / "lora")
    (folders / "text.txt").write_text("w3 w4")
    (folders / "empty.txt").write_text("")
    (folders / "rows.jsonl").write_text('{"text": "w3", "n": 1}\n{"n": 2}\n')
    (folders / "chats.jsonl").write_text('{"messages": "w3"}\n')
    (folders / "bytes.txt").write_bytes(b"\xff\xfe")
    places = {"HUB": "hub", "CODE": "code", "SHORT": "short", "LORA": "lora", "TEXT": "text.txt"}
    places |= {"EMPTY": "empty.txt", "ROWS": "rows.jsonl", "CHATS": "chats.jsonl", "BYTES": "bytes.txt"}
    for word, name in places.items():
        arguments = [a.replace(word, str(folders / name)) for a in arguments]
    result = call(*[a.replace("NOTHING", str(folders / "NOTHING")) for a in arguments], code=1)
    assert result.stderr.count("\n") == 1 and result.stderr.startswith(f"peft-bts {arguments[0]}: ")
    assert message in result.stderr and not result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "--hub", "x"),
        ("check", "--hub", "x", "--expert", "code"),
        ("plan", "--hub", "x", "--expert", "a=b", "--expert", "a=c"),
        ("plan", "--hub", "x", "--expert", "a=b", "--gate", "head"),
        ("inspect",),
        ("eval", "x"),
        ("eval", "x", "--data", "code"),
        ("eval", "x", "--data", "a=b", "--max-tokens", "0"),
        ("eval", "x", "--data", "a=b", "--dtype", "int4"),
        ("gates", "x"),
        ("gates", "x", "--file", "a/code.py", "--file", "b/code.py"),
        ("run",),
        ("nonsense",),
    ],
    ids=" ".join,
)
def test_usage(arguments):
    """A wrong call is exit code 2."""
    assert "Usage" in call(*arguments, code=2).stderr


def test_version():
    assert call("--version").stdout == f"peft_bts {peft_bts.__version__}\n"
    assert "inspect, evaluate, show, export and push" in " ".join(call("--help").stdout.split())


def test_as_a_module():
    """`python -m peft_bts` is the same program."""
    command = [sys.executable, "-m", "peft_bts", "inspect", "nowhere"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1 and "peft-bts inspect: " in run.stderr and "Traceback" not in run.stderr


def test_run(adapter, tmp_path):
    """A program that loads an adapter, and has never heard of this package, gets its arguments and its exit code."""
    folder, _ = adapter()
    program = "import sys; from peft import AutoPeftModelForCausalLM as A; A.from_pretrained(sys.argv[1]); sys.exit(7)"
    (tmp_path / "stranger.py").write_text(program)
    command = [sys.executable, "-m", "peft_bts", "run", "stranger", folder, "--help"]
    path = os.pathsep.join([str(tmp_path), os.getcwd(), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert run.returncode == 7, run.stderr
