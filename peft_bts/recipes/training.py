"""`train`: the stitches of a recipe, by Trainer."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from peft import PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerState,
    default_data_collator,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME

from ..experts.compatibility import check_compatibility
from ..gates.callback import GateLogger
from .card import Losses, write_training_section
from .data import check_block_size, mix, pack, split_domains
from .recipe import Recipe, read_recipe


logger = logging.getLogger(__name__)

_RECIPE = "recipe.yaml"  # the copy in the adapter's folder


@dataclass(frozen=True)
class Trained:
    """What `train` returns.

    Attributes:
        folder: Where the adapter is.
        losses: By domain, in nats per token, of `"seed alone"`, `"before training"` and `"after training"`.
        steps: How many steps the adapter was trained, those of an interrupted run included.
        is_main: Whether this is the process that writes.
    """

    folder: str
    losses: Losses
    steps: int
    is_main: bool


def train(recipe: Recipe, command: str) -> Trained:
    """Train the stitches of a recipe, and save them, with tokenizer, card and a copy of the recipe.

    A run that was cut off is continued from the last whole checkpoint in its folder, to the same weights.

    Args:
        recipe: What to train.
        command: What the card names as the command.

    Raises:
        OSError, ValueError: Before models are loaded: if anything is missing, does not fit, or cannot be read, or if
            the folder holds checkpoints of another recipe.
    """
    recipe.require("hub", "experts", "datasets", "output_dir")
    training, config = recipe.training_arguments(), recipe.config()
    checkpoint = training.resume_from_checkpoint or last_checkpoint(recipe.output_dir)
    if checkpoint is not None:
        _check_same_recipe(recipe)
        training.eval_on_start = False  # the checkpoint knows the losses before training
    for name, expert in recipe.experts.items():
        check_compatibility(recipe.hub, expert, name=name).raise_errors()

    set_seed(training.seed)
    hub, how = recipe.hub, {"revision": config.revision, "trust_remote_code": False}
    source = hub if isinstance(hub, str) else hub["model"]
    tokenizer = AutoTokenizer.from_pretrained(source, **how)
    with training.main_process_first(desc="packing"):  # the others find its work in the cache
        documents, evaluated = split_domains(recipe.domains, recipe.evaluation, recipe.data.held_out)
        packing = (tokenizer, recipe.data.block_size, recipe.data.text_column)
        rows = {name: pack(found, *packing) for name, found in documents.items()}
        held_out = {name: pack(found, *packing) for name, found in evaluated.items()}
        mixed = mix(rows, {name: domain.weight for name, domain in recipe.domains.items()})
    _check_evaluation(held_out, recipe)

    seed = AutoModelForCausalLM.from_pretrained(source, dtype=recipe.models.dtype, **how)
    model = get_peft_model(seed, config)
    check_block_size(recipe.data.block_size, model)
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=mixed,
        eval_dataset=held_out,
        data_collator=default_data_collator,  # packed rows need no padding
        processing_class=tokenizer,  # saved beside the adapter
        callbacks=[GateLogger()],
    )
    is_main = trainer.is_world_process_zero()
    if is_main:
        Path(recipe.output_dir).mkdir(parents=True, exist_ok=True)
        Path(recipe.output_dir, _RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
    finished = None if checkpoint is None else _finished(checkpoint, training.max_steps)
    if checkpoint is None or finished is None:
        trainer.train(resume_from_checkpoint=checkpoint)
    else:  # Trainer asks whether it is at the end after a step only, and would make one more
        trainer.state = finished
        best = finished.best_model_checkpoint if training.load_best_model_at_end else None
        set_peft_model_state_dict(model, load_peft_weights(best or checkpoint, device=str(model.device)))
    losses = _losses(trainer, model)
    trainer.save_model()
    if is_main:
        sizes: dict[str, dict[str, int]] = {}
        for kind, data in (("training", rows), ("evaluation", held_out)):
            for name, found in data.items():
                sizes.setdefault(name, {})[kind] = len(found)
        write_training_section(recipe.output_dir, recipe, command, losses, sizes, trainer.state.global_step)
    return Trained(recipe.output_dir, losses, trainer.state.global_step, is_main)


def _finished(checkpoint: str, max_steps: int) -> Optional[TrainerState]:
    """The state of a run whose last step is in a checkpoint; `None` if there are steps left."""
    state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
    last = max_steps if max_steps > 0 else state.max_steps
    return state if state.global_step >= last else None


def last_checkpoint(folder: str) -> Optional[str]:
    """The last checkpoint in a folder that was written to its end, if there is one."""
    found: dict[int, Path] = {}
    for path in Path(folder).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match is None:
            continue
        try:
            json.loads((path / TRAINER_STATE_NAME).read_text(encoding="utf-8"))  # the last file to be written
        except (OSError, ValueError):
            logger.warning("%s was not written to its end, and is left alone.", path)
            continue
        found[int(match[1])] = path
    return str(found[max(found)]) if found else None


def _check_same_recipe(recipe: Recipe) -> None:
    """Raise `ValueError` if a folder with checkpoints belongs to other models, data or stitches."""
    path = Path(recipe.output_dir, _RECIPE)
    key = recipe.differs_from(read_recipe([str(path)])) if path.exists() else None
    if key is not None:
        raise ValueError(
            f"{recipe.output_dir} holds checkpoints of another recipe, which differs in {key}. Name another "
            "output_dir, or delete the folder."
        )


def _check_evaluation(held_out: Mapping[str, Any], recipe: Recipe) -> None:
    for name, rows in held_out.items():
        if len(rows) == 0:
            raise ValueError(
                f"The evaluation data of domain {name!r} has not one whole row of {recipe.data.block_size} tokens; "
                "see block_size, and held_out."
            )


def _losses(trainer: Trainer, model: PeftModel) -> Losses:
    """Losses by domain: of the seed, of the stitches before the first step, and of the trained stitches."""

    def by_domain(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
        matches = {re.fullmatch(rf"{prefix}_(\w+)_loss", key): value for key, value in metrics.items()}
        return {match[1]: value for match, value in matches.items() if match is not None}

    first = [entry for entry in trainer.state.log_history if entry["step"] == 0]
    before = {name: loss for entry in first for name, loss in by_domain(entry, "eval").items()}
    after = trainer.evaluate()
    trainer.save_metrics("eval", after)
    with model.disable_adapter():
        alone = trainer.evaluate(metric_key_prefix="seed")
    return {
        "seed alone": by_domain(alone, "seed"),
        **({"before training": before} if before else {}),
        "after training": by_domain(after, "eval"),
    }
