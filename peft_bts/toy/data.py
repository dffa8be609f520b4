"""Documents of four domains: Python's docstrings and sources, and two generated tasks."""

import ast
import hashlib
import inspect
import random
import sysconfig
from pathlib import Path

from tqdm import tqdm


Document = tuple[str, str]  # a prompt, which may be empty, and the answer that models learn
Documents = dict[str, list[Document]]  # by domain

DOMAINS = {"text": "docstrings", "code": "code", "math": "arithmetic", "lang": "translation"}
TASKS = ["math", "lang"]  # the domains with right answers
SPLITS = ["train", "validation", "test"]


def make_documents(smoke: bool = False) -> dict[str, Documents]:
    """All documents of the toy domains, as documents[split][domain]; `smoke` makes few of them."""
    rng = random.Random(0)
    documents = read_python(limit=100 if smoke else None)
    held_out, drawn = (16, 1_000) if smoke else (240, 80_000)
    for domain, tasks in (("math", arithmetic_tasks(rng)), ("lang", translation_tasks(rng, drawn))):
        documents["validation"][domain] = tasks[:held_out]
        documents["test"][domain] = tasks[held_out : 2 * held_out]
        # Drawn with replacement: where tasks are few, their order should not repeat, or it would be learned.
        documents["train"][domain] = rng.choices(tasks[2 * held_out :], k=drawn)
    return documents


# --- Python's own sources -------------------------------------------------------------------------------------------


def read_python(limit: int | None = None, root: Path | None = None) -> dict[str, Documents]:
    """Docstrings ("text") and the rest of the sources ("code") of Python's standard library, split by file.

    Prompts are empty: models learn all of these documents.

    Args:
        limit: How many files to read at most.
        root: Read the sources in this folder instead.

    Raises:
        FileNotFoundError: If there are hardly any sources.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}
    files = [path for path in sorted(root.rglob("*.py")) if not skip & set(path.relative_to(root).parts)]
    if len(files) < 100:
        raise FileNotFoundError(
            f"{root} has {len(files)} Python sources, and at least 100 are needed. Is Python's standard library "
            "installed with its sources?"
        )

    # A file's place depends on its name alone, so that another Python version tests on the same modules.
    def digest(path: Path) -> int:
        return int(hashlib.sha256(path.relative_to(root).as_posix().encode()).hexdigest(), 16)

    documents: dict[str, Documents] = {split: {"text": [], "code": []} for split in SPLITS}
    for path in tqdm(sorted(files, key=digest)[:limit], desc="read sources"):
        try:
            docstrings, code = split_source(path.read_text(encoding="utf-8", errors="ignore"))
        except SyntaxError:  # templates, and files for other versions
            continue
        parts = documents[{0: "test", 1: "validation"}.get(digest(path) % 16, "train")]
        parts["text"] += [("", text) for text in docstrings if is_english(text)]
        parts["code"] += [("", code)] if code.isascii() else []
    return documents


def split_source(source: str) -> tuple[list[str], str]:
    """The docstrings of a source file, and its code without them."""
    docstrings: list[str] = []
    lines: list[str | None] = [*source.split("\n")]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node, clean=False)
            if docstring is not None:
                docstrings.append(inspect.cleandoc(docstring))
                for number in range(node.body[0].lineno - 1, node.body[0].end_lineno or 0):
                    lines[number] = None
    return docstrings, "\n".join(line for line in lines if line is not None)


def is_english(text: str) -> bool:
    """Return whether a docstring is prose: 512 tokens leave no room for other scripts, and doctests are code."""
    return text.isascii() and ">>>" not in text and len(text) > 60


# --- Generated tasks ------------------------------------------------------------------------------------------------


def arithmetic_tasks(rng: random.Random) -> list[Document]:
    """Every 2-digit number plus or minus every digit, in random order: "47+8=" and "550".

    The answer is zero-padded to three digits, and its units come first, so that a carry is known when it is needed.
    """
    tasks = []
    for a in range(10, 100):
        for b in range(10):
            for sign, result in (("+", a + b), ("-", a - b)):
                tasks.append((f"{a}{sign}{b}=", f"{result:03d}"[::-1]))
    rng.shuffle(tasks)
    return tasks


NOUNS = {
    "dog": "hundo", "cat": "kato", "bird": "birdo", "tree": "arbo", "book": "libro", "house": "domo",
    "friend": "amiko", "boy": "knabo", "girl": "knabino", "teacher": "instruisto", "apple": "pomo", "flower": "floro",
}  # fmt: skip
ADJECTIVES = {
    "big": "granda", "small": "malgranda", "good": "bona", "new": "nova", "old": "malnova", "black": "nigra",
    "green": "verda", "blue": "blua",
}  # fmt: skip
VERBS = {
    ("sees", "see", "saw"): "vid", ("loves", "love", "loved"): "am", ("finds", "find", "found"): "trov",
    ("wants", "want", "wanted"): "vol", ("helps", "help", "helped"): "help", ("draws", "draw", "drew"): "desegn",
}  # fmt: skip


def translation_tasks(rng: random.Random, count: int) -> list[Document]:
    """`count` different short English sentences, with their Esperanto.

    Esperanto is regular enough to be written by rule: nouns end in -o, adjectives in -a; both take -j in the plural
    and -n as an object; verbs end in -is, -as, -os for past, present, future; there is no word for "a".
    """

    def noun_phrase(case: str) -> tuple[str, str, bool]:
        (noun, nomo), (adjective, adjektivo) = rng.choice([*NOUNS.items()]), rng.choice([*ADJECTIVES.items()])
        plural, definite = rng.random() < 0.5, rng.random() < 0.5
        article = "the " if definite else "" if plural else "an " if adjective[0] in "aeiou" else "a "
        ending = ("j" if plural else "") + case
        english = f"{article}{adjective} {noun}{'s' if plural else ''}"
        return english, f"{'la ' if definite else ''}{adjektivo}{ending} {nomo}{ending}", plural

    tasks: dict[str, str] = {}
    while len(tasks) < count:
        subject, subjekto, plural = noun_phrase("")
        thing, objekto, _ = noun_phrase("n")
        (singular, base, past), verbo = rng.choice([*VERBS.items()])
        verb, ending = rng.choice([(past, "is"), (base if plural else singular, "as"), (f"will {base}", "os")])
        tasks[f"{subject} {verb} {thing} ="] = f" {subjekto} {verbo}{ending} {objekto}"
    return list(tasks.items())
