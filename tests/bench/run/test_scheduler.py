"""What a run does next: state in, actions out. No Ray, no store."""

from __future__ import annotations

from typing import Any

import pytest

from bench.plan.stage import Stage
from bench.run.scheduler import (
    IDLE_S,
    MAX_LOST,
    PATIENCE_S,
    Action,
    EndGroup,
    Give,
    GiveUp,
    Group,
    LoseGroup,
    RunState,
    Say,
    StartGroup,
    decide,
)
from bench.store.record import Code
from maect.datasets import DataInfo

DATA = DataInfo("digits", (1, 8, 8), 10, {"train": 8}, "fingerprint", "here", (0.5,), (0.5,))
#: stage -> its inputs and its FLOPs
GRAPH: dict[str, tuple[list[str], float]] = {
    "mae": ([], 40.0),
    "long mae": ([], 90.0),
    "head": (["mae"], 20.0),
    "tune": (["mae", "head"], 40.0),
    "features": (["tune"], 1.0),
    "knn": (["features"], 0.0),
    "probe": (["features"], 2.0),
}


def make_stages(graph: dict[str, tuple[list[str], float]] = GRAPH) -> dict[str, Stage]:
    """Stages whose keys are their names."""
    stages: dict[str, Stage] = {}
    for name, (inputs, flops) in graph.items():
        stages[name] = Stage(
            kind=name.split()[-1],
            key=name,
            title=name,
            settings={},
            inputs={source: stages[source] for source in inputs},
            data=DATA,
            places={},
            code=Code(hash="code", modules={}),
            flops=flops,
        )
    return stages


def make(*done: str, groups: dict[int, Group] | None = None, **options: Any) -> RunState:
    """A run of the graph; the stages `done` were in the store."""
    stages = make_stages()
    for name in done:
        stages[name].status = "cached"
    return RunState(stages, groups=groups or {}, **options)


def waiting(width: int = 1, since: float = 0.0) -> Group:
    return Group(width, "waiting", since=since)


def ready(state: RunState) -> list[str]:
    return [stage.title for stage in state.ready()]


# -------------------------------------------------------------------------- what is ready, in order


def test_what_most_work_builds_on_comes_first():
    # 40 + 20 + 40 + 1 + 2 FLOPs are `mae` and what builds on it, more than the 90 of `long mae`
    state = make()
    assert ready(state) == ["mae", "long mae"]
    state.complete("mae")
    assert ready(state) == ["long mae", "head"]


def test_of_rows_of_equal_flops_the_one_that_branches_begins_first():
    """Else its second branch has to wait, and the whole table of a seed with it."""
    graph: dict[str, tuple[list[str], float]] = {
        "other mae": ([], 80), "mae": ([], 40), "tune": (["mae"], 40), "aug tune": (["mae"], 40)
    }  # fmt: skip
    assert ready(RunState(make_stages(graph))) == ["mae", "other mae"]


def test_a_stage_waits_for_all_its_inputs_and_evaluations_come_before_training():
    state = make("mae")
    assert ready(state) == ["long mae", "head"]
    for name in ("head", "tune", "features"):
        state.complete(name)
    assert ready(state) == ["probe", "knn", "long mae"]


def test_training_goes_seed_by_seed():
    state = make()
    state.stages["mae"].settings["seed"] = 1
    assert ready(state) == ["long mae", "mae"]


def test_what_another_run_works_on_is_left_to_it():
    state = make(groups={1: waiting()}, elsewhere={"mae", "long mae"})
    assert ready(state) == []
    assert decide(state, 0.0) == []
    state.elsewhere.clear()
    assert decide(state, 0.0)[0] == Give(1, "mae")


def test_what_a_group_works_on_is_not_ready():
    state = make(groups={1: Group(1), 2: Group(1)})
    state.begin(1, "mae")
    assert ready(state) == ["long mae"]
    assert state.begun == {"mae"}


