"""Adapters that have been through a lot, in any order, still compute what the reference computes from their files."""

import random
import re

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model

from tests.helpers.checkpoints import assert_untouched, config, load, read
from tests.helpers.models import IDS, LEFT, assert_near, logits, randomize
from tests.helpers.reference import reference_forward


EXPERTS = ("code", "math", "law", "lora")
STEPS = 14


class History:
    """A stitched model, and what the user expects of it: experts by adapter, and those that take part.

    Args:
        root: Where the models are.
        folder: Where adapters are saved.
        number: What all choices are drawn from.
    """

    def __init__(self, root, folder, number):
        self.root, self.folder, self.rng, self.saved = root, folder, random.Random(number), 0
        plain = {name: self.load(name) for name in ("code", "math", "law", "seed")}
        lora = PeftModel.from_pretrained(self.load("seed"), root / "lora").merge_and_unload()
        self.plain = {**plain, "lora": lora.eval()}
        self.model = get_peft_model(self.load("seed"), config(root, "code", **self.options()))
        self.experts, self.left_out, self.active = {"default": {"code"}}, {"default": set()}, "default"
        randomize(self.model, seed=number)

    def load(self, name):
        return load(self.root, name, dtype=torch.float64)

    def options(self):
        output = self.rng.choice(["hub", "hub", "mixture"])
        return {
            "num_stitches": self.rng.randint(0 if output == "mixture" else 1, 4),
            "output": output,
            "gate": self.rng.choice(["channel", "token"]),
            "gate_bias": self.rng.random() < 0.7,
            "r": self.rng.choice([None, 3]),
            "pattern": self.rng.choice(["alternating", "experts_into_hub"]),
        }

    # Each step does something to the model, notes what is expected, and says what it was; `None` if it cannot be done.

    def attach(self):
        free = sorted(set(EXPERTS) - self.experts[self.active])
        if not free:
            return None
        name = self.rng.choice(free)
        as_object = name != "lora" and self.rng.random() < 0.5
        self.model.attach_expert(name, self.load(name) if as_object else str(self.root / name))
        self.experts[self.active].add(name)
        return f"attach {name}"

    def detach(self):
        if len(self.experts[self.active]) < 2:
            return None
        name = self.rng.choice(sorted(self.experts[self.active]))
        self.model.detach_expert(name)
        self.experts[self.active].discard(name)
        self.left_out[self.active].discard(name)
        if self.left_out[self.active] == self.experts[self.active]:
            self.left_out[self.active] = set()
        return f"detach {name}"

    def activate(self):
        names = sorted(self.experts[self.active])
        chosen = self.rng.sample(names, self.rng.randint(1, len(names)))
        self.model.set_active_experts(chosen)
        self.left_out[self.active] = set(names) - set(chosen)
        return f"activate {chosen}"

    def add_adapter(self):
        name = f"adapter{len(self.experts)}"
        if name in self.experts or len(self.experts) > 2:
            return None
        experts = self.rng.sample(EXPERTS[:3], self.rng.randint(1, 3))
        self.model.add_adapter(name, config(self.root, " ".join(experts), **self.options()))
        self.experts[name], self.left_out[name] = set(experts), set()
        return f"add {name} of {experts}"

    def switch(self):
        self.active = self.rng.choice(sorted(self.experts))
        self.model.set_adapter(self.active)
        return f"switch to {self.active}"

    def delete(self):
        others = sorted(set(self.experts) - {self.active})
        if not others:
            return None
        name = self.rng.choice(others)
        self.model.delete_adapter(name)
        del self.experts[name], self.left_out[name]
        return f"delete {name}"

    def reload(self):
        """What is saved and loaded: the active adapter alone. Who takes part is not saved."""
        folder = self.save()
        self.model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        self.experts, self.left_out = {"default": self.experts[self.active]}, {"default": set()}
        self.active = "default"
        return "reload"

    def load_beside(self):
        if len(self.experts) > 2:
            return None
        name = f"loaded{self.saved}"
        self.model.load_adapter(self.save(), name)
        self.experts[name], self.left_out[name] = set(self.experts[self.active]), set()
        return f"load {name}"

    def change(self):
        randomize(self.model, seed=self.rng.randrange(1000))
        return "change the weights"

    def fail(self):
        """Errors change nothing."""
        with pytest.raises(ValueError, match="'new' could not be loaded"):
            self.model.attach_expert("new", str(self.root / "nothing"))
        with pytest.raises(ValueError, match="has no expert"):
            self.model.detach_expert("new")
        with pytest.raises(ValueError, match="stitched already"):
            get_peft_model(self.model.get_base_model(), config(self.root))
        return "fail"

    def save(self):
        self.saved += 1
        folder = self.folder / str(self.saved)
        self.model.save_pretrained(folder, selected_adapters=[self.active])
        return folder if self.active == "default" else folder / self.active

    def check(self):
        """The active adapter, with the experts that take part; the hub alone; and a step of generation."""
        tensors, values = read(self.save())
        left_out = self.left_out[self.active]
        if left_out:
            of_those = re.compile(rf"\.(gate|proj)\.({'|'.join(sorted(left_out))})\.")
            tensors = {key: tensor for key, tensor in tensors.items() if not of_those.search(key)}
        experts = {name: self.plain[name] for name in sorted(self.experts[self.active] - left_out)}
        self.model.eval()
        with torch.no_grad():
            expected = reference_forward(self.plain["seed"], experts, tensors, values, IDS, attention_mask=LEFT)
        assert_near(logits(self.model, attention_mask=LEFT), expected, 1e-5)
        # Without padding: generate() counts positions from the text on, and a plain forward of gpt2 does not.
        new = self.model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=1, do_sample=False)
        assert torch.equal(new[:, -1], logits(self.model)[:, -1].argmax(-1)), "generate() differs"
        with self.model.disable_adapter():
            assert torch.equal(logits(self.model), logits(self.plain["seed"])), "the hub alone differs"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("number", range(15))
def test_any_history(root, tmp_path, number):
    history = History(root, tmp_path, number)
    steps = [history.attach, history.detach, history.activate, history.add_adapter, history.switch, history.delete]
    steps += [history.reload, history.load_beside, history.change, history.fail]
    done = []
    while len(done) < STEPS:
        what = history.rng.choice(steps)()
        if what is None:
            continue
        done.append(what)
        try:
            history.check()
        except Exception as error:
            raise AssertionError(f"After {'; '.join(done)}: {error}") from error
    hub = history.model.unload()
    assert torch.equal(logits(hub), logits(history.plain["seed"]))
    assert_untouched(hub)
