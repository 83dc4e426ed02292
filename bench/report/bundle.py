"""A suite's results as one file for a reviewer: records, predictions, suite, environment."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from bench.errors import UserError, reason
from bench.plan.stage import Plan
from bench.store.bundle import HELD, Told, tar
from bench.store.files import json_text
from bench.store.store import Store
from bench.suite.load import data_info, suite_files
from maect.files import write_atomic
from reports.frames import SuiteView


def write_bundle(
    path: Path, plan: Plan, store: Store, view: SuiteView, chosen: dict[str, Any]
) -> int:
    """Write what a store has of a plan into a tar file. Return how many files it holds.

    `chosen` has the options by which the plan was made, as `Told` names them.
    Raises `UserError` where there is nothing or something is damaged, or it cannot be written.
    """
    suite = plan.suite
    if view.metrics.is_empty() or view.problems:
        told = view.problems[0] if view.problems else "nothing is measured yet"
        raise UserError(f"suite {view.suite} cannot be bundled: {told}; run it first")
    stages, rows = plan.stages.values(), suite.variants.values()
    others = (e.data for variant in rows for e in variant.evaluations.values() if e.data)
    data = dict.fromkeys(chain((variant.row.data for variant in rows), others))
    silent = (({*store.attempts(s.key)} - {*s.state.statuses}, s.key) for s in stages)
    planned = Told(
        suite=suite.path.name,
        profile=suite.profile,
        seeds=len(suite.seeds),
        **chosen,
        data=[(one, replace(data_info(one), where="")) for one in data],
        processors={suite.isa: next(iter(stages)).settings["numerics"]["processors"]},
        empty=[(key, number) for numbers, key in silent for number in sorted(numbers)],
    )
    environment = {name: value for name, value in view.provenance.items() if name != "command"}
    files: dict[str, Callable[[], bytes]] = {
        "bundle.json": lambda: json_text(planned.model_dump(mode="json")),
        "environment.json": lambda: json_text(environment),
        "store.json": (store.root / "store.json").read_bytes,
    }
    files |= {f"suite/{name}": file.read_bytes for name, file in suite_files(suite.path).items()}
    sums, runs = dict[str, str](), set[str]()
    for stage in stages:
        for attempt in stage.state.attempts:
            runs.add(attempt.run)
            left = "started.json" if attempt.status == "running" else "record.json"
            place = store.attempt_folder(stage.key, attempt.attempt) / left
            files[place.relative_to(store.root).as_posix()] = place.read_bytes
        record = stage.record
        for name in record.files.keys() & HELD if record is not None else ():
            assert record is not None
            place = (store.artifact(record) / name).relative_to(store.root)
            sums[place.as_posix()] = record.files[name].sha256
            files[place.as_posix()] = partial(store.read, record, name)
    for run in store.runs():
        if run.id in runs or (run.suite, run.profile) == (suite.name, suite.profile):
            name = f"runs/{run.id}.json"
            files[name] = (store.root / name).read_bytes
    small = {name: read() for name, read in files.items() if name not in sums}
    sums |= {name: hashlib.sha256(data).hexdigest() for name, data in small.items()}
    lines = "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))

    def content() -> Iterator[tuple[str, bytes]]:
        yield "SHA256SUMS", lines.encode()
        for name in sorted(files):
            yield name, small[name] if name in small else files[name]()

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, tar(content()))
    except (OSError, ValueError) as error:
        raise UserError(f"it cannot be written: {reason(error)}", file=path) from None
    return len(files) + 1
