"""Pages of documentation in reStructuredText: prose alone, and the pages as they are, from prose to code and back."""

import re

from .documents import Document, passages


Stretch = tuple[str, str]  # ("prose" | "code", text)

_CODE = re.compile(r"\s*\.\. (code-block|sourcecode|code|console|literalinclude)::")


def stretches(page: str) -> list[Stretch]:
    """A page in stretches of prose and code, in order; together they are the page.

    Code is what is indented behind `.. code-block::` or behind a paragraph that ends with `::`. All the rest counts as
    prose, headings and other markup too.
    """
    found: list[tuple[str, list[str]]] = []
    border = None  # while inside code: the indent of the line that announced it
    for line in page.expandtabs(4).splitlines(keepends=True):
        indent = len(line) - len(line.lstrip(" "))
        blank = not line.strip()
        if border is not None and not blank and indent <= border:
            border = None
        kind = "code" if border is not None else "prose"
        if blank and found:
            kind = found[-1][0]
        if not found or found[-1][0] != kind:
            found.append((kind, []))
        found[-1][1].append(line)
        directive = line.lstrip().startswith(".. ")
        if border is None and not blank and (_CODE.match(line) or (line.rstrip().endswith("::") and not directive)):
            border = indent
    return [(kind, "".join(lines)) for kind, lines in found]


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph is made of sentences: no heading, no directive, no table, no list of names."""
    if paragraph.startswith(("..", ":", "|", "+", "=", "-", ">>>")) or re.search(r"^\W{4,}$", paragraph, re.M):
        return False
    return len(paragraph) > 60 and paragraph.rstrip().endswith((".", ":", "!", "?", ")", ". ::"))


def prose(page: str, source: str) -> list[Document]:
    """The page's paragraphs of sentences, several to a document."""
    paragraphs = []
    for kind, text in stretches(page):
        if kind == "prose":
            for paragraph in re.split(r"\n\s*\n", text):
                paragraph = "\n".join(line.strip() for line in paragraph.strip().split("\n"))
                if is_prose(paragraph):
                    paragraphs.append(re.sub(r"::$", ":", paragraph))
    return [Document((("prose", text),), source) for text in passages("\n\n".join(paragraphs)) if text.isascii()]


def mixed(page: str, source: str, longest: int = 660) -> list[Document]:
    """Windows of the page, as it is, that change between prose and code at least twice."""
    documents, window = [], []
    for kind, text in stretches(page):
        # Of long prose in front of code, the end is what belongs to it.
        text = text if len(text) <= 300 else _last_paragraphs(text, 300) if not window else text
        window.append((kind, text))
        if sum(len(part) for _, part in window) > longest:
            if len(window) > 3:
                documents.append(Document(tuple(window[:-1]), source))
            window = []
    if len(window) > 2:
        documents.append(Document(tuple(window), source))
    return [one for one in documents if one.text.isascii() and all(part.strip() for _, part in one.parts)]


def _last_paragraphs(text: str, longest: int) -> str:
    cut = text.find("\n\n", len(text) - longest)
    return text[cut + 2 :] if 0 <= cut < len(text) - 2 else text[-longest:]
