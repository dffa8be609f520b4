"""The trained models of one set, by name."""

from dataclasses import dataclass
from pathlib import Path

from transformers import LlamaForCausalLM


@dataclass
class Models:
    """The trained seed and experts of one set, as folders."""

    folders: dict[str, Path]
    device: str

    def load(self, name: str) -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(self.folders[name]).to(self.device).eval().requires_grad_(False)

    def load_all(self, experts: list[str]) -> list[LlamaForCausalLM]:
        return [self.load(name) for name in ["seed", *experts]]
