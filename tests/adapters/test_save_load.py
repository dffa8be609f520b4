"""The adapter folder is a contract: other tools read it, and years later it must give the same model, bitwise."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from peft_bts import StitchConfig
from tests.helpers.zoo import tiny_model


torch.set_num_threads(1)

IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))
ROWS = torch.randint(3, 64, (16, 12), generator=torch.Generator().manual_seed(1))
DATASET = [{"input_ids": row, "labels": row} for row in ROWS]
OLD, NEW = "a" * 40, "b" * 40  # commits of a repository


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A seed and experts of other widths and depths, and a LoRA of the seed, on disk."""
    root = tmp_path_factory.mktemp("models")
    tiny_model("llama").save_pretrained(root / "seed")
    tiny_model("llama", seed=1, width=48).save_pretrained(root / "code")
    tiny_model("qwen3", seed=2, layers=6).save_pretrained(root / "math")
    tiny_model("gpt2", seed=3, layers=3).save_pretrained(root / "law")
    lora = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj"])
    get_peft_model(load(root, "seed"), lora).save_pretrained(root / "lora")
    return root


def load(root, name):
    return AutoModelForCausalLM.from_pretrained(root / name)


def config(root, experts="code math", **options):
    options = {"num_stitches": 2, "init_weights": False, "task_type": "CAUSAL_LM"} | options
    return StitchConfig(experts={name: str(root / name) for name in experts.split()}, **options)


def make(root, experts="code math", *, adapter_name="default", seed=0, **options):
    torch.manual_seed(seed)
    return get_peft_model(load(root, "seed"), config(root, experts, **options), adapter_name=adapter_name)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def train(model, folder, resume=None, **options):
    options = {"max_steps": 4, "save_strategy": "no", "learning_rate": 1e-2} | options
    args = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, report_to=[], use_cpu=True, **options
    )
    trainer = Trainer(model=model, args=args, train_dataset=DATASET, eval_dataset=DATASET[:4])
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def read(folder):
    """The tensors and the config of an adapter folder."""
    return load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text())


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    assert not [key for key in actual if not torch.equal(actual[key], expected[key])]


# ------------------------------------------------------------------------------------------------------- the format


def test_the_file_to_the_letter(root, tmp_path):
    """Keys, shapes and dtypes that other tools rely on; any change here breaks every adapter that was ever saved."""
    make(root).save_pretrained(tmp_path)
    tensors, _ = read(tmp_path)
    layers = "base_model.model.model.layers"
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {
        f"{layers}.1.stitch_layer.gate.code.weight": (48, 32),  # Hub-into-Experts
        f"{layers}.1.stitch_layer.gate.code.bias": (48,),
        f"{layers}.1.stitch_layer.gate.math.weight": (32, 32),
        f"{layers}.1.stitch_layer.gate.math.bias": (32,),
        f"{layers}.1.stitch_layer.proj.code.weight": (48, 32),
        f"{layers}.1.stitch_layer.proj.math.weight": (32, 32),
        f"{layers}.3.stitch_layer.gate.hub.weight": (32, 32),  # Experts-into-Hub
        f"{layers}.3.stitch_layer.gate.hub.bias": (32,),
        f"{layers}.3.stitch_layer.gate.code.weight": (32, 32),
        f"{layers}.3.stitch_layer.gate.code.bias": (32,),
        f"{layers}.3.stitch_layer.gate.math.weight": (32, 32),
        f"{layers}.3.stitch_layer.gate.math.bias": (32,),
        f"{layers}.3.stitch_layer.proj.code.weight": (32, 48),
        f"{layers}.3.stitch_layer.proj.math.weight": (32, 32),
    }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize("adapter_name", ["default", "mine"])
