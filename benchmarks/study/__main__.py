"""Download and build the corpora, and print their tables: `PYTHONPATH=benchmarks python -m study [cache]`."""

import sys
from pathlib import Path

from .corpora import load_corpora


if __name__ == "__main__":
    corpora = load_corpora(Path(sys.argv[1] if len(sys.argv) > 1 else ".cache/study"))
    print(corpora.counts)
