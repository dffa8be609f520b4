"""Stitched models on the Hub: what one person pushes, another can load, and a stranger's adapter can do no harm.

Nothing leaves this machine: `hub_server` plays the Hub, and every story below runs in a process of its own, as it
would on somebody's machine. Ann owns the models and has a token; others have none.
"""

import json
import os
import re
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

import peft_bts
from tests.helpers.checkpoints import stitched
from tests.helpers.hub_server import ChildError
from tests.helpers.models import IDS, fresh, logits, randomize
from tests.helpers.text import save_model
from tests.helpers.zoo import tiny_model


TOKEN = "hf_ann"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A seed, two experts and a LoRA of the seed, on Ann's disk."""
    root = tmp_path_factory.mktemp("models")
    save_model(root / "seed")
    save_model(root / "code", seed=1, width=48)
    save_model(root / "math", seed=2, layers=3)
    save_model(root / "wide", seed=3, layers=2, width=64)  # whole blocks for bitsandbytes
    lora = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj"])
    for base, name in (("seed", "lora"), ("code", "code-lora")):
        get_peft_model(AutoModelForCausalLM.from_pretrained(root / base), lora).save_pretrained(root / name)
    return root


def load(*args, **kwargs):
    return AutoPeftModelForCausalLM.from_pretrained(*args, **kwargs).eval()


def load_logits(*args, **kwargs):
    return logits(load(*args, **kwargs))


# ------------------------------------------------------------------------------------------------------ loading by id


@pytest.fixture(scope="module")
def shared(hub, run, root):
    """`ann/stitch`, pushed with experts from repositories of every kind; its logits, and its experts' references."""
    hub.upload("ann/seed", root / "seed")
    hub.upload("ann/code", root / "code")
    hub.upload("ann/lora", root / "lora")
    hub.upload("ann/code-lora", root / "code-lora")
    nested = root / "nested"
    shutil.copytree(root / "math", nested / "models" / "math")
    hub.upload("ann/nested", nested)
    return run(_push, token=TOKEN, empty_cache=True)


EXPERTS = {
    "code": "ann/code",
    "math": {"model": "ann/nested", "subfolder": "models/math"},
    "lora": "ann/lora",
    "both": {"model": "ann/code", "adapter": "ann/code-lora"},
}


def _push():
    model = stitched("ann/seed", EXPERTS)
    model.attach_expert("object", AutoModelForCausalLM.from_pretrained("ann/code"))
    randomize(model, seed=1).push_to_hub("ann/stitch", tags=["tiny"])
    return logits(model), model.active_peft_config.to_dict()["experts"]


