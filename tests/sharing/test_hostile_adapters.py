"""An adapter is a stranger's file: whatever it says, loading it runs no code and reads no file it should not.

Eve publishes adapters. Each is a good one with one thing changed, and is loaded, in one fresh process, by every road
there is. The process notes every file that is opened. What Eve points to is really there, and would fit: a load that
followed her would succeed.
"""

import copy
import io
import json
import os
import pickle
import shutil
import sys
import sysconfig
import tempfile
import traceback
import warnings

import pytest
import torch
import transformers
from packaging import version
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from peft_bts import StitchConfig
from tests.helpers.checkpoints import stitched
from tests.helpers.hub_server import Repo
from tests.helpers.models import logits
from tests.helpers.text import save_model


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.mkdir, (self.canary,)


def lora_of(folder):
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj"])
    return get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edited(files, name="config.json", **values):
    return {**files, name: json.dumps({**json.loads(files[name]), **values}).encode()}


def pickled(payload):
    """A file as `torch.save` makes it, with a pickle inside that is not only tensors."""
    buffer = io.BytesIO()
    torch.save({"lm_head.weight": payload}, buffer)
    return buffer.getvalue()


def tampered(base, victim):
    """Eve's configs: name -> (config, what the error says; `None` if the load must succeed and ignore the change)."""
    cases = {}

    def case(name, error, *, expert=None, **values):
        config = copy.deepcopy(base) | values
        if expert is not None:
            config["experts"]["code"] = config["experts"]["code"] | expert if isinstance(expert, dict) else expert
        cases[name] = config, error

    path, lora = str(victim / "model"), str(victim / "lora")
    case("absolute", f"'{path}', a path of this machine", expert={"model": path, "revision": None})
    case("parent", "'../victim/model', a path of this", expert={"model": "../victim/model", "revision": None})
    case("bare string", f"'{path}', a path of this machine", expert=path)
    case("etc", "'/etc/passwd', a path of this machine", expert={"model": "/etc/passwd"})
    case("shadow", "'ann/shadow', a path of this machine", expert={"model": "ann/shadow"})
    case("lora path", f"'{lora}', a path of this machine", expert={"model": None, "adapter": lora, "revision": None})
    case("lora base", f"'{path}', a path of this machine", expert={"model": path, "adapter": "ann/lora"})
    case("subfolder", "leads out of its repository", expert={"subfolder": "../../../../victim/model"})
    case("root", "leads out of its repository", expert={"model": "ann/code", "subfolder": path})
    case("revision", "leads out of its repository", expert={"revision": "../../../victim"})
    above = "../" * 40 + path[1:]  # from wherever the file is
    relative = {"paths_relative_to": "adapter"}
    case("relative", f"{above!r}, a path of this", expert={"model": above, "revision": None}, **relative)
    case("relative seed", "as its seed, which is a path of", base_model_name_or_path=above, **relative)
    case("seed", "as its seed, which is a path of this machine", base_model_name_or_path=path)
    case("seed's revision", "the seed's revision '../../x'", revision="../../x")
    case("trust", "unknown key(s) ['trust_remote_code']", expert={"trust_remote_code": True})
    case("code", "unknown key(s) ['auto_map', 'code_revision']", expert={"auto_map": {}, "code_revision": "main"})
    case("name", "Expert name '../x' is not usable", experts={"../x": "ann/code"})
    case("types", "expected a string", expert={"model": ["ann/code"]})
    case("list", "experts must be a dict", experts=["ann/code"])
    case("many", "has 5000 experts; at most 64", experts={f"e{i}": f"eve/many-{i}" for i in range(5000)})
    for name, quantization in {
        "unknown quantiser": {"quant_method": "os.system"},
        "quantiser of no type": {"quant_method": ["bitsandbytes"]},
        "quantiser without method": {"load_in_4bit": True},
        "odd dtype": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_compute_dtype": "os"},
        "odd class": {"quant_method": "torchao", "quant_type": {"default": {"_type": "os.system", "_data": "id"}}},
        "calibration": {"quant_method": "gptq", "bits": 4, "dataset": ["x"], "tokenizer": path},
    }.items():
        case(name, "'code'", expert={"quantization_config": quantization})
    for repo in ("pickle", "lora pickle", "code", "x-lora"):
        place = {"model": None, "adapter": f"eve/its-{repo}"} if "lora" in repo else {"model": f"eve/its-{repo}"}
        place = {key: value and value.replace(" ", "-") for key, value in place.items()}
        case(f"its {repo}", "Expert 'code' could not be loaded from 'eve/its", expert={**place, "revision": "main"})
    case("its map", None, expert={"model": "eve/its-map", "revision": "main"})
    case(
        "its kernel",
        "Expert 'code' could not be loaded from 'eve/its",
        expert={"model": "eve/its-kernel", "revision": "main"},
    )
    case("auto map", None, auto_map={"AutoModelForCausalLM": "evil.Evil"}, trust_remote_code=True)
    case("auto mapping", None, auto_mapping={"base_model_class": "Evil", "parent_library": "evil"})
    case("placement", None, expert={"device_map": {"": "disk"}, "offload_folder": str(victim / "offload")})
    return cases


