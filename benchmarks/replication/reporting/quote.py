"""Puts the study's figures into pages, between marks, so that none is typed by hand.

    python -m benchmarks.replication.reporting.quote README.md docs/choosing-options.md

A page says which figures it wants by `<!-- study: table -->` and `<!-- /study -->`; what stands between them is
replaced by what `benchmarks/results/replicate.json` says now. `QUOTES` lists what there is.
"""

import json
import re
import sys
from pathlib import Path

from .advice import advice, small_table
from .cells import Results, cross_table, variants_table


QUOTES = {
    "advice": advice,
    "table": small_table,
    "cross": lambda results: cross_table(results, "2000"),
    "cross_long": lambda results: cross_table(results, "2000 for 1000 steps"),
    "cross_few": lambda results: cross_table(results, "200"),
    "variants": variants_table,
}
RESULTS = Path(__file__).parents[2] / "results" / "replicate.json"

_MARKED = re.compile(r"(<!-- study: (\w+) -->\n).*?(<!-- /study -->)", re.S)


def quote(page: str, results: Results) -> str:
    """The page with its marked places filled.

    Raises:
        ValueError: If there is no place, or one for something that is not in `QUOTES`.
    """
    places = _MARKED.findall(page)
    unknown = [name for _, name, _ in places if name not in QUOTES]
    if not places or unknown:
        found = f"asks for {', '.join(unknown)}" if unknown else "has no place for figures"
        raise ValueError(f"the page {found}; write <!-- study: NAME -->, NAME one of {', '.join(QUOTES)}, then a line "
                         "with <!-- /study -->")  # fmt: skip
    return _MARKED.sub(lambda match: f"{match[1]}\n{QUOTES[match[2]](results)}\n\n{match[3]}", page)


if __name__ == "__main__":
    if not RESULTS.exists():
        raise SystemExit(f"{RESULTS} is not there: run `python -m benchmarks.replicate --preset full` first.")
    for path in map(Path, sys.argv[1:]):
        path.write_text(quote(path.read_text(), json.loads(RESULTS.read_text())))