@pytest.mark.parametrize("hub", ["seed", "law"])
@pytest.mark.parametrize("r", [None, 3])
@pytest.mark.parametrize("gate", ["channel", "token"])
@pytest.mark.parametrize("gate_bias", [True, False])
@pytest.mark.parametrize("layers, into_hub", [([0, 2], [False, True]), ([1, 2], [True, True])])
def test_keys_and_shapes_of_every_option(root, tmp_path, adapter_name, hub, r, gate, gate_bias, layers, into_hub):
    """One tensor per model and role whatever the options, and the adapter's own name is nowhere."""
    layers = layers if hub == "law" else [layers[0], 3]
    model = get_peft_model(
        load(root, hub),
        config(
            root,
            "code",
            layers_to_stitch=layers,
            pattern="experts_into_hub" if all(into_hub) else "alternating",
            r=r,
            gate=gate,
            gate_bias=gate_bias,
        ),
        adapter_name=adapter_name,
    )
    model.save_pretrained(tmp_path)
    tensors, _ = read(tmp_path if adapter_name == "default" else tmp_path / adapter_name)
    expected = {}
    for layer, experts_into_hub in zip(layers, into_hub):
        path = f"base_model.model.{'model.layers' if hub == 'seed' else 'transformer.h'}.{layer}.stitch_layer"
        d_out, d_in = (32, 48) if experts_into_hub else (48, 32)
        for name in ["hub", "code"] if experts_into_hub else ["code"]:
            rows = 1 if gate == "token" else d_out
            expected[f"{path}.gate.{name}.weight"] = (rows, 32)
            if gate_bias:
                expected[f"{path}.gate.{name}.bias"] = (rows,)
        if r is None:
            expected[f"{path}.proj.code.weight"] = (d_out, d_in)
        else:
            expected[f"{path}.proj.code.down.weight"] = (r, d_in)
            expected[f"{path}.proj.code.up.weight"] = (d_out, r)
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == expected


def test_detaching_deletes_keys_and_attaching_adds_keys(root, tmp_path):
    """Expert by expert, so that a file can be edited without understanding fused weights."""
    model = make(root)
    model.save_pretrained(tmp_path / "both")
    model.detach_expert("math")
    model.save_pretrained(tmp_path / "code")
    model.attach_expert("law", str(root / "law"))
    model.save_pretrained(tmp_path / "code_law")
    both, code, code_law = (read(tmp_path / name)[0] for name in ("both", "code", "code_law"))
    assert_same(code, {key: tensor for key, tensor in both.items() if ".math." not in key})
    assert_same({key: tensor for key, tensor in code_law.items() if ".law." not in key}, code)
    assert {re.sub("law", "math", key) for key in code_law} == both.keys()


def test_the_config_to_the_letter(root, tmp_path):
    """Everything needed to build the model again, and nothing that could make a loader run code."""
    model = make(root, "math", num_stitches=3, r=2, gate="token", gate_dropout=0.1)
    model.attach_expert("code", str(root / "code"))
    model.attach_expert("lora", str(root / "lora"))
    model.save_pretrained(tmp_path)
    _, saved = read(tmp_path)
    assert saved["peft_type"] == "STITCH" and saved["task_type"] == "CAUSAL_LM" and saved["inference_mode"] is True
    assert saved["base_model_name_or_path"] == str(root / "seed") and saved["peft_version"] == peft.__version__
    options = ("num_stitches", "layers_to_stitch", "pattern", "expert_streams", "gate", "gate_bias", "gate_dropout")
    assert [saved[option] for option in options] == [3, None, "alternating", "intact", "token", True, 0.1]
    assert (saved["r"], saved["init_weights"], saved["modules_to_save"]) == (2, False, None)

    own = {*options, "experts", "r", "init_weights", "modules_to_save", "target_modules"}
    assert set(saved) == own | {field.name for field in dataclasses.fields(PeftConfig)}

    seed = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 4, "vocab_size": 64}
    experts = {name: {k: v for k, v in ref.items() if v is not None} for name, ref in saved["experts"].items()}
    assert experts == {
        "math": {"model": str(root / "math"), "config": seed | {"model_type": "qwen3", "num_hidden_layers": 6}},
        "code": {"model": str(root / "code"), "config": seed | {"hidden_size": 48}},
        "lora": {"adapter": str(root / "lora"), "config": seed},
    }
    assert "trust_remote_code" not in json.dumps(saved)


def test_a_config_file_cannot_ask_for_trust(root, tmp_path):
    """A downloaded adapter_config.json must not be able to switch `trust_remote_code` on."""
    make(root).save_pretrained(tmp_path)
    _, saved = read(tmp_path)
    saved["experts"]["code"]["trust_remote_code"] = True
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="trust_remote_code"):
        PeftModel.from_pretrained(load(root, "seed"), tmp_path)