@pytest.fixture(scope="module")
def machine(hub, run, tmp_path_factory):
    """What happened to every adapter: (error by road, files opened), and the server; then the override."""
    root = tmp_path_factory.mktemp("machine")
    victim, canary = root / "victim", root / "canary"
    save_model(root / "seed")
    save_model(root / "code", seed=1, width=48)
    lora_of(root / "seed").save_pretrained(root / "lora")
    for name in ("seed", "code", "lora"):
        hub.upload(f"ann/{name}", root / name)
    shutil.copytree(root / "code", victim / "model")
    shutil.copytree(root / "lora", victim / "lora")
    shutil.copytree(root / "code", root / "work" / "ann" / "shadow")

    code, lora = files_of(root / "code"), files_of(root / "lora")
    evil = f"import os; os.mkdir({str(canary)!r})".encode()
    auto_map = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    unsafe = {name: data for name, data in code.items() if name != "model.safetensors"}
    unsafe_lora = {name: data for name, data in lora.items() if name != "adapter_model.safetensors"}
    x_lora = {"peft_type": "XLORA", "adapters": {"0": str(victim / "lora")}, "hidden_size": 32}
    for name, files in {
        "its-pickle": {**unsafe, "pytorch_model.bin": pickled(Payload(canary))},
        "its-lora-pickle": {**unsafe_lora, "adapter_model.bin": pickled(Payload(canary))},
        "its-code": {**edited(code, model_type="evil", auto_map=auto_map), "evil.py": evil},
        "its-map": {**edited(code, auto_map=auto_map), "evil.py": evil},
        "its-kernel": edited(code, attn_implementation="eve/kernel", _attn_implementation="eve/kernel"),
        "its-x-lora": edited(lora, "adapter_config.json", **x_lora),
    }.items():
        hub.repos.setdefault(f"eve/{name}", Repo()).commit("main", files)

    good = run(_good_adapter, empty_cache=True)
    cases = tampered(json.loads(good["adapter_config.json"]), victim)
    ids = {name: f"eve/adapter-{number}" for number, name in enumerate(cases)}
    for name, (config, _) in cases.items():
        files = {**good, "adapter_config.json": json.dumps(config).encode()}
        hub.repos.setdefault(ids[name], Repo()).commit("main", files)
    stitches = {name: data for name, data in good.items() if name != "adapter_model.safetensors"}
    stitches["adapter_model.bin"] = pickled(Payload(canary))
    hub.repos.setdefault("eve/stitches", Repo()).commit("main", stitches)
    cases["stitches"], ids["stitches"] = (
        (None, "'default' could not be loaded from 'eve/stitches': Weights only load failed"),
        "eve/stitches",
    )
    outcomes = run(_load_all, ids, str(root / "work"), (str(run.home), os.getcwd()))
    return cases, outcomes, hub, canary, run, victim


def _good_adapter():
    model = stitched("ann/seed", {"code": "ann/code"})
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return {name: open(os.path.join(folder, name), "rb").read() for name in os.listdir(folder)}


