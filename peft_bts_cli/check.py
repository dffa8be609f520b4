"""`peft-bts check`: whether experts fit a hub."""

from __future__ import annotations

from .common import Experts, Hub, Result, models_by_name


def check(hub: Hub, expert: Experts) -> Result:
    """Check whether experts can be stitched to a hub. Reads config and tokenizer files only, no weights."""
    from peft_bts.experts.compatibility import check_compatibility
    from peft_bts.reference import as_source

    reports = [
        check_compatibility(as_source(hub), source, name=name) for name, source in models_by_name(expert).items()
    ]
    ok = all(report.ok for report in reports)
    data = {"ok": ok, "experts": {report.name: report.to_dict() for report in reports}}
    return Result([part for report in reports for part in (*report.parts(), "")], data, ok)