def test_a_failure_takes_its_descendants_only():
    state = make("mae", groups={1: Group(1)})
    state.begin(1, "head")
    assert state.fail("head", "NaN") == ["head", "tune", "features", "knn", "probe"]
    assert state.failed["head"] == "NaN"
    assert state.failed["tune"] == "its input failed: head"
    assert ready(state) == ["long mae"]
    assert not state.finished
    assert state.fail("head", "told again") == []
    state.complete("long mae")
    assert state.finished


def test_a_failed_evaluation_leaves_its_sisters_alone():
    state = make("mae", "long mae", "head", "tune", "features")
    assert state.fail("probe", "NaN") == ["probe"]
    assert ready(state) == ["knn"]


# -------------------------------------------------------------------------------------- one worker


def test_groups_are_started_for_long_stages_as_far_as_devices_go():
    assert decide(make(capacity=1), 0.0) == [StartGroup(1)]
    assert decide(make(capacity=8), 0.0) == [StartGroup(1), StartGroup(1)]
    # those that start already are counted
    assert decide(make(capacity=8, groups={1: Group(1)}), 0.0) == [StartGroup(1)]
    assert decide(make(capacity=8, groups={1: Group(1), 2: Group(1)}), 0.0) == []


def test_short_evaluations_share_a_group():
    graph = {"features": ([], 0.0)} | {f"{i} knn": (["features"], 0.0) for i in range(9)}
    stages = make_stages(graph)
    stages["features"].status = "cached"
    assert decide(RunState(stages, capacity=8), 0.0) == [StartGroup(1), StartGroup(1)]


def test_a_group_that_waits_gets_the_most_pressing_stage():
    state = make(capacity=2, groups={1: waiting(), 2: Group(1)})
    assert decide(state, 0.0) == [Give(1, "mae")]
    state.begin(1, "mae")
    state.wait(2, 1.0)
    assert decide(state, 1.0) == [Give(2, "long mae")]


def test_a_group_that_ended_its_stage_gets_the_next_one_when_it_asks():
    state = make(groups={1: waiting()})
    state.begin(1, "mae")
    state.complete("mae")
    assert state.running == set()
    assert not any(isinstance(action, Give) for action in decide(state, 0.0))
    state.wait(1, 1.0)
    assert Give(1, "long mae") in decide(state, 1.0)


def test_groups_end_when_nothing_is_left_for_them_and_when_they_waited_long():
    state = make("mae", "head", "tune", "features", groups={1: waiting(), 2: waiting()})
    for key in ("knn", "probe"):
        state.complete(key)
    state.begin(1, "long mae")
    assert decide(state, 0.0) == [EndGroup(2)]
    state = make(capacity=2, groups={1: waiting(), 2: waiting(since=5.0)})
    state.complete("long mae")
    state.begin(1, "mae")
    assert decide(state, IDLE_S) == []
    assert decide(state, IDLE_S + 6.0) == [EndGroup(2)]


def test_a_group_that_is_ending_gets_nothing():
    state = make(groups={1: Group(1, "ending")})
    state.wait(1, 0.0)
    assert decide(state, 0.0) == []


def test_a_run_of_every_stage():
    """Executed without Ray: every action changes the state as the driver would."""
    state, order, now = make(capacity=2), [], 0.0
    for _ in range(100):
        actions = decide(state, now)
        now += 1.0
        for action in actions:
            match action:
                case StartGroup(width):
                    state.groups[len(state.groups) + 1] = waiting(width)
                case Give(group, key):
                    state.begin(group, key)
                    order.append(key)
                case EndGroup(group):
                    del state.groups[group]
        if state.finished:
            assert order == ["mae", "long mae", "head", "tune", "features", "probe", "knn"]
            return
        for group in [g for g in state.groups.values() if g.phase == "working"][:1]:
            state.complete(str(group.stage))
            group.phase, group.since = "waiting", now
    pytest.fail("the run did not end")


# ------------------------------------------------------------------------------------ lost workers


def lose(state: RunState, key: str) -> None:
    state.groups[9] = waiting()
    state.begin(9, key)
    assert state.lose(9, "killed") == key


