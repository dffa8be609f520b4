"""The input of `eval` and `gates`: an adapter with its tokenizer, and text files as rows of tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from peft.utils import CONFIG_NAME, infer_device
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from peft_bts._compat.peft import CausalLM, base_model
from peft_bts._compat.transformers import find_file
from peft_bts.forward.decoder import text_config
from peft_bts.model import stitch_tuner

from .common import stitch_config


Chat = list[dict[str, Any]]  # messages with `role` and `content`, as chat templates take them


def read_texts(source: str, text_column: str) -> list[str]:
    """Read the documents of a file: a .jsonl file has one per row, any other file is one.

    Raises:
        OSError, ValueError: If the file cannot be read, or holds no text.
    """
    return [document for document in _read(source, text_column, chats=False) if isinstance(document, str)]


def read_documents(source: str, text_column: str) -> list[Union[str, Chat]]:
    """The same, where rows may have `messages` instead of a text.

    Raises:
        OSError, ValueError: If the file cannot be read, or holds no text.
    """
    return _read(source, text_column, chats=True)


def _read(source: str, text_column: str, chats: bool) -> list[Union[str, Chat]]:
    path = Path(source)
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 text: {error}") from error
    documents: list[Union[str, Chat]] = [content]
    if path.suffix == ".jsonl":
        documents = []
        for number, line in enumerate(content.split("\n"), start=1):
            if not line.strip():
                continue
            where = f"{source}, line {number}"
            row = _row(line, where)
            if chats and text_column not in row and "messages" in row:
                documents.append(_chat(row["messages"], where))
            elif text_column not in row:
                also = ", or `messages`" if chats else ""
                raise ValueError(f"{where}: expected a JSON object with {text_column!r}{also}.")
            elif isinstance(row[text_column], str):
                documents.append(row[text_column])
            else:
                raise ValueError(f"{where}: {text_column!r} is not a string.")
    documents = [document for document in documents if document]
    if not documents:
        raise ValueError(f"{source} holds no text.")
    return documents


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: expected a JSON object: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, found a {type(row).__name__}.")
    return row


def _chat(messages: Any, where: str) -> Chat:
    good = isinstance(messages, list) and all(isinstance(message, dict) and "role" in message for message in messages)
    if not good or not messages:
        raise ValueError(f"{where}: expected `messages` to be a list of objects with `role` and `content`.")
    return messages


def load(adapter: str, dtype: str, device: Optional[str]) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load an adapter with its models, in eval mode, and the tokenizer beside it, or else that of its hub."""
    config = stitch_config(adapter)
    own = find_file(adapter, "tokenizer_config.json")
    if config.base_model_name_or_path is None:
        raise ValueError(f"{adapter!r} does not say what its hub is; set base_model_name_or_path in {CONFIG_NAME}.")
    source, revision = (adapter, None) if own else (config.base_model_name_or_path, config.revision)
    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision or "main", trust_remote_code=False)
    device = device or infer_device()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used: {error}") from error
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=dtype, device_map=device)
    return model.eval(), tokenizer


def row_length(model: PeftModel, asked: Optional[int]) -> int:
    """Choose the tokens per row: as asked for, or else 1024, or fewer if a model has fewer positions.

    Raises:
        ValueError: If a model cannot take as many as asked for.
    """
    models: dict[str, CausalLM] = {"hub": base_model(model)}
    for name, expert in stitch_tuner(model).experts[model.active_adapter].items():
        models[f"expert {name!r}"] = expert.model
    found = {who: getattr(text_config(one), "max_position_embeddings", None) for who, one in models.items()}
    limits: dict[str, int] = {who: limit for who, limit in found.items() if limit}
    for who, limit in limits.items():
        if asked is not None and asked > limit:
            raise ValueError(f"--sequence-length {asked} is more than the {limit} positions of the {who}.")
    return asked or min([1024, *limits.values()])


def load_domains(
    adapter: str,
    documents: Mapping[str, Sequence[Union[str, Chat]]],
    dtype: str,
    device: Optional[str],
    sequence_length: Optional[int],
    max_tokens: Optional[int],
) -> tuple[PeftModel, PreTrainedTokenizerBase, int, dict[str, Domain]]:
    """Load the model and its tokenizer, choose the tokens per row, and cut the documents of every domain into rows."""
    model, tokenizer = load(adapter, dtype, device)
    length = row_length(model, sequence_length)
    domains = {name: Domain.of(texts, tokenizer, length, max_tokens) for name, texts in documents.items()}
    return model, tokenizer, length, domains


