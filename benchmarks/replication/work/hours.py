"""How many core hours the study's parts have taken so far, and how many are left, by what like pieces took."""

from collections import defaultdict
from collections.abc import Collection
from statistics import mean

from ...reporting import table
from .jobs import Job
from .plan import Plan


def kind_of(job: Job) -> str:
    """Pieces of one kind take alike: those of the same name on other sets; a trial as other trials of its method."""
    size, _, *rest = job.name.split("/") if "/set" in job.name else (job.name.split("/")[0], "", "")
    if len(rest) == 3 and rest[2] not in ("test", "four", "gates") and not rest[2].startswith("answers"):
        rest[2] = "trial"
    return "/".join([size, *rest])


def hours_table(plan: Plan, only: Collection[str] = ()) -> str:
    """By part: pieces done, core hours that they took, and an estimate of what is left, as Markdown.

    A piece that several parts need counts for the first of them that is in the table. Where no piece of a kind is done
    yet, nothing is known of it, and "at least" stands before the estimate.

    Args:
        only: Names of parts, to have these alone [all parts].
    """
    times = defaultdict(list)
    for job in plan.jobs():
        if plan.store.has(job.name):
            times[kind_of(job)].append(plan.store.read(job.name)["cpu_seconds"])
    rows, seen = [], set()
    for part in plan.preset.parts:
        if only and part.name not in only:
            continue
        jobs = [job for job in plan.jobs_of(part) if job.name not in seen]
        seen |= {job.name for job in jobs}
        done = [job for job in jobs if plan.store.has(job.name)]
        left = [job for job in jobs if not plan.store.has(job.name)]
        spent = sum(plan.store.read(job.name)["cpu_seconds"] for job in done)
        known = [mean(times[kind_of(job)]) for job in left if kind_of(job) in times]
        least = "at least " if len(known) < len(left) else ""
        rows.append(
            [part.name, f"{len(done)} of {len(jobs)}", f"{spent / 3600:.2f}", f"{least}{sum(known) / 3600:.2f}"]
        )
    return table(["part", "pieces", "core hours so far", "core hours left"], rows)