def test_push_and_load(hub, run, shared):
    """What Ann pushed is what a stranger loads: small files only, experts pinned to the commits of that moment."""
    expected, references = shared
    files = hub.repos["ann/stitch"].files("main")
    assert set(files) == {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
    saved = json.loads(files["adapter_config.json"])["experts"]
    assert saved == references
    commit = {repo: hub.repos[repo].sha("main") for repo in ("ann/code", "ann/nested", "ann/lora", "ann/code-lora")}
    assert {name: (ref.get("adapter") or ref["model"], ref["revision"]) for name, ref in saved.items()} == {
        "code": ("ann/code", commit["ann/code"]),
        "math": ("ann/nested", commit["ann/nested"]),
        "lora": ("ann/lora", commit["ann/lora"]),
        "both": ("ann/code-lora", commit["ann/code-lora"]),
        "object": ("ann/code", commit["ann/code"]),
    }
    assert saved["both"]["base_revision"] == commit["ann/code"]
    assert torch.equal(run(load_logits, "ann/stitch", empty_cache=True), expected)


def test_what_is_loaded_stays_when_branches_move(hub, run, shared, root):
    """Somebody who trains an expert further does not change the models that were stitched from it."""
    expected, references = shared
    moved = hub.upload("ann/code", save_model(root / "moved", seed=7, width=48))
    hub.upload("ann/nested", save_model(root / "other", seed=8, layers=3))  # the subfolder is gone
    assert hub.repos["ann/code"].sha("main") == moved != references["code"]["revision"]
    assert torch.equal(run(load_logits, "ann/stitch", empty_cache=True), expected)


def test_revisions(hub, run, shared):
    """A branch of the adapter, and its first commit, are loaded as any model's are."""
    first = hub.repos["ann/stitch"].sha("main")
    second = run(_push_to_branch, "next", token=TOKEN)
    assert hub.repos["ann/stitch"].sha("main") == first
    assert not torch.equal(second, shared[0])
    assert torch.equal(run(_load_at, "next", empty_cache=True), second)
    assert torch.equal(run(_load_at, first), shared[0])
    with pytest.raises(ChildError, match=r"adapter_config.json.*ann/stitch"):
        run(_load_at, "nowhere")


def _push_to_branch(branch):
    model = randomize(load("ann/stitch"), seed=5)
    model.push_to_hub("ann/stitch", revision=branch)
    return logits(model)


def _load_at(revision):
    return load_logits("ann/stitch", revision=revision)


def test_offline_afterwards(hub, run, shared):
    """Once loaded, it loads from the cache: said to be offline, and with a Hub that is down."""
    run(load_logits, "ann/stitch", empty_cache=True)
    asked = len(hub.requests)
    assert torch.equal(run(load_logits, "ann/stitch", offline=True), shared[0])
    assert len(hub.requests) == asked
    code = hub.repos.pop("ann/code")
    try:
        assert torch.equal(run(load_logits, "ann/stitch", offline=True), shared[0])
        with pytest.raises(ChildError, match=r"Expert 'both' could not be loaded from 'ann/code' at revision"):
            run(load_logits, "ann/stitch", empty_cache=True)
    finally:
        hub.repos["ann/code"] = code


def test_private_and_missing_experts(hub, run, shared):
    """The error names the expert, where it was looked for, and the revision; nothing was downloaded before it."""
    commit = re.escape(shared[1]["code"]["revision"])
    hub.repos["ann/code"].private = True
    try:
        for options in ({}, {"token": "hf_of_nobody"}):
            hub.requests.clear()
            message = rf"(?s)Expert 'both' could not be loaded from 'ann/code' at revision '{commit}'.*private"
            with pytest.raises(ChildError, match=message):
                run(load_logits, "ann/stitch", empty_cache=True, **options)
            assert not [f for f in hub.downloaded() if f.endswith(".safetensors") and not f.startswith("ann/seed")]
        assert torch.equal(run(load_logits, "ann/stitch", token=TOKEN), shared[0])
    finally:
        hub.repos["ann/code"].private = False
    with pytest.raises(ChildError, match=r"(?s)Expert 'code' could not be loaded from 'ann/code' at revision 'v9'"):
        run(_attach_missing)


def _attach_missing():
    stitched("ann/seed", {"code": {"model": "ann/code", "revision": "v9"}})


# ------------------------------------------------------------------------------------------------------ push_experts


def test_pushing_what_others_cannot_load(run, hub, root):
    """A path in a pushed config is of no use to anybody; the error says so before anything is made on the Hub."""
    with pytest.raises(ChildError, match=r"(?s)the seed is .*seed; expert 'code' is .*code\..*push_experts"):
        run(_push_local, str(root), token=TOKEN)
    assert "ann/local" not in hub.repos


def _push_local(root):
    stitched(f"{root}/seed", {"code": f"{root}/code"}).push_to_hub("ann/local")


def test_push_experts(run, hub, root):
    """Folders, loaded models and LoRAs are uploaded; then the adapter can be pushed, and loads for a stranger."""
    expected, uploaded, references, again = run(_push_experts, str(root), token=TOKEN, empty_cache=True)
    names = ("code", "math", "lora", "mine")
    assert uploaded == {"hub": "ann/tiny-seed"} | {name: f"ann/tiny-{name}" for name in names}
    assert again == {}
    for name in names:
        reference = references[name]
        assert (reference.get("adapter") or reference["model"]) == f"ann/tiny-{name}"
        assert reference["revision"] == hub.repos[f"ann/tiny-{name}"].sha("main")
        assert hub.repos[f"ann/tiny-{name}"].private
    code = hub.repos["ann/tiny-code"].files("main")
    assert code["model.safetensors"] == (root / "code" / "model.safetensors").read_bytes()
    assert "tokenizer.json" in code and "optimizer.pt" not in code and "checkpoint-1/config.json" not in code
    assert set(hub.repos["ann/tiny-lora"].files("main")) == {
        ".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    assert torch.equal(run(load_logits, "ann/tiny-stitch", token=TOKEN, empty_cache=True), expected)
    for repo in hub.repos.values():
        repo.private = False
    assert torch.equal(run(load_logits, "ann/tiny-stitch", empty_cache=True), expected)


def _push_experts(root):
    open(f"{root}/code/optimizer.pt", "w").close()
    os.makedirs(f"{root}/code/checkpoint-1", exist_ok=True)
    shutil.copy(f"{root}/code/config.json", f"{root}/code/checkpoint-1")
    model = stitched(f"{root}/seed", {name: f"{root}/{name}" for name in ("code", "math", "lora")})
    model.attach_expert("mine", tiny_model("llama", seed=9))
    randomize(model, seed=1)
    expected = logits(model)
    uploaded = peft_bts.push_experts(model, "ann/tiny-{name}", seed="ann/tiny-seed", private=True)
    again = peft_bts.push_experts(model, "ann/never-{name}")
    model.push_to_hub("ann/tiny-stitch", private=True)
    assert torch.equal(logits(model), expected)
    return expected, uploaded, model.active_peft_config.experts, again


def test_push_experts_checks_before_it_uploads(run, hub, root):
    """A second thought must be possible: every mistake is found before the first upload."""
    before = set(hub.repos)
    for options, message in (
        ({"repo_id": {"code": "ann/x"}}, r"exist only here are \['code', 'math'\], but ids are given for \['code'\]"),
        ({"repo_id": "ann/x"}, r"all of \['code', 'math'\] into one repository"),
        ({"repo_id": "ann/x-{name}", "seed": None}, r"the seed is .*seed; say where to upload it"),
    ):
        with pytest.raises(ChildError, match=message):
            run(_push_wrong, str(root), options, token=TOKEN)
    with pytest.raises(ChildError, match="403"):
        run(_push_wrong, str(root), {"repo_id": "bob/x-{name}", "seed": "bob/x"}, token=TOKEN)
    assert set(hub.repos) == before


def _push_wrong(root, options):
    model = stitched(f"{root}/seed", {name: f"{root}/{name}" for name in ("code", "math")})
    peft_bts.push_experts(model, **{"seed": "ann/x-seed", **options})


def test_quantised_experts(run, hub, root):
    """From a folder, the original goes up, and the reference keeps how to quantise it; a loaded one goes up as it is.

    Where a quantised model cannot be saved, nothing is uploaded.
    """
    for how, can_be_saved in (("load_in_4bit", True), ("load_in_8bit", False)):
        with pytest.raises(ChildError, match=r"(?s)Expert 'object' is quantised \(.*\) in a way .* cannot be saved"):
            run(_push_quantised, str(root), how, can_be_saved, token=TOKEN)
    assert "ann/small-folder" not in hub.repos
    expected, references = run(_push_quantised, str(root), "load_in_8bit", True, token=TOKEN)
    folder, loaded = (hub.repos[f"ann/small-{name}"].files("main") for name in ("folder", "object"))
    assert folder["model.safetensors"] == (root / "wide" / "model.safetensors").read_bytes()
    assert references["folder"]["quantization_config"]["load_in_8bit"]
    assert "quantization_config" not in references["object"]
    assert json.loads(loaded["config.json"])["quantization_config"]["load_in_8bit"]
    assert torch.equal(run(load_logits, "ann/small-stitch"), expected)


def _push_quantised(root, how, can_be_saved):
    eight_bits = BitsAndBytesConfig(load_in_8bit=True)
    model = stitched(f"{root}/seed", {"folder": {"model": f"{root}/wide", "quantization_config": eight_bits}})
    quantised = {"quantization_config": BitsAndBytesConfig(**{how: True}), "dtype": torch.float32}
    loaded = AutoModelForCausalLM.from_pretrained(f"{root}/wide", **quantised)
    loaded.hf_quantizer.is_serializable = lambda: can_be_saved
    model.attach_expert("object", loaded)
    expected = logits(randomize(model, seed=1).eval())
    peft_bts.push_experts(model, "ann/small-{name}", seed="ann/small-seed")
    model.push_to_hub("ann/small-stitch")
    return expected, model.active_peft_config.experts


def test_loras_as_objects(run, hub, root):
    """A LoRA that was trained just now: on the seed, or on a model that others must be able to load as well."""
    with pytest.raises(ChildError, match=r"Expert 'other' is a LoRA on '.*code', which exists only here"):
        run(_push_loras, str(root), f"{root}/code", token=TOKEN)
    assert "ann/new-own" not in hub.repos
    hub.upload("ann/code", root / "code")
    expected, references = run(_push_loras, str(root), "ann/code", token=TOKEN, empty_cache=True)
    assert references["own"]["model"] is None and references["other"]["model"] == "ann/code"
    assert torch.equal(run(load_logits, "ann/new-stitch", empty_cache=True), expected)


def _push_loras(root, base):
    model = stitched(f"{root}/seed", {})
    lora = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj"])
    for name, place in (("own", f"{root}/seed"), ("other", base)):
        model.attach_expert(name, get_peft_model(AutoModelForCausalLM.from_pretrained(place), lora))
    randomize(model, seed=1).eval()
    peft_bts.push_experts(model, "ann/new-{name}", seed="ann/new-seed")
    model.push_to_hub("ann/new-stitch")
    return logits(model), model.active_peft_config.experts


def test_push_experts_wants_a_stitched_model():
    model = get_peft_model(fresh("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="Expected a model with a stitch adapter"):
        peft_bts.push_experts(model, "ann/{name}")


def test_the_page(run, hub, root):
    """docs/sharing.md, followed to the letter on the author's machine."""
    config = run(_follow_the_page, str(root), token="hf_org", empty_cache=True)
    assert config["base_model_name_or_path"] == "org/seed" and config["experts"]["code"]["model"] == "org/seed-code"
    card = ModelCard(hub.repos["org/stitch"].files("main")["README.md"].decode()).text
    assert "|  | loss | accuracy |\n| --- | --- | --- |\n| code | 2.73 | 37.3 |" in card


def _follow_the_page(root):
    from tests.helpers.pages import run_blocks

    os.makedirs(f"{root}/desk/models")
    os.chdir(f"{root}/desk")
    os.rename(f"{root}/math", "math")  # experts that others do not have, one of them by a relative path
    shutil.copytree("math", "models/my-math")
    stitched(f"{root}/seed", {"code": f"{root}/code", "math": "math"}).save_pretrained("my-stitch")
    expected = load_logits("my-stitch")
    names = run_blocks("docs/sharing.md")
    assert torch.equal(logits(names["model"].eval()), expected)
    os.rename("math", f"{root}/math")
    return names["config"].to_dict()


# -------------------------------------------------------------------------------------------------------- the card


def test_the_card_on_the_hub(run, hub, shared):
    """Found by its tags, understood by its table, loaded by its snippet, pasted into a fresh process."""
    card = ModelCard(hub.repos["ann/stitch"].files("main")["README.md"].decode())
    data = card.data.to_dict()
    assert data["library_name"] == "peft" and data["pipeline_tag"] == "text-generation"
    assert data["base_model"] == "ann/seed" and data["base_model_relation"] == "adapter"
    assert {"stitch", "branch-train-stitch", "code", "math", "lora", "object", "tiny"} <= set(data["tags"])
    commit = {name: ref["revision"] for name, ref in shared[1].items()}
    count = {"seed": tiny_model("llama"), "code": tiny_model("llama", seed=1, width=48)}
    size = {name: f"{sum(p.numel() for p in model.parameters()) / 1000:.3g} k" for name, model in count.items()}
    assert f"| seed | `ann/seed` |  |  | {size['seed']} |" in card.text
    assert f"| `code` | `ann/code` | {commit['code']} | llama, 4 layers of width 48 | {size['code']} |" in card.text
    assert f"| `math` | `ann/nested`, `models/math` | {commit['math']} |" in card.text
    assert f"| `lora` | `ann/lora` (LoRA on `the seed`) | {commit['lora']} |" in card.text
    snippet = re.search(r"```python\n(import peft_bts.*?)```", card.text, re.DOTALL)[1]
    assert '"ann/stitch"' in snippet
    assert torch.equal(run(_paste, snippet, empty_cache=True), shared[0])


def _paste(snippet):
    names = {}
    exec(snippet, names)
    return logits(names["model"].eval())


def test_results_and_words_on_the_card(root, tmp_path):
    """What the user says about the model stays, through Trainer's own card and further saves."""
    model = stitched(root / "seed", {"code": str(root / "code")})
    model.card_results = {"held-out code": {"loss": 2.73, "accuracy": 37.3}, "arithmetic": {"loss": 0.06}}
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_strategy="no")
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card(tags=["mixed-domains"], dataset_tags="ann/corpus", dataset="Ann's corpus")
    for _ in range(2):
        card = ModelCard.load(tmp_path / "README.md")
        assert {"mixed-domains", "code", "stitch"} <= set(card.data.tags)
        assert card.data.to_dict()["base_model_relation"] == "adapter"
        assert "learning_rate: 5e-05" in card.text and "Ann's corpus" in card.text  # Trainer's
        assert card.text.count("## Results") == 1
        assert (
            "|  | loss | accuracy |\n| --- | --- | --- |\n| held-out code | 2.73 | 37.3 |\n| arithmetic | 0.06 |  |"
            in card.text
        )
        model.save_pretrained(tmp_path)
    model.card_results = [1]
    with pytest.raises(ValueError, match="card_results is \\[1\\]; expected"):
        model.save_pretrained(tmp_path)
