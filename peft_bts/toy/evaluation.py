"""What models make of the toy domains: losses, accuracies, and a table of them."""

from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from rich import box
from rich.table import Table
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from .data import DOMAINS, TASKS, Documents


Scores = dict[str, tuple[float, float]]  # by domain: the loss per token, in nats, and the accuracy, in percent


CausalLM: TypeAlias = Any  # of transformers, stitched or not: no class of theirs says that it can generate


@torch.no_grad()
def complete(
    model: CausalLM, tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_new_tokens: int = 32
) -> list[str]:
    """The greedy answers to a batch of prompts."""
    batch = tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def evaluate(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    blocks: dict[str, torch.Tensor],
    documents: Documents,
    bar: tqdm,
) -> Scores:
    """The loss and the accuracy in every domain: of next tokens, or, where there is a right answer, of whole answers.

    Args:
        blocks: Tokens and labels, (N, 2, T) for every domain.
        documents: Those of the tasks are asked, and their answers must be right to the letter.
        bar: Told of every domain that is done.
    """
    scores = {}
    for domain in DOMAINS:
        losses: list[float] = []
        hits: list[bool] = []
        for rows in blocks[domain].split(32):
            tokens, labels = rows.unbind(1)
            logits, targets = model(input_ids=tokens).logits[:, :-1], labels[:, 1:]
            logits, targets = logits[targets != -100], targets[targets != -100]
            losses += F.cross_entropy(logits, targets, reduction="none").tolist()
            hits += (logits.argmax(-1) == targets).tolist()
        if domain in TASKS:  # only a whole answer counts here, to the letter
            hits = []
            for start in range(0, len(documents[domain]), 80):
                prompts, answers = zip(*documents[domain][start : start + 80])
                completions = complete(model, tokenizer, list(prompts))
                hits += [completion == answer for completion, answer in zip(completions, answers)]
        scores[domain] = sum(losses) / len(losses), 100 * sum(hits) / len(hits)
        bar.update()
    return scores


def average(scores: Scores) -> float:
    """The mean accuracy over domains, in percent."""
    return sum(accuracy for _, accuracy in scores.values()) / len(scores)


def score_table(scores: dict[str, Scores], title: str) -> Table:
    """Rows are models, columns are domains; the best of a column is bold."""
    caption = (
        "loss: per token (of the answers). token: next tokens that are right, in %.\n"
        "exact: answers that are right to the letter, in %. average: of the percentages."
    )
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("model", no_wrap=True)
    for domain, heading in DOMAINS.items():
        table.add_column(f"{heading}\nloss  {'exact' if domain in TASKS else 'token'}", justify="right", no_wrap=True)
    table.add_column("average", justify="right")

    def bold_if(best: bool, text: str) -> str:
        return f"[bold green]{text}[/]" if best else text

    for model, row in scores.items():
        cells = []
        for domain, (loss, accuracy) in row.items():
            rivals = [other[domain] for other in scores.values()]
            least, most = min(loss for loss, _ in rivals), max(accuracy for _, accuracy in rivals)
            cells.append(f"{bold_if(loss == least, f'{loss:.2f}')}  {bold_if(accuracy == most, f'{accuracy:5.1f}')}")
        best = average(row) == max(map(average, scores.values()))
        table.add_row(model, *cells, bold_if(best, f"{average(row):.1f}"))
    return table
