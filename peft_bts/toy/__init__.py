"""A seed and three experts to try things on: trained from nothing, on a CPU, in minutes, with nothing downloaded.

    from peft_bts.toy import Toy

    toy = Toy(".cache/quickstart")
    seed, experts = toy.folder("seed"), toy.experts  # folders of checkpoints, for every command and function
    documents = toy.documents["test"]["math"]  # [("47+8=", "550"), ...]

The seed is a Llama of 0.6M parameters with a BPE tokenizer, trained on Python's own docstrings and sources, a little
arithmetic and a little English-to-Esperanto translation. Three copies of it go on alone, one with code, one with
arithmetic, one with translation. The quickstart, the benchmarks and the documentation work with these models.

Nothing else in the package uses this folder, and it uses nothing else of the package.
"""

from .data import DOMAINS, TASKS, Document, Documents, arithmetic_tasks, make_documents, read_python, translation_tasks
from .evaluation import Scores, average, complete, evaluate, score_table
from .models import EXPERTS, STAGES, Stage, Toy, average_weights, train
from .tokens import END, LENGTH, make_blocks, mix_blocks, train_tokenizer


__all__ = [
    "DOMAINS",
    "END",
    "EXPERTS",
    "LENGTH",
    "STAGES",
    "TASKS",
    "Document",
    "Documents",
    "Scores",
    "Stage",
    "Toy",
    "arithmetic_tasks",
    "average",
    "average_weights",
    "complete",
    "evaluate",
    "make_blocks",
    "make_documents",
    "mix_blocks",
    "read_python",
    "score_table",
    "train",
    "train_tokenizer",
    "translation_tasks",
]
