"""Ray: one instance for a run, worker groups that train, tasks that evaluate.

A worker group is one `TorchTrainer.fit()`. Starting one costs ten seconds and more, so a group
takes stage after stage from the board until none is ready for it; each stage still leaves its own
artifact, attempt and record. Groups run side by side where the machine allows. A group of one
worker evaluates as well; beside larger ones, evaluations are tasks of their own.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
# actors of a group that nothing here asks; each costs a process and seconds of imports
os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's banner ignores verbose=0 otherwise

import psutil
import ray  # not ray.train: this module starts Ray, and what trains is imported meanwhile
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bench import environment
from bench.errors import UserError
from bench.run.mailbox import Board
from bench.run.parts import Part, run_part
from bench.run.worker import StageFailed, Task, check_code, from_first, run_task
from bench.store.store import Store

#: how long an idle group waits for the driver to offer it another stage; longer where no
#: evaluation waits for what it holds
PATIENCE_S, LONG_PATIENCE_S = 3.0, 60.0
#: a group that is older makes way for waiting evaluations
RETIRE_S = 600.0


@dataclass(frozen=True)
class Layout:
    """How a run uses the machine."""

    workers: int
    threads: int
    gpu: bool
    #: worker groups side by side
    slots: int

    @property
    def groups_evaluate(self) -> bool:
        """Of several workers all but the first would idle meanwhile."""
        return self.workers <= 1

    def scaling(self) -> Any:
        """Ray Train's `ScalingConfig` of one worker group."""
        from ray.train import ScalingConfig

        held = {"CPU": float(self.threads), **({"GPU": 1.0} if self.gpu else {})}
        return ScalingConfig(num_workers=self.workers, use_gpu=self.gpu, resources_per_worker=held)

    def evaluation(self) -> dict[str, int]:
        """Resources of one evaluation task."""
        return {"num_cpus": self.threads, "num_gpus": int(self.gpu)}


def start(address: str | None, cores: int) -> bool:
    """Start Ray on this machine, or join a running cluster. Raises `UserError` if none answers.

    `cores` is what a worker group wants. Where this machine has fewer, threads share them, two to
    a core at the most: they compute the same, only slower. Does it come to that?
    """
    own = environment.processor()["cores"]
    shared = not address and own < cores <= 2 * own
    if address:
        _knock(address)
    # the parts of Ray Train import it; that takes as long as Ray takes to start
    threading.Thread(target=importlib.import_module, args=("torch",), daemon=True).start()
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            # "local": without it Ray would join what another user's `ray start` left noted in /tmp
            ray.init(
                "local", num_cpus=cores if shared else None, include_dashboard=False,
                object_store_memory=256 * 2**20, **quiet,
            )  # fmt: skip
    except (ConnectionError, ValueError, RuntimeError) as error:
        if not address:
            raise
        token = (
            ""
            if os.environ.get("RAY_AUTH_MODE")
            else (". If it asks for a token, set RAY_AUTH_MODE=token")
        )
        raise UserError(f"no Ray cluster answers at '{address}': {error}{token}") from None
    logging.getLogger("ray").setLevel(logging.ERROR)
    # a trial that ends with a failed stage is told of by the driver
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    return shared


def _knock(address: str) -> None:
    """Raise `UserError` at once where nothing listens; Ray itself would try for minutes."""
    if address.startswith("ray://"):
        raise UserError(
            f"a run cannot join '{address}' from outside: start it on a node of the cluster, with "
            "--address auto"
        )
    host, _, port = address.rpartition(":")
    if not host:  # auto, local: Ray knows where
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise UserError(
            f"no Ray cluster answers at '{address}' ({error}). On its first machine: "
            "ray start --head --port 6379"
        ) from None


#: set when this process leaves Ray without shutting it down; see `stop`
abandoned = False


def stop(threads: list[threading.Thread], patience_s: float) -> None:
    """Shut Ray down once no thread of ours waits for it.

    A thread that touches Ray after its shutdown takes the whole process down, with exit code 1. If
    some do not end in time, Ray is left as it is: a local instance dies with this process.
    """
    global abandoned
    end = time.monotonic() + patience_s
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    if any(thread.is_alive() for thread in threads):
        abandoned = True
    elif ray.is_initialized():
        ray.shutdown()