@pytest.mark.parametrize("part", ["model", "tokenizer"])
@pytest.mark.parametrize("answer", ["y", "n"])
def test_an_experts_code_is_never_run(root, tmp_path, monkeypatch, part, answer):
    """Loading a stitch must not run Python out of an expert's repository, not even if the user is asked and says y."""
    evil = tmp_path / "evil"
    shutil.copytree(root / "code", evil)
    (evil / "evil.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'harm')!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class Config(LlamaConfig):\n    model_type = 'evil'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
        "class Tokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    if part == "model":
        auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
        settings = json.loads((evil / "config.json").read_text()) | {"model_type": "evil", "auto_map": auto_map}
        (evil / "config.json").write_text(json.dumps(settings))
    else:
        settings = {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}
        (evil / "tokenizer_config.json").write_text(json.dumps(settings))
    asked = []
    monkeypatch.setattr("builtins.input", lambda *args: asked.append(args) or answer)
    refused = pytest.raises(ValueError, match=re.escape(str(evil))) if part == "model" else nullcontext()
    with refused:
        make(root, "math").attach_expert("evil", str(evil))
    assert not (tmp_path / "harm").exists()
    assert not asked


# ------------------------------------------------------------------------------------------------- a fresh process

FRESH = """
import json, sys
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig

torch.set_num_threads(1)
ids, folders, pickled, repository = torch.load(sys.argv[1])
results = {}

try:  # first of all, while peft_bts is not imported
    AutoPeftModelForCausalLM.from_pretrained(next(iter(folders.values())))
except KeyError as error:
    results["without import"] = str(error)

@torch.no_grad()
def logits(model):
    return model(input_ids=ids).logits

results["pickled"] = logits(torch.load(pickled, weights_only=False))  # finds peft_bts by itself

import peft_bts

for name, folder in folders.items():
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    results[name] = logits(model)
    results[name + " tokens"] = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    del model

# Experts by id: offline, out of a hub cache. `main` moves on between save and load.
from pathlib import Path
from peft import get_peft_model
from transformers import AutoModelForCausalLM

torch.manual_seed(0)
model = get_peft_model(
    AutoModelForCausalLM.from_pretrained("org/seed"),
    peft_bts.StitchConfig(
        task_type="CAUSAL_LM",
        num_stitches=2,
        init_weights=False,
        experts={"code": "org/code", "pinned": {"model": "org/code", "revision": "v2"}},
    ),
)
model.attach_expert("late", "org/code")
model.attach_expert("later", "org/code", revision="v2")
before = logits(model)
model.save_pretrained(repository + "/saved")
(Path(repository) / "models--org--code" / "refs" / "main").write_text("b" * 40)
after = logits(AutoPeftModelForCausalLM.from_pretrained(repository + "/saved"))
results["hub"] = bool(torch.equal(before, after))
torch.save(results, sys.argv[2])
"""


def hub_cache(root, folder):
    """A cache of the Hugging Face Hub with org/seed, and org/code at two commits: `main` is the old, `v2` the new."""
    for repo, commits in {"seed": {OLD: "seed"}, "code": {OLD: "code", NEW: "moved"}}.items():
        for commit, source in commits.items():
            if source == "moved":
                tiny_model("llama", seed=9, width=48).save_pretrained(root / source)
            shutil.copytree(root / source, folder / f"models--org--{repo}" / "snapshots" / commit)
        refs = folder / f"models--org--{repo}" / "refs"
        refs.mkdir()
        (refs / "main").write_text(OLD)
    (refs / "v2").write_text(NEW)


@pytest.fixture(scope="module")
def fresh(root, tmp_path_factory):
    """What models gave here, and what their folders give in a process that has never heard of them."""
    folder = tmp_path_factory.mktemp("fresh")
    models = {"trainer": make(root, num_stitches=4)}
    train(models["trainer"], folder / "run").save_model(str(folder / "trainer"))
    models["order"] = make(root, "")
    for name, source in [("zeta", "code"), ("alpha", "math"), ("_1", "law"), ("Z", "code")]:
        models["order"].attach_expert(name, str(root / source))
    models["lora"] = make(root, "lora code", gate="token", r=2)
    models["mine"] = make(root, adapter_name="mine", pattern="experts_into_hub")
    expected = {}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        expected[name] = logits(model)
        expected[name + " tokens"] = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
    torch.save(models["lora"], folder / "pickled")
    expected["pickled"] = expected["lora"]
    hub_cache(root, folder / "hub")

    folders = {name: str(folder / name / ("mine" if name == "mine" else "")) for name in models}
    torch.save((IDS, folders, str(folder / "pickled"), str(folder / "hub")), folder / "in")
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder / "hub"), "PATH": "", "HOME": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(folder / "in"), str(folder / "out")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return expected, torch.load(folder / "out"), folder