@dataclass
class Domain:
    """The text of a domain, as models get it.

    Attributes:
        rows: Token ids. A document is cut into rows, and no row holds parts of two.
        counted: For every row, whether its tokens are to be predicted: of chats, what the assistant says.
        documents, size: How many documents these are, and how many bytes (UTF-8) they have.
    """

    rows: list[list[int]]
    counted: list[list[bool]] = field(default_factory=list)
    documents: int = 0
    size: int = 0

    @classmethod
    def of(
        cls,
        documents: Sequence[Union[str, Chat]],
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        max_tokens: Optional[int],
    ) -> Domain:
        """Tokenize documents with the special tokens that the tokenizer adds, until there are `max_tokens` tokens."""
        domain, left = cls([]), float("inf") if max_tokens is None else max_tokens
        for document in documents:
            if isinstance(document, str):
                text, ids = document, tokenizer(document, verbose=False)["input_ids"]
                counted = [True] * len(ids)
            else:
                text, ids, counted = render_chat(document, tokenizer)
            if len(ids) > left:
                ids, counted = ids[: int(left)], counted[: int(left)]
                text = str(tokenizer.decode(ids, skip_special_tokens=True))
            for start in range(0, len(ids), length):
                domain.rows.append(ids[start : start + length])
                domain.counted.append(counted[start : start + length])
            domain.documents += 1
            domain.size += len(text.encode())
            left -= len(ids)
            if left <= 0:
                break
        return domain

    def keep_predictable(self) -> None:
        """Keep the rows with something to predict, the longest first, so that batches need little padding."""
        kept = [(row, counted) for row, counted in zip(self.rows, self.counted) if any(counted[1:])]
        kept.sort(key=lambda pair: len(pair[0]), reverse=True)
        self.rows, self.counted = [row for row, _ in kept], [counted for _, counted in kept]

    @property
    def predicted(self) -> int:
        """How many tokens are to be predicted; the first of a row cannot be."""
        return sum(sum(counted[1:]) for counted in self.counted)

    def batches(self, size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield `input_ids`, `attention_mask` and labels, int64 and of shape (at most `size`, T), padded on the right.

        Labels are the ids, or -100 where nothing is to be predicted.
        """
        for start in range(0, len(self.rows), size):
            rows = self.rows[start : start + size]
            mask = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
            ids, labels = torch.zeros_like(mask), torch.full_like(mask, -100)
            for i, (row, counted) in enumerate(zip(rows, self.counted[start:])):
                ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
                labels[i, : len(row)] = torch.where(torch.tensor(counted), torch.tensor(row), -100)
            yield ids.to(device), mask.to(device), labels.to(device)


def render_chat(messages: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int], list[bool]]:
    """A chat as the tokenizer's template writes it: its text, its token ids, and which of them the assistant says.

    Templates that mark what the assistant says (`{% generation %}`) are asked. Of others, an answer is what comes
    after the prompt for it, up to the end of the message.

    Raises:
        ValueError: If there is no template, or an answer cannot be told from its prompt.
    """
    if not tokenizer.chat_template:
        raise ValueError("The tokenizer has no chat template, which rows with `messages` need.")
    text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    marked = re.search(r"\{%-?\s*generation\s*-?%\}", str(tokenizer.chat_template)) is not None
    encoded: Any = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=marked)
    ids: list[int] = encoded["input_ids"]
    if marked:
        return text, ids, [bool(said) for said in encoded["assistant_masks"]]
    counted = [False] * len(ids)
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt: Any = tokenizer.apply_chat_template(
                messages[:number], add_generation_prompt=True, return_dict=False
            )
            answer: Any = tokenizer.apply_chat_template(messages[: number + 1], return_dict=False)
            if ids[: len(prompt)] != prompt or ids[: len(answer)] != answer:
                raise ValueError(
                    "The tokenizer's chat template does not write a chat so that it begins with the prompts of its "
                    "answers, nor mark answers with {% generation %}: they cannot be told apart."
                )
            counted[len(prompt) : len(answer)] = [True] * (len(answer) - len(prompt))
    return text, ids, counted
