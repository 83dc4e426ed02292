"""What the store already has of a plan: which stages are cached, stale, pending or left out."""

from __future__ import annotations

from bench.plan.stage import Plan, Stage
from bench.store.store import Store
from bench.suite.schema import Suite
from maect.files import digest

#: why a search left a stage out whose cell it never came to
UNTRIED = "not tried"


def assess_all(plan: Plan, store: Store) -> None:
    """Set every stage's status from the store."""
    if plan.unresolved is None:
        store.refresh()
        for stage in plan.stages.values():
            assess(stage, store, keep_stale=plan.keep_stale)
    mark_left_out(plan, store)


def assess(stage: Stage, store: Store, *, keep_stale: bool = False) -> None:
    """Set a stage's status from the store; its inputs must have been assessed before."""
    stage.state = store.state(stage.key)
    stage.status, stage.reason = "pending", None
    record = stage.state.record
    if record is None:
        told = {"failed": "failed before: ", "stopped": "stopped "}
        for last in stage.state.attempts[-1:]:
            if last.error is not None and last.status in told:
                stage.reason = told[last.status] + last.error.message
        return
    waiting = [s.title for s in stage.inputs.values() if s.status != "cached"]
    if waiting:
        stage.reason = f"its input is redone: {waiting[0]}"
        return
    before, now = record.code, stage.code
    changed = {module for module, _ in before.modules.items() ^ now.modules.items()}
    if before.hash != now.hash and changed:
        stage.status = "cached" if keep_stale else "stale"
        stage.reason = f"code changed: {', '.join(sorted(changed))}"
        return
    for name, source in stage.inputs.items():
        assert source.record is not None
        if name not in record.inputs or record.inputs[name].files != source.record.file_hashes:
            stage.status, stage.reason = "stale", f"input '{name}' has other content than before"
            return
    stage.status = "cached"


# ------------------------------------------------------------------- what a search left out


def search_identity(suite: Suite) -> str:
    """Return a digest of everything that a search's decisions depend on, results apart."""
    search = suite.search.resolved() if suite.search else {}
    if not search.get("rungs"):  # as searches were before there were rungs
        search.pop("rungs", None)
    return digest([search, suite.seeds, sorted(suite.variants)], 20)


def mark_left_out(plan: Plan, store: Store) -> None:
    """Set the status `pruned` where the newest finished search with this identity did so."""
    if not plan.suite.explores:
        return
    search = search_identity(plan.suite)
    left_out: dict[str, str] = {}
    for run in store.runs():
        if run.search == search and run.pruned is not None:
            left_out = run.pruned
    for key, reason in left_out.items():
        stage = plan.stages.get(key)
        if stage is not None and stage.status == "pending":
            stage.status, stage.reason = "pruned", reason