@pytest.mark.parametrize("name", ["trainer", "order", "lora", "mine", "pickled"])
def test_a_fresh_process_gives_the_same_model(fresh, name):
    """Trained here, loaded elsewhere: logits bitwise equal, whatever the order in which experts were attached."""
    expected, actual, _ = fresh
    for key in [key for key in expected if key.startswith(name)]:
        assert torch.equal(actual[key], expected[key])


def test_without_the_import_peft_raises_a_key_error(fresh):
    """A documented fact of PEFT, the reason for the import on every model card; if it changes, so may the docs."""
    _, actual, _ = fresh
    assert actual["without import"] == "'STITCH'"


def test_experts_by_id_are_pinned_to_their_commit(fresh):
    """An expert whose repository moves on must not change a trained model."""
    _, actual, folder = fresh
    experts = read(folder / "hub" / "saved")[1]["experts"]
    assert {name: (reference["model"], reference["revision"]) for name, reference in experts.items()} == {
        "code": ("org/code", OLD),
        "pinned": ("org/code", NEW),
        "late": ("org/code", OLD),
        "later": ("org/code", NEW),
    }
    assert actual["hub"] is True


# ------------------------------------------------------------------------------------------------------ the Trainer


def test_training_changes_stitches_only(root, tmp_path):
    """The hub and the experts are frozen models of other people: bitwise the same after training."""
    model = make(root, "code math lora", num_stitches=4)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    train(model, tmp_path)
    after = model.state_dict()
    changed = {key for key in before if not torch.equal(after[key], before[key])}
    assert after.keys() == before.keys()
    assert changed == {key for key in before if ".stitch_layer." in key}


@pytest.mark.parametrize("adapter_name", ["default", "mine"])
def test_resuming_equals_not_stopping(root, tmp_path, adapter_name):
    """A job that was cut off goes on as if nothing had happened: the same weights, bitwise."""
    whole = make(root, adapter_name=adapter_name)
    train(whole, tmp_path, save_strategy="steps", save_steps=2)
    checkpoint = tmp_path / "checkpoint-2"
    tensors, _ = read(checkpoint if adapter_name == "default" else checkpoint / adapter_name)
    assert len(tensors) == 14 and all(".stitch_layer." in key for key in tensors)

    resumed = make(root, adapter_name=adapter_name, seed=1)
    trainer = train(resumed, tmp_path / "resumed", resume=checkpoint)
    assert trainer.state.global_step == 4
    assert_same(resumed.state_dict(), whole.state_dict())
    assert {name for name, p in resumed.named_parameters() if p.requires_grad} == {
        name for name, p in whole.named_parameters() if p.requires_grad
    }


def test_load_best_model_at_end(root, tmp_path):
    """The weights of the best checkpoint are those in memory after training, and still trainable."""
    model = make(root, "code")
    model.attach_expert("object", tiny_model("llama", seed=5))  # no reference: reloading must not need one
    trainer = train(
        model,
        tmp_path,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the worst, which is not the last
    )
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-4"
    model.save_pretrained(tmp_path / "end")
    assert_same(read(tmp_path / "end")[0], read(best)[0])
    assert not torch.equal(*(next(iter(read(tmp_path / name)[0].values())) for name in ("end", "checkpoint-4")))
    assert all(p.requires_grad for name, p in model.named_parameters() if ".stitch_layer." in name)


# --------------------------------------------------------------------------------------------- experts that moved


def test_a_moved_expert_is_found_through_the_config(root, tmp_path):
    """Paths change; the error says which expert is missing and how to point to it, and doing that works."""
    home = tmp_path / "home"
    shutil.copytree(root / "code", home)
    model = make(root, "math")
    model.attach_expert("code", str(home))
    model.save_pretrained(tmp_path / "saved")
    home.rename(tmp_path / "new_home")
    with pytest.raises(ValueError, match=r"(?s)'code'.*home.*experts\[\"code\"\]\[\"model\"\]"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved")

    handed_over = StitchConfig.from_pretrained(tmp_path / "saved")
    handed_over.experts["code"]["model"] = str(tmp_path / "new_home")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved", config=handed_over)
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "again")
    assert read(tmp_path / "again")[1]["experts"]["code"]["model"] == str(tmp_path / "new_home")


