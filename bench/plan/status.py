"""What the store already has of a plan, and what a finished search left out of it."""

from __future__ import annotations

from bench.plan.stage import Plan, Stage
from bench.store.store import Store
from bench.suite.load import Suite
from maect.files import digest

#: why a stage is left out that a search never came to
UNTRIED = "not tried"


def assess(stage: Stage, store: Store, *, keep_stale: bool = False) -> None:
    """Set a stage's status from the store; its inputs must have been assessed before."""
    stage.state = store.state(stage.key)
    stage.status, stage.reason = "pending", None
    record = stage.state.record
    if record is None:
        last = stage.state.attempts[-1] if stage.state.attempts else None
        if last is not None and last["status"] == "failed":
            stage.reason = f"failed before: {last['error']['message']}"
        return
    waiting = [s.title for s in stage.inputs.values() if s.status != "cached"]
    if waiting:
        stage.reason = f"its input is redone: {waiting[0]}"
        return
    changed = changed_modules(stage)
    if changed:
        stage.status, stage.reason = "stale", f"code changed: {', '.join(changed)}"
        if keep_stale:
            stage.status = "cached"
        return
    for name, source in stage.inputs.items():
        files = {f: e["sha256"] for f, e in source.record["files"].items()}
        if record["inputs"][name]["files"] != files:
            stage.status, stage.reason = "stale", f"input '{name}' has other content than before"
            return
    stage.status = "cached"


def changed_modules(stage: Stage) -> list[str]:
    """Return the names of the maect modules whose code differs from what its record ran."""
    if stage.record["code"]["hash"] == stage.code["hash"]:
        return []
    before, now = stage.record["code"]["modules"], stage.code["modules"]
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


# ------------------------------------------------------------------ what a search has left out


def identity(suite: Suite) -> str:
    """Return a digest of what makes a search: its decisions hold for an equal one only."""
    search = suite.search.resolved() if suite.search else {}
    return digest([search, suite.seeds, sorted(suite.variants)], 20)


def mark(plan: Plan, store: Store) -> None:
    """Set the status `pruned` where the newest finished search of this plan left a stage out."""
    if plan.suite.search is None or not plan.suite.search.explores:
        return
    search = identity(plan.suite)
    pruned = [r["pruned"] for r in store.runs() if r.get("search") == search and "pruned" in r]
    for key, reason in pruned[-1].items() if pruned else ():
        stage = plan.stages.get(key)
        if stage is not None and stage.status == "pending":
            stage.status, stage.reason = "pruned", reason


def reopen(plan: Plan) -> None:
    """Set what a search left out back to `pending`: with more to do the search decides anew."""
    for stage in plan.with_status("pruned"):
        stage.status, stage.reason = "pending", None
