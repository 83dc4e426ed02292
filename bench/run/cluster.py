"""Ray: one instance for a run, its worker groups, and the mailbox between them and the driver.

A worker group is one `TorchTrainer.fit()`. Starting one costs ten seconds and more, so a group
takes stage after stage; each stage still leaves its own artifact, attempt and record. No handle of
Ray's and no exception of Ray's leaves this module, but for the mailbox that `bench.run.tune` uses.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import socket
import threading
import time
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
from bench.run.mailbox import Event, GroupEnded, Mailbox
from bench.run.task import Task
from bench.run.worker import serve
from bench.store.store import Store

#: how long the worker groups may take to end once there is nothing more to do
JOIN_S = 60.0

#: set when this process leaves Ray without shutting it down; see `Cluster.close`
abandoned = False


class Cluster:
    """A Ray instance for one run: this machine's own, or a running cluster that it joins.

    `workers` is the width of the groups that run the encoder, each worker with `threads` cores and,
    where the cluster has GPUs, one of those; 0 workers train without a worker process.
    """

    def __init__(self, address: str | None, workers: int, threads: int) -> None:
        """Start Ray or join it. Raises `UserError` if that fails or it has too few devices."""
        self.workers, self.threads = workers, threads
        self.shared = _start(address, workers * threads)
        #: group -> the thread that waits for its end
        self._groups: dict[int, threading.Thread] = {}
        total = ray.cluster_resources()
        self.gpu = total.get("GPU", 0) >= 1
        #: workers for whom there are devices
        self.capacity = self._capacity(total)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.mailbox: Any = (
            ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()
        )

    def _capacity(self, total: dict[str, float]) -> int:
        each = {"CPU": self.threads, **({"GPU": 1} if self.gpu else {})}
        for name, count in each.items():
            count *= max(self.workers, 1)
            if count > total.get(name, 0):
                what = "GPUs" if name == "GPU" else f"cores ({self.threads} thread(s) each)"
                raise UserError(
                    f"{self.workers} workers need {count} {what}; Ray has "
                    f"{int(total.get(name, 0))}. Lower --workers or join a larger cluster with "
                    f"--address"
                )
        if self.workers == 0:
            return 1
        return min(int(total[name] // count) for name, count in each.items())

    # -------------------------------------------------------------------------------- worker groups

    def start_group(self, number: int, width: int, store: Store, run_id: str) -> None:
        """Start a worker group, in a thread of its own that waits for its end."""
        thread = threading.Thread(
            target=self._fit, args=(number, width, store, run_id), daemon=True
        )
        self._groups[number] = thread
        thread.start()

    def _fit(self, number: int, width: int, store: Store, run_id: str) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        held = {"CPU": float(self.threads), **({"GPU": 1.0} if self.gpu else {})}
        trainer = TorchTrainer(
            _serve,
            train_loop_config={
                "mailbox": self.mailbox,
                "group": number,
                "store": store,
                "run_id": run_id,
            },
            scaling_config=ScalingConfig(
                num_workers=width if self.workers else 0,
                use_gpu=self.gpu,
                resources_per_worker=held,
            ),
            run_config=RunConfig(
                name=f"{run_id}-{number}",
                storage_path=str(store.root / "ray"),
                # the driver starts a new group itself, so that every attempt is in the ledger
                failure_config=FailureConfig(max_failures=0),
            ),
        )
        problem = None
        try:
            trainer.fit()
        except Exception as error:  # the group died; the driver decides what becomes of its stage
            problem = str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)
        self.mailbox.tell.remote(GroupEnded(number, problem))

    def give(self, group: int, task: Task | None) -> None:
        """Give a stage to a group that waits; None ends the group."""
        self.mailbox.give.remote(group, task)

    def settle(self, ended: dict[str, str]) -> None:
        """Tell the trials of a search how stages ended: key -> "complete", or why not."""
        self.mailbox.settle.remote(ended)

    def events(self, patience_s: float) -> list[Event]:
        """Return what happened since the last call; waits so long for anything but steps."""
        found: list[Event] = ray.get(self.mailbox.events.remote(patience_s))
        for event in found:
            if isinstance(event, GroupEnded):
                del self._groups[event.group]
        return found

    # -------------------------------------------------------------------------------- the end of it

    def close(self, *, finished: bool, search: threading.Thread | None = None) -> None:
        """Leave Ray, once no thread of ours waits for it.

        A thread that touches Ray after its shutdown takes the whole process down, with exit code 1.
        If a thread does not end in time, or the run is not `finished`, Ray is left as it is: a
        local instance dies with this process.
        """
        global abandoned
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(self.mailbox.close.remote())
        end = time.monotonic() + (JOIN_S if finished else 0.0)
        threads = [*self._groups.values(), *([search] if search is not None else [])]
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


def _serve(config: dict[str, Any]) -> None:
    """The train function of a group, on each of its workers."""
    mailbox, group = config["mailbox"], config["group"]

    def take() -> Task | None:
        task: Task | None = ray.get(mailbox.take.remote(group))
        return task

    serve(take, mailbox.tell.remote, config["store"], config["run_id"])


def _start(address: str | None, cores: int) -> bool:
    """Start Ray on this machine, or join a running cluster. Raises `UserError` if none answers.

    `cores` is what a worker group wants. Where this machine has fewer, threads share them, two to
    a core at the most: they compute the same, only slower. Return whether it comes to that.
    """
    own = environment.processor()["cores"]
    shared = not address and own < cores <= 2 * own
    if address:
        _knock(address)
    # the parts of Ray Train import it; that takes as long as Ray takes to start
    threading.Thread(target=importlib.import_module, args=("torch",), daemon=True).start()
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not address:
        options |= {
            "num_cpus": cores if shared else None,
            "include_dashboard": False,
            "object_store_memory": 256 * 2**20,
        }
    try:
        # "local": without it Ray would join what another user's `ray start` left noted in /tmp
        ray.init(address or "local", **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        if not address:
            raise
        token = (
            ""
            if os.environ.get("RAY_AUTH_MODE")
            else ". If it asks for a token, set RAY_AUTH_MODE=token"
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
