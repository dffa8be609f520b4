"""The toy seed and its experts: how they are trained, and where they are kept."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ProgressCallback,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from .data import Documents, make_documents
from .tokens import LENGTH, VOCABULARY, make_blocks, mix_blocks, train_tokenizer


LLAMA: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2 * LENGTH,
    "initializer_range": 0.06,  # at this width, the usual 0.02 wastes the first few hundred steps
    "tie_word_embeddings": True,
}


@dataclass
class Stage:
    """The settings of one training run: shares of the domains, steps, blocks per step, peak learning rate."""

    mix: dict[str, float]
    steps: int
    batch: int
    learning_rate: float


EXPERTS = ["code", "math", "lang"]

# The seed must have met every domain's format: the stitches ask *its* hidden state which expert to listen to. The
# experts forget much of what they no longer see; a little of the seed's data keeps them from forgetting everything.
STAGES = {
    "seed": Stage({"text": 0.45, "code": 0.45, "math": 0.06, "lang": 0.04}, steps=2000, batch=8, learning_rate=3e-3),
    "code": Stage({"code": 0.9, "text": 0.1}, steps=700, batch=8, learning_rate=2e-3),
    "math": Stage({"math": 0.8, "code": 0.1, "text": 0.1}, steps=800, batch=8, learning_rate=4e-3),
    "lang": Stage({"lang": 0.8, "code": 0.1, "text": 0.1}, steps=400, batch=8, learning_rate=2e-3),
    "stitch": Stage({"text": 0.25, "code": 0.25, "math": 0.25, "lang": 0.25}, steps=400, batch=8, learning_rate=3e-3),
}


class Toy:
    """The toy models and their data. Each part is made when it is first asked for.

    Models are kept in `cache_dir`, and used again as long as their data and settings stay the same.

    Args:
        cache_dir: Where models are kept.
        stages: How they are trained, by name.
        fresh: Train models even if the cache has them.
        smoke: Take a few documents and a few steps only, to see that everything runs; nothing is learned.
    """

    def __init__(
        self,
        cache_dir: str | os.PathLike[str],
        *,
        stages: Mapping[str, Stage] = STAGES,
        fresh: bool = False,
        smoke: bool = False,
    ) -> None:
        self.cache_dir, self.stages, self.fresh, self.smoke = Path(cache_dir).resolve(), stages, fresh, smoke
        self._folders: dict[str, Path] = {}

    @cached_property
    def documents(self) -> dict[str, Documents]:
        """Pairs (prompt, answer), as documents[split][domain]."""
        return make_documents(self.smoke)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return train_tokenizer(self.documents["train"])

    @cached_property
    def blocks(self) -> dict[str, torch.Tensor]:
        """The training data: for every domain, tokens and labels, int64 (blocks, 2, LENGTH)."""
        return make_blocks(self.tokenizer, self.documents["train"], "tokenize")

    def held_out_blocks(self, split: str) -> dict[str, torch.Tensor]:
        """The same of "validation" or "test": 160 blocks of a domain (20,000 tokens), evenly from all its files."""
        enough = 8 if self.smoke else 160
        blocks = make_blocks(self.tokenizer, self.documents[split], f"tokenize {split}")
        return {domain: rows[:: -(-len(rows) // enough)] for domain, rows in blocks.items()}

    def stage(self, name: str) -> Stage:
        """Return how the model `name` is trained: one of the stages, shortened in a smoke test."""
        return replace(self.stages[name], steps=4) if self.smoke else self.stages[name]

    def rows(self, stage: Stage) -> torch.Tensor:
        """The blocks that `stage` trains on, (N, 2, LENGTH)."""
        return mix_blocks(self.blocks, stage.mix, stage.steps * stage.batch)

    def folder(self, name: str) -> Path:
        """The folder of "seed" or of an expert, which is trained now if the cache does not have it.

        The folder's name holds a hash of all that makes the model what it is: where it starts, its settings, and the
        very tokens it is trained on. A change of any of them makes another folder.
        """
        if name not in self._folders:
            self._folders[name] = self._train_or_find(name, None if name == "seed" else self.folder("seed"))
        return self._folders[name]

    @property
    def experts(self) -> dict[str, Path]:
        """The folders of all experts, by name."""
        return {name: self.folder(name) for name in EXPERTS}

    def _train_or_find(self, name: str, start: Path | None) -> Path:
        stage, vocabulary = self.stage(name), sorted(self.tokenizer.get_vocab().items())
        rows = self.rows(stage)
        key = hashlib.sha256(f"{start and start.name} {LLAMA} {stage} {vocabulary}".encode())
        key.update(rows.numpy().tobytes())
        folder = self.cache_dir / f"{name}-{key.hexdigest()[:12]}"
        if folder.exists() and not self.fresh:
            print(f"{name}: from the cache, {folder}")
            return folder

        set_seed(0)
        unfinished = folder.with_name(folder.name + ".unfinished")  # an interrupted run must not leave half a model
        model = AutoModelForCausalLM.from_pretrained(start) if start else new_llama(self.tokenizer)
        train(model, rows, stage, name).save_pretrained(unfinished)
        self.tokenizer.save_pretrained(unfinished)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
        return folder


def new_llama(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A seed that has learned nothing yet."""
    special = {f"{kind}_token_id": tokenizer.eos_token_id for kind in ("bos", "eos", "pad")}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **special, **LLAMA))


def average_weights(models: list[LlamaForCausalLM]) -> LlamaForCausalLM:
    """A "model soup": as large as one model, every weight the mean of theirs. No training."""
    states = [model.state_dict() for model in models]
    soup = type(models[0])(models[0].config)
    soup.load_state_dict({key: sum(state[key] for state in states) / len(states) for key in states[0]})
    return soup.eval()


# --- Training -------------------------------------------------------------------------------------------------------


class StageBar(ProgressCallback):
    """Trainer's progress bar with the stage's name in front and the loss behind."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:  # else this is not the process that shows one
            self.training_bar.set_description(self.name)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is not None and "loss" in logs and self.training_bar is not None:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")


Model = TypeVar("Model", bound=torch.nn.Module)


def train(model: Model, rows: torch.Tensor, stage: Stage, name: str) -> Model:
    """One stage of training on `rows` (N, 2, T), the same for seed, experts and stitches; returns `model`.

    `name` is the label of the progress bar.
    """
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=tempfile.gettempdir(),  # nothing is written: the caller saves what it wants to keep
            max_steps=stage.steps,
            per_device_train_batch_size=stage.batch,
            learning_rate=stage.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=stage.steps // 20,
            adam_beta2=0.95,  # with 0.999, arithmetic takes much longer to learn
            logging_steps=max(1, stage.steps // 50),
            save_strategy="no",
            report_to="none",
            label_names=["labels"],
            dataloader_pin_memory=False,
            use_cpu=True,
        ),
        train_dataset=[{"input_ids": tokens, "labels": labels} for tokens, labels in rows],
    )
    trainer.remove_callback(DEFAULT_PROGRESS_CALLBACK)  # another one in notebooks
    trainer.add_callback(StageBar(name))
    trainer.train()
    return model.eval()
