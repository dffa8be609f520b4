"""How figures and their differences are written into cells of tables; and tables that several pages have."""

from typing import Any

from ...reporting import table
from ..methods.registry import TITLES, form_of
from ..work.presets import FORMS, MORE_VARIANTS, VARIANTS


Results = dict[str, Any]
GOALS = {"average": "the average of the domains", "mixed": "mixed text"}


def figure(spread: dict[str, Any] | None, digits: int = 3) -> str:
    """Mean, and ± standard deviation over sets; nothing, where there is none."""
    if spread is None:
        return ""
    sd = "" if spread["sd"] is None else f" ± {spread['sd']:.{digits}f}"
    return f"{spread['mean']:.{digits}f}{sd}"


def models_of(row: dict[str, Any]) -> tuple[int, int]:
    """How many sets of models, and of which run: where both agree, means may be compared."""
    bits = row["bits_per_byte"]
    return bits.get("average", bits)["n"], row.get("run", 0)


def on_the_same_sets(methods: dict[str, Any]) -> dict[str, Any]:
    """The methods that were tested on the most sets, in one run: only their means may stand side by side."""
    most = max(map(models_of, methods.values()), default=(0, 0))
    return {name: row for name, row in methods.items() if models_of(row) == most}


def everywhere(results: Results) -> dict[str, Any]:
    """The main methods that were tested on all sets."""
    return on_the_same_sets(results["methods"])


def sets(row: dict[str, Any]) -> str:
    """How many sets, and of which run where it is not the first."""
    count, run = models_of(row)
    return f"{count}" + (f", run {run + 1}" if run else "")


def weights(row: dict[str, Any]) -> str:
    count = row.get("trained_parameters", 0)
    return "-" if not count else f"{count:,}" if count < 10_000 else f"{count / 1e3:,.0f}k"


def rates(row: dict[str, Any]) -> str:
    """Learning rates that were taken, with an asterisk at the edge of those that were tried, or with a dagger where
    none was, but what an earlier run had chosen."""
    taken = ", ".join(sorted({f"{rate:g}" for rate in row.get("learning_rates", [])}))
    mark = "†" if row.get("rate_of_earlier_run") else "*" if row.get("edge") else ""
    return taken + mark or "-"


def outcome(row: dict[str, Any]) -> str:
    favours_ours = row["high"] < 0 if row["figure"] == "bits_per_byte" else row["low"] > 0
    favours_theirs = row["low"] > 0 if row["figure"] == "bits_per_byte" else row["high"] < 0
    return "better" if favours_ours else "worse" if favours_theirs else "not told apart"


def interval(row: dict[str, Any], digits: int = 3) -> str:
    low, high = (f"{row[bound]:+.{digits}f}" for bound in ("low", "high"))
    return f"{row['difference']:+.{digits}f} ({low} to {high})"


def cross_names(results: Results) -> dict[str, str]:
    """The tables of the cross task in the results, by what paired differences call them: with the most items, for the
    usual steps or for more, and with fewer items."""
    items = {name: int(name.split()[0]) for name, rows in results["cross"].items() if rows}
    found = {}
    for name, count in items.items():
        few = count < max(items.values())
        found["cross_few" if few else "cross_long" if "for" in name else "cross"] = name
    return found


def cross_title(results: Results, name: str) -> str:
    items, _, steps = name.partition(" for ")
    return f"{int(items):,} training items, {steps or str(results['settings']['cross_steps']) + ' steps'}"


def cross_table(results: Results, items: str) -> str:
    """The cross task with so many training items: right answers in percent, and bits per byte of the answers, of the
    methods that were tested on the most sets. An asterisk marks the lowest or highest of the rates that were tried, a
    dagger a rate that an earlier run had chosen.

    Raises:
        ValueError: If there is no such table.
    """
    if items not in results["cross"]:
        raise ValueError(f"of the cross task there is {', '.join(results['cross']) or 'nothing'}, and no {items!r}")
    return table(CROSS_HEADS, cross_rows(on_the_same_sets(results["cross"][items])))


CROSS_HEADS = ["method", "trained weights", "learning rate", "right, %", "bits per byte", "sets"]


def cross_rows(methods: dict[str, Any]) -> list[list[str]]:
    return [
        [TITLES[name], weights(row), rates(row), figure(row["average"], 1), figure(row["bits_per_byte"]), sets(row)]
        for name, row in methods.items()
    ]


def variants_table(results: Results) -> str:
    """Variants of our forms, each against its form: the difference in bits per byte on text, and of answers on the
    cross task, where it was tried on that; and the weights of both.

    Raises:
        ValueError: If there are none.
    """
    found = {
        (row["ours"], row["on"]): row
        for row in results["paired"]
        if row["baseline"] == form_of(row["ours"]) and row["figure"] == "bits_per_byte"
    }
    names = [name for name in (*VARIANTS, *MORE_VARIANTS) if name not in FORMS]
    names = [name for name in names if all((name, on) in found for on in GOALS)]
    if not names:
        raise ValueError("no variant of our forms has been tested")

    def cells(name: str, on: str) -> list[Any]:
        row = found.get((name, on))
        return [interval(row), row["sets"]] if row else ["-", "-"]

    rows = [
        [TITLES[name], TITLES[form_of(name)], *(weights(results["methods"][one]) for one in (name, form_of(name))),
         interval(found[name, "average"]), *cells(name, "mixed"), *cells(name, "cross")]
        for name in names
    ]  # fmt: skip
    heads = [
        "variant",
        "its form",
        "trained weights",
        "weights of its form",
        *GOALS.values(),
        "sets",
        "cross task",
        "sets, cross task",
    ]
    return table(heads, rows, left=2)