def test_a_lost_worker_is_replaced_but_not_for_ever():
    state = make()
    for _ in range(MAX_LOST):
        lose(state, "mae")
        assert ready(state) == ["mae", "long mae"]
        assert not any(isinstance(action, GiveUp) for action in decide(state, 0.0))
    lose(state, "mae")
    assert decide(state, 0.0) == [GiveUp("mae", "its worker died 4 times: killed")]
    state.fail("mae", "its worker died 4 times: killed")
    assert decide(state, 0.0) == [StartGroup(1)]


def test_a_loss_counts_for_its_own_stage():
    state = make()
    for _ in range(MAX_LOST):
        lose(state, "mae")
        lose(state, "long mae")
    assert not any(isinstance(action, GiveUp) for action in decide(state, 0.0))


def test_a_group_that_ended_idle_loses_nothing_and_may_still_be_heard():
    state = make(groups={1: waiting()})
    assert state.lose(1, "the worker group ended") is None
    state.wait(1, 0.0)  # it asked before it ended
    assert decide(state, 0.0) == [StartGroup(1)]


def test_groups_that_never_start_are_not_started_for_ever():
    state = make()
    for number in range(MAX_LOST + 1):
        assert decide(state, 0.0) == [StartGroup(1)]
        state.groups[number] = Group(1)
        state.lose(number, "no device left")
    found = decide(state, 0.0)
    assert {action.key for action in found if isinstance(action, GiveUp)} == set(GRAPH)
    assert found[0] == GiveUp("mae", "no worker group can be started: no device left")
    state.groups[9] = Group(1)
    state.wait(9, 0.0)  # one did start after all
    assert decide(state, 0.0) == [Give(9, "mae")]


# -------------------------------------------------------------------------- groups that are silent


def busy(width: int, **heard: float) -> RunState:
    """A run with a group at work whose workers were last heard at these times."""
    group = Group(width, "working", "mae", since=99.0, heard=heard)
    return make(groups={1: group}, width=width, capacity=width)


def silent(worker: str, seconds: int) -> Say:
    return Say(f"  {worker} gives no sign of life (mae, {seconds} s; given up after 60 s)")


@pytest.mark.parametrize(
    ("state", "now", "expected"),
    [
        (busy(1, a=100.0), 115.0, []),
        (busy(1, a=100.0), 116.0, [silent("a", 16)]),
        (busy(2, a=115.0, b=100.0), 116.0, [silent("b", 16)]),
        (busy(2, a=115.0), 116.0, [silent("a worker that has yet to speak", 17)]),
        (busy(1, a=100.0), 161.0, [LoseGroup(1, "no sign of life for 60 s")]),
        (busy(2, a=160.0, b=100.0), 161.0, [LoseGroup(1, "no sign of life for 60 s")]),
    ],
    ids=["well", "silent", "one of two", "never heard", "too long", "one of two too long"],
)
def test_a_worker_without_a_sign_of_life_is_told_of_and_given_up(
    state: RunState, now: float, expected: list[Action]
):
    assert [a for a in decide(state, now) if isinstance(a, Say | LoseGroup)] == expected


def test_a_silent_group_is_told_of_now_and_then():
    state = busy(1, a=100.0)
    assert decide(state, 120.0) == [silent("a", 20)]
    state.told = 120.0
    assert decide(state, 130.0) == []
    assert decide(state, 136.0) == [silent("a", 36)]
    state.hear(1, "a", 137.0)
    assert decide(state, 150.0) == []


def test_the_stage_of_a_group_given_up_is_tried_again_and_its_late_word_is_not_heard():
    state = busy(1, a=0.0)
    assert state.lose(1, "no sign of life") == "mae"
    assert decide(state, 61.0) == [StartGroup(1)]
    state.hear(1, "a", 62.0)
    state.wait(1, 62.0)
    assert state.lose(1, "it ended after all") is None
    assert len(state.lost["mae"]) == 1