ROADS = {
    "auto": AutoPeftModelForCausalLM.from_pretrained,
    "onto a seed": lambda id: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("ann/seed"), id),
    "PeftConfig": lambda id: AutoPeftModelForCausalLM.from_pretrained(id, config=PeftConfig.from_pretrained(id)),
    "StitchConfig": lambda id: AutoPeftModelForCausalLM.from_pretrained(id, config=StitchConfig.from_pretrained(id)),
}


def _load_all(ids, work, expected):
    """Load every adapter by every road; return the errors (`None`: it loaded), and what was opened meanwhile."""
    os.chdir(work)
    opened, outcomes = [], {}
    expected += (*sysconfig.get_paths().values(), sys.prefix, sys.base_prefix, "/proc", "/sys", "/dev")

    def note(event, arguments):
        if event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], str):
            path = os.path.abspath(arguments[0])
            if not path.startswith(expected):
                opened.append(path)

    sys.addaudithook(note)
    for name, id in ids.items():
        del opened[:]
        errors = {}
        for road, load in ROADS.items():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    load(id)
                errors[road] = None
            except Exception as error:
                errors[road] = f"{type(error).__name__}: {error}", traceback.format_exc()
        outcomes[name] = errors, list(opened)
    return outcomes


CASES = [  # of `tampered`, which needs the machine's paths
    "absolute", "parent", "bare string", "etc", "shadow", "lora path", "lora base", "subfolder", "root",
    "relative", "relative seed", "revision", "seed", "seed's revision", "trust", "code", "name", "types", "list",
    "many",
    "unknown quantiser", "quantiser of no type", "quantiser without method", "odd dtype", "odd class",
    "calibration", "its pickle", "its lora pickle", "its code", "its x-lora", "its map", "its kernel",
    "auto map", "auto mapping", "placement", "stitches",
]  # fmt: skip


def test_every_case_is_tested(machine):
    assert set(CASES) == set(machine[0])


@pytest.mark.parametrize("name", CASES)
def test_no_harm(machine, name):
    """No code has run, no file of the victim was opened, and what is wrong was said."""
    cases, outcomes, _, canary, *_ = machine
    _, message = cases[name]
    errors, opened = outcomes[name]
    assert not canary.exists()
    assert not opened, opened
    for road, error in errors.items():
        if message is None:
            assert error is None, (road, error)
        elif message:
            assert error is not None, road
            # transformers 5.18 finds out about the kernel only when the expert first runs, and names no expert.
            if name != "its kernel" or version.parse(transformers.__version__) >= version.parse("5.23"):
                assert message in error[0], (road, error)


def test_thousands_of_experts_are_not_even_looked_for(machine):
    _, _, hub, *_ = machine
    assert not [path for _, path in hub.requests if "eve/many" in path]


def test_one_may_vouch_for_a_path(machine):
    """What is refused in a stranger's file is fine in a config that the user has edited, as the error says."""
    cases, outcomes, _, _, run, victim = machine
    message = outcomes["absolute"][0]["auto"][0]
    assert 'config.experts["code"]["model"] = "another id or path"' in message
    assert 'config.experts["code"]["adapter"] = ' in outcomes["lora path"][0]["auto"][0]
    number = list(cases).index("absolute")
    assert torch.equal(run(_load_edited, f"eve/adapter-{number}", str(victim / "model")), run(_load_good))


def _load_edited(id, path):
    config = StitchConfig.from_pretrained(id)
    config.experts["code"]["model"] = path
    return logits(AutoPeftModelForCausalLM.from_pretrained(id, config=config).eval())


def _load_good():
    return logits(stitched("ann/seed", {"code": "ann/code"}))


def test_the_payload_is_live(tmp_path):
    """The pickles above would do harm if they were simply unpickled."""
    torch.load(io.BytesIO(pickled(Payload(tmp_path / "canary"))), weights_only=False)
    assert (tmp_path / "canary").exists()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(io.BytesIO(pickled(Payload(tmp_path / "canary"))), weights_only=True)
