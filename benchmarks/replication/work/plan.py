"""All pieces of work of a preset, in the order in which they are done."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from ..text.loading import corpora_key
from .combining import Study
from .earlier import read_earlier
from .jobs import Job, Store
from .material import Material
from .presets import Part, Preset
from .sets import Set


class Plan:
    """A preset with its text, its store of results and its sets.

    The store is a folder whose name depends on the preset's sizes and on the corpora: `<cache>/<device>-<key>-<key>`.
    """

    def __init__(self, preset: Preset, cache: Path, device: str = "cpu") -> None:
        self.preset, self.device = preset, device
        self.material = Material(cache, preset)
        self.store = Store(cache / f"{device}-{preset.key}-{corpora_key(preset.corpora)}")
        self.earlier = read_earlier(self.store)
        self._sets: dict[tuple[str, int], Set] = {}

    def set(self, size: str, number: int) -> Set:
        if (size, number) not in self._sets:
            self._sets[size, number] = Set(self.preset, self.material, size, number, self.store, self.device)
        return self._sets[size, number]

    def studies(self, part: Part) -> list[Study]:
        """The part on each of its sets."""
        tuned: list[Study] = []
        studies = [Study(self.set(part.size, number), part, tuned, self.earlier) for number in range(part.sets)]
        tuned += studies[: self.preset.tuned_sets]
        return studies

    def tables(self) -> dict[tuple[str, str], Part]:
        """One part for each size and table: all methods and sets of the parts that fill it."""
        found: dict[tuple[str, str], Part] = {}
        for part in self.preset.parts:
            key = (part.size, part.table)
            before = found.get(key, replace(part, methods=()))
            methods = tuple(dict.fromkeys([*before.methods, *part.methods]))
            found[key] = replace(before, methods=methods, sets=max(before.sets, part.sets))
        return found

    def jobs_of(self, part: Part, numbers: Collection[int] | None = None) -> list[Job]:
        """Of one part, with all that it needs before it; on all of its sets, or on those of these numbers."""
        jobs: dict[str, Job] = {}
        for study in self.studies(part):
            if numbers is not None and study.set.number not in numbers:
                continue
            more = [study.set.tests_job, *study.set.model_jobs(study.experts, part.lora)]
            more += study.jobs()
            if part.kind == "prompts":  # of methods that another part has trained, or else it trains them
                more += study.prompt_jobs()
            for job in more:
                jobs.setdefault(job.name, job)
        if part == self.preset.parts[0]:
            cost = self.studies(part)[0].cost_job()
            jobs[cost.name] = cost
        return list(jobs.values())

    def jobs(self, only: Collection[str] = ()) -> list[Job]:
        """Every piece once, in the order of the preset; what a piece needs comes before it.

        Args:
            only: Names of parts, to have the pieces of these alone [all parts].
        """
        first, rest = self.preset.parts[: self.preset.together], self.preset.parts[self.preset.together :]
        rounds = [
            (part, number)
            for parts in (first, rest)
            for number in range(max((part.sets for part in parts), default=0))
            for part in parts
            if not only or part.name in only
        ]
        return list({job.name: job for part, number in rounds for job in self.jobs_of(part, [number])}.values())
