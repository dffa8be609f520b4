"""Programs: Python and JavaScript in passages, and docstrings in which prose, code and sums follow each other."""

import ast
import inspect
import re

from .documents import Document, passages


def is_written_by_hand(text: str) -> bool:
    """Whether people wrote it: minified and generated files have very long lines."""
    lines = text.split("\n")
    return len(lines) > 5 and len(text) / len(lines) < 80 and max(map(len, lines)) < 400


def program(text: str, language: str, source: str) -> list[Document]:
    """One file's passages; they are ASCII, as nearly all programs are."""
    text = text.replace("\r\n", "\n")
    if not is_written_by_hand(text):
        return []
    return [Document(((language, piece),), source) for piece in passages(text) if piece.isascii()]


# --- Docstrings -----------------------------------------------------------------------------------------------------

_SUM = re.compile(r"\d\s*(\+|-|\*|/|//|%|\*\*)\s*\d|\(\s*\d+(\s*,\s*\d+)*\s*\)")
_NUMBER = re.compile(r"\s*-?\d[\d./]*\s*$")


def docstrings(text: str) -> list[str]:
    """All docstrings of a module, its classes and its functions; none where it does not parse."""
    try:
        tree = ast.parse(text)
    except SyntaxError:  # templates, and files for other versions
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, kinds))
    return [inspect.cleandoc(docstring) for docstring in found if docstring]


def docstring_parts(docstring: str) -> list[tuple[str, str]]:
    """Lines in stretches of one kind: "python" for what is typed, "maths" for numbers it gives, else "prose"."""
    parts: list[tuple[str, str]] = []
    before = ""
    for line in docstring.splitlines(keepends=True):
        if line.lstrip().startswith((">>>", "...")):
            kind = "python"
        elif before == "python" and _NUMBER.match(line):
            kind = "maths"
        else:
            kind = "prose" if line.strip() or not parts else parts[-1][0]
        if parts and parts[-1][0] == kind:
            parts[-1] = (kind, parts[-1][1] + line)
        else:
            parts.append((kind, line))
        before = kind
    return parts


def docstrings_with_sums(text: str, source: str, longest: int = 480) -> list[Document]:
    """Windows of docstrings that hold an example whose result is a number: prose, what is typed, the result."""
    documents = []
    for docstring in docstrings(text):
        window: list[tuple[str, str]] = []
        for kind, part in docstring_parts(docstring):
            if kind == "prose" and not window and len(part) > 300:
                part = part[-300:].partition("\n")[2]
            if sum(len(text) for _, text in window) + len(part) > longest:
                break
            if part:
                window.append((kind, part))
        sums = [part for kind, part in window if kind == "python" and _SUM.search(part)]
        results = [part for kind, part in window if kind == "maths"]
        whole = "".join(part for _, part in window)
        if sums and results and window[0][0] == "prose" and whole.isascii() and len(whole) >= 120:
            documents.append(Document(tuple(window), source))
    return documents