def end_local_processes() -> None:
    """Kill what is left of a local instance; its agents would live on for a minute and more."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            process.kill()


def lay_out(workers: int, threads: int) -> Layout:
    """Worker groups that fit the cluster. Raises `UserError` if not even one does."""
    total = ray.cluster_resources()
    gpu, held = total.get("GPU", 0) >= 1, max(workers, 1)
    need = {"CPU": held * threads, **({"GPU": held} if gpu else {})}
    for name, count in need.items():
        if count > total.get(name, 0):
            what = "GPUs" if name == "GPU" else f"cores ({threads} thread(s) each)"
            raise UserError(
                f"{workers} workers need {count} {what}; Ray has {int(total.get(name, 0))}. Lower "
                f"--workers or join a larger cluster with --address"
            )
    fitting = min(int(total[name] // count) for name, count in need.items())
    return Layout(workers, threads, gpu, 1 if workers == 0 else fitting)


def board() -> Any:
    """A board as an actor, on the driver's own node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Board).options(num_cpus=0, scheduling_strategy=here).remote()


def reporter(board: Any) -> Callable[[str, dict[str, Any]], None]:
    """How a stage tells the driver about itself."""

    def report(key: str, event: dict[str, Any]) -> None:
        board.report.remote(key, event)

    return report


def serve(config: dict[str, Any]) -> None:
    """The train function of a group: take stages from the board until none is left."""
    from ray.train import get_context

    board, group = config["board"], config["group"]
    first = get_context().get_world_rank() == 0
    while True:
        task = from_first(
            ray.get(board.take.remote(group, config["patience_s"])) if first else None
        )
        if task is None:
            return
        try:
            run_task(task, config["root"], config["run_id"], reporter(board))
        except StageFailed:
            # of several workers, the others may hang in a collective call
            if get_context().get_world_size() > 1:
                raise
            if _holds_a_gpu():  # what failed there may have left a context in which all fails
                return


def _holds_a_gpu() -> bool:
    import torch

    return torch.cuda.is_initialized()


@ray.remote(max_retries=3)  # leaves nothing behind, so it may run again
def share(task: Task, root: Any, part: int, parts: int) -> Part:
    """A part of an evaluation, on a core."""
    check_code(task)
    return run_part(task, Store(root), "cpu", part, parts)


@ray.remote(max_retries=0)
def evaluate(task: Task, root: Any, run_id: str, board: Any, layout: Layout) -> None:
    """One evaluation or features stage; its other parts, where it has some, as tasks beside it."""

    def spread(task: Task, parts: int) -> Callable[[], list[Part]]:
        # no GPU: one held while another is waited for could block a second evaluation for ever;
        # cores are lent out meanwhile
        start = share.options(num_cpus=layout.threads).remote
        references = [start(task, root, part, parts) for part in range(1, parts)]
        return lambda: ray.get(references)

    try:
        run_task(task, root, run_id, reporter(board), max(1, layout.workers), spread)
    except StageFailed:
        pass  # its record says why


class Groups:
    """Starts worker groups and tells which stage a group held when it died."""

    def __init__(self, layout: Layout, store: Store, run_id: str, board: Any) -> None:
        self.layout, self.store, self.run_id, self.board = layout, store, run_id, board
        #: group -> when it was started, and its thread
        self.alive: dict[int, tuple[float, threading.Thread]] = {}
        self.ended: list[tuple[int, str | None]] = []
        #: groups that ended; what such a one asked for before may still be given to it
        self.gone: set[int] = set()
        self._count = 0

    def start(self) -> None:
        """Start one more group, in a thread of its own."""
        self._count += 1
        thread = threading.Thread(target=self._fit, args=(self._count,), daemon=True)
        self.alive[self._count] = time.monotonic(), thread
        thread.start()

    def _fit(self, group: int) -> None:
        from ray.train import FailureConfig, RunConfig
        from ray.train.torch import TorchTrainer

        trainer = TorchTrainer(
            serve,
            train_loop_config={
                "board": self.board,
                "group": group,
                "root": self.store.root,
                "run_id": self.run_id,
                "patience_s": LONG_PATIENCE_S if self.layout.groups_evaluate else PATIENCE_S,
            },
            scaling_config=self.layout.scaling(),
            run_config=RunConfig(
                name=f"{self.run_id}-{group}",
                storage_path=str(self.store.root / "ray"),
                # the driver starts a new group itself, so that every attempt is in the ledger
                failure_config=FailureConfig(max_failures=0),
            ),
        )
        problem = None
        try:
            trainer.fit()
        except Exception as error:  # the group died; the driver decides what becomes of its stage
            problem = str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)
        self.ended.append((group, problem))

    def old(self) -> set[int]:
        """Groups that should make way for others."""
        now = time.monotonic()
        return {group for group, (began, _) in self.alive.items() if now - began > RETIRE_S}

    def reap(self) -> list[tuple[int, str | None]]:
        """Groups that ended since the last call, with what went wrong."""
        ended, self.ended = self.ended, []
        for group, _ in ended:
            del self.alive[group]
            self.gone.add(group)
        return ended