def test_a_group_that_does_not_start_is_waited_for_with_words_and_not_for_ever():
    told, limit = PATIENCE_S["starting"]
    state = make(groups={1: Group(1, since=10.0), 2: Group(1, since=10.0)}, capacity=2)
    assert decide(state, 10.0 + told) == []
    assert decide(state, 11.0 + told) == [
        Say("  a group of 1 worker(s) has yet to start; are cores or GPUs free? (starting, "
            "31 s; given up after 300 s)")
    ]  # fmt: skip
    given_up = decide(state, 11.0 + limit)
    assert {action.key for action in given_up if isinstance(action, GiveUp)} == set(GRAPH)
    assert given_up[0] == GiveUp("mae", "no worker group could start within 300 s")
    state.begin(2, "mae")  # another one works: its stage is not given up
    assert decide(state, 11.0 + limit)[0] == LoseGroup(1, "no sign of life for 300 s")


def test_where_no_node_has_room_that_is_said_at_once_and_waited_for_as_long_as_asked():
    state = make(groups={1: Group(2, since=10.0)}, width=2, capacity=2)
    state.room, state.wait_s = 1, 60.0
    assert decide(state, 20.0) == []
    assert decide(state, 21.0) == [
        Say("  a group of 2 worker(s) waits for a node: Ray has room for 1 in all (starting, "
            "11 s; given up after 60 s)")
    ]  # fmt: skip
    assert decide(state, 71.0)[0] == GiveUp("mae", "no worker group could start within 60 s")


# ------------------------------------------------------------------- groups of several and of one


def two_wide(*done: str, **options: Any) -> RunState:
    return make(*done, width=2, **options)


def starts(actions: list[Action]) -> list[int]:
    return [action.width for action in actions if isinstance(action, StartGroup)]


def test_what_runs_the_encoder_goes_to_all_workers_and_the_rest_to_one():
    evaluations = ("mae", "head", "tune", "features")
    assert starts(decide(two_wide(capacity=2), 0.0)) == [2]
    assert starts(decide(two_wide(*evaluations, "long mae", capacity=2), 0.0)) == [1, 1]
    # side by side where devices are free
    assert starts(decide(two_wide(*evaluations, capacity=3), 0.0)) == [2, 1]
    state = two_wide(*evaluations, capacity=3, groups={1: waiting(2), 2: waiting(1)})
    assert decide(state, 0.0) == [Give(1, "long mae"), Give(2, "probe")] or decide(state, 0.0) == [
        Give(2, "probe"),
        Give(1, "long mae"),
    ]


def test_a_wide_group_without_work_makes_way_for_evaluations():
    evaluations = ("mae", "head", "tune", "features", "long mae")
    state = two_wide(*evaluations, capacity=2, groups={1: waiting(2)})
    assert decide(state, 0.0) == [EndGroup(1)]
    state.groups[1].phase = "ending"
    assert decide(state, 0.0) == []  # its devices are not free yet
    del state.groups[1]
    assert starts(decide(state, 0.0)) == [1, 1]


def test_groups_of_one_make_way_for_a_wide_one_when_they_have_nothing_to_do():
    state = two_wide(capacity=2, groups={1: waiting(1), 2: Group(1, "working", "knn")})
    assert decide(state, 0.0) == [EndGroup(1)]


# ---------------------------------------------------------------------------------------- a search


def test_stages_of_a_search_wait_until_a_trial_asks():
    held = {"head", "tune", "features", "knn", "probe"}
    state = make(held=held, capacity=2)
    assert starts(decide(state, 0.0)) == [1, 1]
    state.complete("mae")
    state.complete("long mae")
    assert decide(state, 0.0) == []
    state.held -= {"head"}
    assert decide(state, 0.0) == [StartGroup(1)]


def test_what_a_search_left_out_is_not_waited_for():
    state = make("mae", "long mae", "head", "tune", "features")
    state.pruned |= {"knn": "not tried", "probe": "not tried"}
    assert state.finished
