"""Tiny archives in the place of the study's sources: pages, programs and catalogues made from nothing."""

import io
import itertools
import random
import tarfile
import zipfile

import polib

from benchmarks.replication.text.corpora import Sizes


# What is made of them.
SIZES = Sizes(
    documents={"validation": 6, "test": 12}, items={"examples": 20, "validation": 4, "test": 8}, problems=60, cross=20
)

WORDS = [first + last for first, last in itertools.product(
    ("ba", "ce", "di", "fo", "gu", "ka", "le", "mi", "no", "pu"), ("rin", "tas", "vel", "mok", "sid")
)]  # fmt: skip
FRENCH = {word: word[::-1] + "é" for word in WORDS}
GERMAN = {word: word[::-1] + "ü" for word in WORDS}


def sentence(rng, count=12):
    return " ".join(rng.choices(WORDS, k=count)).capitalize() + "."


def paragraph(rng):
    return "\n".join(sentence(rng) for _ in range(3))


def page(rng):
    """Prose, code, prose, code, prose."""
    code = "    def {0}({1}):\n        return {1} + {2}\n"
    parts = ["Title\n=====\n"]
    for _ in range(2):
        parts += [paragraph(rng) + "\n\nAn example::\n", code.format(*rng.sample(WORDS, 3))]
    return "\n".join([*parts, paragraph(rng), ""])


def python(rng):
    lines = []
    for _ in range(12):
        name, value, other = rng.sample(WORDS, 3)
        lines += [f"def {name}({value}, {other}):", f"    {value} = {other} + {rng.randint(10, 99)}",
                  f"    return {value}", ""]  # fmt: skip
    return "\n".join(lines)


def javascript(rng):
    lines = []
    for _ in range(12):
        name, value, other = rng.sample(WORDS, 3)
        lines += [f"function {name}({value}, {other}) {{", f"  var sum = {value} + {other};",
                  f"  return {value} * sum;", "}", ""]  # fmt: skip
    return "\n".join(lines)


def docstring(rng):
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    text = f"{paragraph(rng)}\n\n    >>> {a} + {b}\n    {a + b}\n    >>> {b} * 2\n    {2 * b}\n    "
    return f'def {rng.choice(WORDS)}():\n    """{text}"""\n'


def catalogue(rng, translate, messages):
    made = polib.POFile()
    made.metadata = {"Content-Type": "text/plain; charset=UTF-8"}
    for english in messages:
        translated = " ".join(translate[word.lower()] for word in english.split())
        made.append(polib.POEntry(msgid=english, msgstr=translated))
    return str(made)


def archive(path, files):
    if path.suffix == ".whl":
        with zipfile.ZipFile(path, "w") as made:
            for name, text in files.items():
                made.writestr(name, text)
    else:
        with tarfile.open(path, "w:gz") as made:
            for name, text in files.items():
                content = text.encode()
                member = tarfile.TarInfo(f"wrapped-1.0/{name}")
                member.size = len(content)
                made.addfile(member, io.BytesIO(content))


def write_archives(folder, sources):
    """An archive for each source, as the study reads them; their paths by name."""
    rng = random.Random(0)
    paths = {}
    for source in sources.values():
        folders = {"django": "django", "django-cms": "cms/static/cms/js", "nbclassic": "nbclassic/static/base/js"}
        root = folders.get(source.name, source.name)
        messages = [" ".join(rng.choices(WORDS, k=rng.randint(2, 6))) for _ in range(120)]
        files = {
            f"{root}/locale/fr/LC_MESSAGES/django.po": catalogue(rng, FRENCH, messages),
            f"{root}/locale/de/LC_MESSAGES/django.po": catalogue(rng, GERMAN, messages),
        }
        for i in range(40):
            files[f"{root}/file{i}.py"] = docstring(rng) if source.name in ("sympy", "mpmath") else python(rng)
            files[f"{'django/contrib/admin/static' if root == 'django' else root}/file{i}.js"] = javascript(rng)
            if source.name == "django":
                files[f"docs/page{i}.txt"] = page(rng)
        files[f"{root}/copy.py"] = files[f"{root}/file0.py"]  # vendored twice
        paths[source.name] = folder / source.file
        archive(paths[source.name], files)
    return paths