def test_an_expert_can_be_replaced_through_the_config(root, tmp_path):
    """A later version of an expert may take its place; one of another shape is refused by name."""
    make(root).save_pretrained(tmp_path / "saved")
    tiny_model("llama", seed=7, width=48).save_pretrained(tmp_path / "newer")
    handed_over = StitchConfig.from_pretrained(tmp_path / "saved")
    handed_over.experts["code"] = handed_over.experts["code"] | {"model": str(tmp_path / "newer")}
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved", config=handed_over)
    expert = loaded.base_model.experts["default"]["code"].model
    assert torch.equal(logits(expert), logits(load(tmp_path, "newer")))

    handed_over.experts["code"] = handed_over.experts["code"] | {"model": str(root / "math")}
    with pytest.raises(ValueError, match=r"'code'.*model_type is 'qwen3', expected 'llama'"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved", config=handed_over)


def test_saving_a_loaded_model_gives_the_same_folder(root, tmp_path):
    """Load and save must be a fixed point, or adapters decay from hand to hand."""
    make(root, "code math lora").save_pretrained(tmp_path / "first")
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    (first, first_config), (second, second_config) = read(tmp_path / "first"), read(tmp_path / "second")
    assert_same(second, first)
    assert second_config == first_config
    assert (tmp_path / "second" / "README.md").read_text() == (tmp_path / "first" / "README.md").read_text()


# ---------------------------------------------------------------------------------------------------- the model card


def check_card(folder, references):
    """The card has a working snippet, one section, a row for every expert and the tags; returns the snippet."""
    card = ModelCard.load(folder / "README.md")
    assert card.text.count("import peft_bts") == card.text.count("2502.00075](") == 1
    for name, place in references.items():
        assert re.search(rf"^\|[^|]*\b{name}\b[^|]*\|[^|]*{re.escape(str(place))}", card.text, re.MULTILINE)
    assert len(re.findall(r"^\| `", card.text, re.MULTILINE)) == len(references)
    assert {"stitch", "branch-train-stitch"} <= set(card.data.tags) and card.data.library_name == "peft"
    snippets = [block for block in re.findall(r"```python\n(.*?)```", card.text, re.DOTALL) if "peft_bts" in block]
    assert len(snippets) == 1
    return snippets[0]


def test_the_model_card(root, tmp_path):
    """Whoever finds the adapter learns from the card how to load it and which models it needs; the snippet runs."""
    model = make(root)
    model.save_pretrained(tmp_path)
    snippet = check_card(tmp_path, {"code": root / "code", "math": root / "math"})
    assert str(root / "seed") in (tmp_path / "README.md").read_text()
    found = {}
    exec(snippet.replace("path or id of this adapter", str(tmp_path)), found)
    assert torch.equal(logits(found["model"]), logits(model))


def test_saving_again_updates_the_card(root, tmp_path):
    """One section however often it is saved; it follows the experts, and what the user wrote stays."""
    model = make(root)
    model.save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    path.write_text(path.read_text().replace("# Model Card for Model ID", "# My model") + "\nMy own words.\n")
    model.save_pretrained(tmp_path)
    model.detach_expert("math")
    model.attach_expert("law", str(root / "law"))
    model.save_pretrained(tmp_path)
    check_card(tmp_path, {"code": root / "code", "law": root / "law"})
    text = path.read_text()
    assert "# My model" in text and text.count("My own words.") == 1


def test_named_adapters_have_cards_beside_their_weights(root, tmp_path):
    """A subfolder is uploaded on its own; its card must name its own experts."""
    model = make(root)
    model.add_adapter("other", config(root, "law"))
    for _ in range(2):
        model.save_pretrained(tmp_path)
        check_card(tmp_path, {"code": root / "code", "math": root / "math"})
        check_card(tmp_path / "other", {"law": root / "law"})


def test_the_trainers_card_shows_the_import(root, tmp_path):
    """`Trainer.push_to_hub` writes a card of its own over the saved one; without the import nobody can load."""
    trainer = train(make(root), tmp_path, max_steps=1)
    trainer.save_model()
    trainer.create_model_card()
    check_card(tmp_path, {"code": root / "code", "math": root / "math"})
