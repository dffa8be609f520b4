"""Where the text comes from: releases on the package index, pinned by hash, read without being installed."""

import hashlib
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm


@dataclass(frozen=True)
class Source:
    """One release: the file that the index has of it, its hash and licence, and what of it is read."""

    name: str
    version: str
    file: str
    sha256: str
    licence: str
    gives: str

    @property
    def is_wheel(self) -> bool:
        return self.file.endswith(".whl")


SOURCES = {
    source.name: source
    for source in [
        Source("django", "5.2.19", "django-5.2.19.tar.gz",
               "ad03d8abc51dbff95ebf34b27123cf0c26a3b62db7ba0cd520783686362533d1", "BSD-3-Clause",
               "documentation, Python, JavaScript, messages"),
        Source("wagtail", "8.0.1", "wagtail-8.0.1-py3-none-any.whl",
               "1e6ad5c7891a54efce1400e168298b5a2cc343b642cee89c31bf5ec30c98b26c", "BSD-3-Clause",
               "Python, messages"),
        Source("horizon", "27.0.0", "horizon-27.0.0-py3-none-any.whl",
               "8a981dae4fb6626e71553aa185f6e429b0b1efb86b04b0a72c3b18ee04f1f990", "Apache-2.0",
               "JavaScript, messages"),
        Source("nbclassic", "1.3.3", "nbclassic-1.3.3-py3-none-any.whl",
               "dcee5149aa6aa01846c7458d6394b29b325213b5e118ee14c80d689122e0e4f2", "BSD-3-Clause (CodeMirror: MIT)",
               "JavaScript"),
        Source("django-cms", "5.1.3", "django_cms-5.1.3-py3-none-any.whl",
               "acf31919aab389d2bea253efa97a901bf55e96046a252f23a7a742e495848a5e", "BSD-3-Clause",
               "JavaScript, messages"),
        Source("django-oscar", "4.2.1", "django_oscar-4.2.1-py3-none-any.whl",
               "adbb95ea0130859c204cc6fb221052d6d437ecbaa90800e8418a809f72645e9c", "BSD-3-Clause", "messages"),
        Source("pretix", "2026.8.0", "pretix-2026.8.0-py3-none-any.whl",
               "a78932e698778d873530d67f25a57c28d1c09b1bfb1a22ec817c00d90397db85", "AGPL-3.0 with additional terms",
               "messages"),
        Source("spyder", "6.1.8", "spyder-6.1.8-py3-none-any.whl",
               "4da836742a7138c93392a8a0bd1a5ff40002cf92d217ef0e7bed11b522322f90", "MIT", "messages"),
        Source("gramps", "6.0.8", "gramps-6.0.8-py3-none-any.whl",
               "56f03bcb643320eb9f9892d4c3f8bbe7c4c4d2e4c71e56f598584af24561ec1c", "GPL-2.0-or-later", "messages"),
        Source("mayan-edms", "4.12.2", "mayan_edms-4.12.2-py2.py3-none-any.whl",
               "5eb0deccb29199a7add33a757161f3f461aa3b00451de13027049258dd412f67", "GPL-2.0-only", "messages"),
        Source("weblate", "2026.10.1", "weblate-2026.10.1-py3-none-any.whl",
               "27a779ceb05fec3665081df0d3f46f4b6ac0e3f499160a1c3cb145e8e35853d2", "GPL-3.0-or-later", "messages"),
        Source("sympy", "1.14.0", "sympy-1.14.0-py3-none-any.whl",
               "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5", "BSD-3-Clause",
               "docstrings with sums, for tests only"),
        Source("mpmath", "1.3.0", "mpmath-1.3.0-py3-none-any.whl",
               "a0b2b9fe80bbcd81a6647ff13108738cfb482d481d826cc0e02f5b35e5c88d2c", "BSD-3-Clause",
               "docstrings with sums, for tests only"),
    ]
}  # fmt: skip


def download(folder: Path) -> dict[str, Path]:
    """Bring all sources into `folder`, by name; what is there already, with the right hash, is left alone.

    Raises:
        SystemExit: If pip cannot get a file, or the index now has another one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    bar = tqdm(SOURCES.values(), desc="download sources", unit="file")
    for source in bar:
        bar.set_postfix_str(source.file)
        paths[source.name] = folder / source.file
        if not paths[source.name].exists() or digest(paths[source.name]) != source.sha256:
            download_one(source, paths[source.name])
    return paths


def download_one(source: Source, path: Path) -> None:
    """By pip, which checks the hash before it looks inside; it needs a moment longer for an sdist."""
    # Any Python that runs the study may read these wheels: none of them is installed.
    form = ["--only-binary", ":all:", "--python-version", "3.12"] if source.is_wheel else ["--no-binary", ":all:"]
    with tempfile.TemporaryDirectory(dir=path.parent) as place:
        wanted = Path(place) / "wanted.txt"
        wanted.write_text(f"{source.name}=={source.version} --hash=sha256:{source.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *form, "--require-hashes"]
        done = subprocess.run([*command, "--dest", place, "-r", str(wanted)], capture_output=True, text=True)
        found = Path(place) / source.file
        if done.returncode or not found.exists():
            raise SystemExit(
                f"pip did not bring {source.file} ({source.name} {source.version}). It said:\n{done.stderr[-2000:]}\n"
                f"If you have the file, put it into {path.parent} and start again."
            )
        found.replace(path)


def digest(path: Path) -> str:
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            total.update(part)
    return total.hexdigest()


def read_files(path: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Files of an archive whose names match `pattern` from their start, in the order of their names.

    The folder that an sdist wraps around everything is left out of the names.
    """
    wanted = re.compile(pattern)
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if wanted.match(name):
                    yield name, archive.read(name)
    else:
        with tarfile.open(path) as archive:
            members = {member.name.partition("/")[2]: member for member in archive.getmembers() if member.isfile()}
            for name in sorted(members):
                if wanted.match(name):
                    yield name, archive.extractfile(members[name]).read()
