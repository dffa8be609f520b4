"""One independent set of models, a seed and its experts, as pieces of work."""

from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from ..branching.models import EXPERTS, branch, branch_expert, keep, new_model
from ..branching.trained import Models
from .jobs import Job, Store
from .material import Material
from .measuring import sizes_of
from .presets import Preset


class Set:
    """A seed of one size, and experts trained from it in full or as LoRAs. Pieces are `<size>/set<number>/...`."""

    def __init__(
        self, preset: Preset, material: Material, size: str, number: int, store: Store, device: str = "cpu"
    ) -> None:
        self.preset, self.material, self.size, self.number = preset, material, size, number
        self.store, self.device = store, device

    def name(self, *parts: Any) -> str:
        return "/".join([self.size, f"set{self.number}", *map(str, parts)])

    # --- Pieces ---

    @property
    def tests_job(self) -> Job:
        """How large the documents of all tests are, which is all that a report must know of them."""
        return Job("tests", self.describe_tests)

    @property
    def blocks_job(self) -> Job:
        return Job(f"blocks/{self.number}", self.make_blocks, keeps=[self.blocks_file])

    def model_job(self, name: str, lora: bool = False) -> Job:
        if name == "seed":
            needs, folder, work = [self.blocks_job.name], self.folder("seed"), self.train_seed
            return Job(self.name("seed"), work, needs, keeps=[_weights(folder)])
        needs, folder = [self.blocks_job.name, self.name("seed")], self.folder(name, lora)
        expert = partial(self.train_expert, name, lora)
        return Job(self.name(folder.parent.name, name), expert, needs, keeps=[_weights(folder)])

    def model_jobs(self, experts: list[str], lora: bool) -> list[Job]:
        return [self.blocks_job, self.model_job("seed"), *(self.model_job(name, lora) for name in experts)]

    # --- Where things are ---

    @property
    def blocks_file(self) -> Path:
        return self.store.folder / "blocks" / f"{self.number}.pt"

    def folder(self, name: str, lora: bool = False) -> Path:
        kind = [] if name == "seed" else ["experts_lora" if lora else "experts"]
        return self.store.folder.joinpath(self.size, f"set{self.number}", *kind, name)

    def models(self, lora: bool) -> Models:
        folders = {"seed": self.folder("seed")} | {name: self.folder(name, lora) for name in EXPERTS}
        return Models(folders, self.device)

    @cached_property
    def blocks(self) -> dict[str, torch.Tensor]:
        return torch.load(self.blocks_file)

    # --- Work ---

    def describe_tests(self) -> dict[str, Any]:
        return {"sizes": sizes_of(self.material.test | self.material.prompted)}

    def make_blocks(self) -> dict[str, Any]:
        blocks = self.material.blocks(self.number)
        save(blocks, self.blocks_file)
        return {"blocks": {name: len(part) for name, part in blocks.items()}}

    def train_seed(self) -> dict[str, Any]:
        torch.manual_seed(self.number)
        model = new_model(self.size, self.material.tokenizer).to(self.device)
        result = branch("seed", model, self.blocks, self.preset.stages["seed"], self.number)
        self.folder("seed").parent.mkdir(parents=True, exist_ok=True)
        keep(model, self.material.tokenizer, self.folder("seed"))
        return {**result, "parameters": model.num_parameters()}

    def train_expert(self, name: str, lora: bool) -> dict[str, Any]:
        self.folder(name, lora).parent.mkdir(parents=True, exist_ok=True)
        return branch_expert(
            name, self.folder("seed"), self.folder(name, lora), self.blocks, self.material.corpora,
            self.material.tokenizer, self.preset.stages[name], self.number, lora=lora,
            tries=self.preset.tries, device=self.device,
        )  # fmt: skip


def _weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def save(thing: Any, path: Path) -> None:
    """By torch; a kill meanwhile leaves no file that looks finished."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"unfinished-{path.name}")
    torch.save(thing, unfinished)
    unfinished.replace(path)
