"""Ray: one instance for a run, its worker groups, and the mailbox between them and the driver.

A worker group is one `TorchTrainer.fit()`. Starting one costs ten seconds and more, so a group
takes stage after stage; each stage still leaves its own artifact, attempt and record. No handle of
Ray's and no exception of Ray's leaves this module, but for the mailbox that `bench.run.tune` uses.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import platform
import secrets
import socket
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
# actors of a group that nothing here asks; each costs a process and seconds of imports
os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's banner ignores verbose=0 otherwise

import ray  # not ray.train: this module starts Ray, and what trains is imported meanwhile
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bench import environment
from bench.errors import MachineError, UserError, suggestion
from bench.plan.stage import Stage
from bench.run import signals
from bench.run.mailbox import Alive, Event, GroupEnded, Mailbox
from bench.run.scheduler import WAIT_S
from bench.store.store import Store
from bench.suite.schema import DeviceSettings
from maect.datasets import DataError, prepare
from maect.settings import DataSettings

#: how long Ray may take to start, and how long the mailbox may leave a question unanswered
START_S, ANSWER_S = 120.0, 60.0
#: how long the worker groups may take to end once there is nothing more to do
JOIN_S = 60.0
#: seconds between two signs of life of a worker
BEAT_S = 3.0
#: seconds between two looks at whether Ray's own processes are there
LOOK_S = 2.0
#: seconds that a run which leaves waits until Ray knows what its groups asked for
ASKED_S = 30.0
#: how Ray names the resource of a type of GPU
TYPE = "accelerator_type:"
#: bytes that Ray adds to its folder in the names of its sockets, and that such a name may have
SOCKET, LONGEST = len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"), 103

#: has the thread that started Ray, which stays: with it the kernel would end Ray's processes
_starter: ThreadPoolExecutor | None = None


@dataclass(frozen=True)
class _Worker:
    """A worker of a group tells its handle, with which it can be killed."""

    group: int
    actor: Any


class Cluster:
    """A Ray instance for one run: this machine's own, or a running cluster that it joins.

    `workers` is the width of the groups that run the encoder, each worker with `threads` cores and,
    where the cluster has GPUs, one of those or the share of one that `devices` tell; without
    `devices` none holds any. 0 workers train without a worker process.
    """

    def __init__(
        self,
        address: str | None,
        workers: int,
        threads: int,
        waiting: Callable[[float], None],
        devices: DeviceSettings | None,
        wait_s: float | None = None,
    ) -> None:
        """Start Ray or join it; `waiting` is told now and then how many seconds that takes.

        `wait_s` is how long a run waits for devices that are not there yet. Raises `UserError`
        where no cluster answers or none has such devices, `MachineError` where Ray does not start,
        KeyboardInterrupt after a signal.
        """
        self.workers, self.threads, self._joined = workers, threads, bool(address)
        #: seconds that a run waits for a node with room for a group, and whether it also does so
        #: at its start
        self.wait_s, self._patient = wait_s or WAIT_S, wait_s is not None and bool(address)
        if devices is None and not address:  # nothing may take a GPU by itself
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        self.shared = _start(address, workers * threads, waiting)
        #: group -> the thread that waits for its end
        self._groups: dict[int, threading.Thread] = {}
        self._type = devices.accelerator_type if devices else None
        #: GPUs, or the share of one, that each worker is given
        self.gpus = self._share(devices) if devices else 0.0
        #: what each worker holds
        self.each = {"CPU": float(threads), **({"GPU": self.gpus} if self.gpus else {})}
        context = ray.get_runtime_context()
        here = NodeAffinitySchedulingStrategy(context.get_node_id(), soft=False)
        self.mailbox: Any = (
            ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()
        )
        node = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
        head, _, port = context.gcs_address.rpartition(":")
        #: where the parts of Ray listen without which nothing goes on
        self._parts = {
            "head process (GCS)": (head, int(port)),
            "node process (raylet)": (node["NodeManagerAddress"], int(node["NodeManagerPort"])),
        }
        #: when they were looked at, and for how many workers the nodes had devices then
        self._looked, self._found_room = 0.0, -1
        #: a question to the mailbox without an answer yet, and seconds that it is waited for
        self._asked: Any = None
        self._silent_s = 0.0
        #: group -> Ray's handles of its workers
        self._actors: dict[int, list[Any]] = {}

    def room(self) -> int:
        """Return for how many workers the nodes that are alive have devices."""
        self._look()
        return self._found_room if self.workers else 1

    def check_room(self) -> None:
        """Raise `UserError` if there is no room for a group, and the run is not to wait for it."""
        wanted, room = max(self.workers, 1), self.room()
        if room < wanted and not self._patient:
            each = f"{self.threads} core(s)" + (f" and {self.gpus:g} GPU" if self.gpus else "")
            nodes = self._nodes()
            has = {name: sum(node.get(name, 0) for node in nodes) for name in self.each}
            more = "wait for nodes with --wait" if self._joined else "join one with --address"
            raise UserError(
                f"{wanted} workers with {each} each are more than Ray has room for: {room}, with "
                f"{' and '.join(f'{count:.0f} {name}s' for name, count in has.items())}. Lower "
                f"--workers or {more}"
            )

    def lacking(self, data: list[tuple[DataSettings, Path, str | None]]) -> dict[str, str]:
        """Return what other nodes lack of these data: a node's name -> why.

        Each set comes with its root and its fingerprint. A node reads a folder of images once.
        """
        here = ray.get_runtime_context().get_node_id()
        asked = {}
        for node in _alive() if self._joined else ():
            if (number := node["NodeID"]) != here:
                there = NodeAffinitySchedulingStrategy(number, soft=False)
                ask = ray.remote(_lack).options(
                    num_cpus=0, max_retries=0, scheduling_strategy=there
                )
                asked[ask.remote(data)] = f"{node['NodeManagerHostname']} ({number[:6]})"
        found, left = {}, list(asked)
        while left:
            signals.check()
            answered, left = ray.wait(left, timeout=0.2)
            for answer in answered:
                with contextlib.suppress(ray.exceptions.RayError):  # a lost node is no news yet
                    found[asked[answer]] = ray.get(answer)
        return {name: why for name, why in found.items() if why}

    def _nodes(self) -> list[dict[str, float]]:
        """Return the resources of each node that is alive and that workers may run on."""
        if not self.gpus:
            return [node["Resources"] for node in _alive()]
        kind = "GPU" if self._type is None else TYPE + self._type
        return [node for node in _with_gpu() if kind in node]

    def devices(self, width: int) -> float:
        """Return the GPUs, or else the cores, that a group of so many workers holds."""
        if self.gpus:
            return width * self.gpus
        cores = width * self.threads
        return min(cores, environment.processor()["cores"]) if self.shared else cores

    def _room(self, node: dict[str, float]) -> int:
        """Return for how many workers a node has devices; no share of a GPU lies on two."""
        room = node.get("CPU", 0) // self.threads
        if self.gpus:
            room = min(room, int(node.get("GPU", 0)) * (10_000 // round(10_000 * self.gpus)))
        return int(room)

    def _share(self, devices: DeviceSettings) -> float:
        """Return how much of a GPU each worker is given. Raises `UserError`."""
        nodes = _with_gpu()
        if (kind := self._type) is not None:
            names = {name.partition(TYPE)[2] for node in nodes for name in node if TYPE in name}
            if kind not in names and not self._patient:
                there = suggestion(kind, names) or "; it has no GPU of any type"
                asked = f"devices.accelerator_type: Ray has no GPU of type '{kind}'"
                raise UserError(f"{asked}{there}. With --cpu the run needs none")
        elif not nodes:
            return 0.0
        share = devices.gpu_share
        if share < 1 and self.workers > 1:
            raise UserError(
                f"--workers {self.workers}: devices.gpu_share is {share:g}, and NCCL joins no two "
                "workers on one GPU; give --workers 1, or gpu_share 1"
            )
        return share if self.workers else 1.0

    # -------------------------------------------------------------------------------- worker groups

    def start_group(self, number: int, width: int, store: Store, run_id: str) -> None:
        """Start a worker group, in a thread of its own that waits for its end."""
        given = (number, width, store, run_id)
        self._groups[number] = threading.Thread(target=self._fit, args=given, daemon=True)
        self._groups[number].start()

    def _fit(self, number: int, width: int, store: Store, run_id: str) -> None:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
        from ray.train.v2.api.config import FailureConfig

        config = {"mailbox": self.mailbox, "group": number, "store": store, "run_id": run_id}
        config["gpus"] = self.gpus
        # times that Ray waits a minute more for devices; the driver gives a group up after as long
        again = math.ceil(max(self.wait_s, WAIT_S) / 60)
        limits: dict[str, Any] = {"max_failures": 0, "controller_failure_limit": again}
        limits["max_preemption_failures"] = 0
        known = FailureConfig.__dataclass_fields__  # of Ray 2.50 not all
        trainer = TorchTrainer(
            _serve,
            train_loop_config=config,
            torch_config=_torch_config(self.gpus, width),
            scaling_config=ScalingConfig(
                num_workers=width if self.workers else 0,
                use_gpu=bool(self.gpus),
                accelerator_type=self._type,
                resources_per_worker=self.each,
            ),
            run_config=RunConfig(
                name=f"{run_id}-{number}",
                storage_path=str(store.root / "ray"),
                # the driver starts a new group itself, so that every attempt is in the ledger
                failure_config=FailureConfig(**{k: v for k, v in limits.items() if k in known}),
            ),
        )
        problem, hopeless = None, False
        try:
            trainer.fit()
        except Exception as error:  # the group died; the driver decides what becomes of its stage
            problem = str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)
            _, ours, told = problem.partition(f"{MachineError.__name__}: ")
            problem, hopeless = told or problem, isinstance(error, MachineError) or bool(ours)
        self.mailbox.tell.remote(GroupEnded(number, problem, hopeless))

    def give(self, group: int, stage: Stage | None) -> None:
        """Give a stage to a group that waits; None ends the group."""
        self.mailbox.give.remote(group, stage)

    def settle(self, key: str, how: str) -> None:
        """Tell the trials of a search how a stage ended: "complete", or why not."""
        self.mailbox.settle.remote(key, how)

    def events(self, patience_s: float) -> list[Event] | None:
        """Return what happened since the last call; waits so long for anything but steps.

        None where the mailbox has not answered yet. Raises `MachineError` where it does not for
        long, or Ray is gone.
        """
        self._look()
        if self._asked is None:
            self._asked = self.mailbox.events.remote(patience_s)
        began = time.monotonic()
        found: list[Event] | None = None
        try:
            while found is None and time.monotonic() - began < patience_s + 1.0:
                signals.check()
                with contextlib.suppress(ray.exceptions.GetTimeoutError):
                    found = ray.get(self._asked, timeout=0.2)
        except ray.exceptions.RayError:
            raise MachineError("Ray's mailbox process has died (killed, or no memory?)") from None
        if found is None:
            self._silent_s += time.monotonic() - began
            if self._silent_s > ANSWER_S:
                told = f"Ray's mailbox has not answered for {ANSWER_S:.0f} s (stopped?)"
                raise MachineError(told)
            return None
        self._asked, self._silent_s = None, 0.0
        for event in found:
            if isinstance(event, GroupEnded):
                self._groups.pop(event.group, None)
            elif isinstance(event, _Worker):
                self._actors.setdefault(event.group, []).append(event.actor)
        return [event for event in found if not isinstance(event, _Worker)]

    def _look(self) -> None:
        """Raise `MachineError` where nobody listens any more at the address of a part of Ray.

        Else count the room: asked of a Ray that has died, its answer would be waited for a minute.
        """
        if time.monotonic() - self._looked < LOOK_S:
            return
        self._looked = time.monotonic()
        for name, place in self._parts.items():
            try:
                socket.create_connection(place, timeout=1.0).close()
            except ConnectionRefusedError:
                raise MachineError(f"Ray's {name} has died (killed, or no memory?)") from None
            except OSError:  # overloaded or cut off for a moment: who does not answer is told of
                continue
        if self._joined or self._found_room < 0:
            self._found_room = sum(map(self._room, self._nodes()))

    def end_group(self, number: int) -> None:
        """Kill the workers of a group that gives no sign of life, and wait for it no more."""
        self._groups.pop(number, None)
        for actor in self._actors.pop(number, []):
            ray.kill(actor)

    # -------------------------------------------------------------------------------- the end of it

    def close(self, *, finished: bool, search: threading.Thread | None = None) -> None:
        """Leave Ray, once no thread of ours waits for it.

        A thread that touches Ray after its shutdown takes the whole process down, with exit code 1.
        If a thread does not end in time, or the run is not `finished`, Ray is left as it is: a
        local instance dies with this process; its workers are ended at once.
        """
        if not finished:
            if self._joined and self.workers:
                self._wait_until_asked()
            signals.end_children()
            return
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(self.mailbox.close.remote(), timeout=JOIN_S)
        end = time.monotonic() + JOIN_S
        threads = [*self._groups.values(), *([search] if search is not None else [])]
        while any(thread.is_alive() for thread in threads):
            if signals.received or time.monotonic() > end:
                return
            time.sleep(0.05)
        ray.shutdown()

    def _wait_until_asked(self) -> None:
        """Wait until Ray knows the devices that each group asks for, to take the request back.

        Of a request that reaches Ray just after its run has left, nobody takes it back: it would
        hold the next free devices for ever.
        """
        job, end = ray.get_runtime_context().get_job_id(), time.monotonic() + ASKED_S
        with contextlib.suppress(ray.exceptions.RayError, MachineError):
            while time.monotonic() < end:
                self._look()
                table = ray.util.placement_group_table()
                ours = (told for name, told in table.items() if name.endswith(job))
                if sum(told["state"] != "REMOVED" for told in ours) >= len(self._groups):
                    return
                time.sleep(0.2)


def _torch_config(gpus: float, width: int) -> Any:
    """Return how the workers of a group are joined, each of which must be able to use its GPU."""
    from ray.train.torch.config import TorchConfig, _TorchBackend

    class Backend(_TorchBackend):
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            from bench.run.worker import require_gpu

            if gpus:
                worker_group.execute(require_gpu)
            super().on_start(worker_group, backend_config)

        def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
            """Tear nothing down: that may take half a minute, and the processes end now."""

    class Config(TorchConfig):
        backend_cls = Backend

    return Config(backend=None if width > 1 else "gloo")  # alone it sends nothing


def _alive() -> list[dict[str, Any]]:
    """Return what Ray tells of each node that is alive."""
    return [node for node in ray.nodes() if node["Alive"]]


def _with_gpu() -> list[dict[str, float]]:
    """Return the resources of each node that is alive and has a whole GPU."""
    return [node["Resources"] for node in _alive() if node["Resources"].get("GPU", 0) >= 1]


def _lack(data: list[tuple[DataSettings, Path, str | None]]) -> str:
    """Return what this node lacks of these data; nothing if it has all."""
    for settings, root, fingerprint in data:
        try:
            found = prepare(settings, root).fingerprint
        except DataError as error:
            return str(error)
        if found != fingerprint:
            return f"{settings.path or settings.name} holds other images than on the run's own node"
    return ""


def _serve(config: dict[str, Any]) -> None:
    """The train function of a group, on each of its workers."""
    from bench.run.worker import serve  # imports torch

    mailbox, group, store = config["mailbox"], config["group"], config["store"]
    context = ray.get_runtime_context()
    if context.get_actor_id():  # else it is the run's own process
        mailbox.tell.remote(_Worker(group, context.current_actor))
    ended = threading.Event()
    beats = threading.Thread(target=_beat, args=(mailbox, group, ended), daemon=True)
    beats.start()
    try:
        take = mailbox.take.remote
        given = (store, config["run_id"], config["gpus"])
        serve(lambda: ray.get(take(group)), mailbox.tell.remote, *given)
    finally:  # without a worker process this is the run's own: Ray may be left next
        ended.set()
        beats.join()


def _beat(mailbox: Any, group: int, ended: threading.Event) -> None:
    """Tell now and then that this worker of a group lives, until it has ended."""
    me = Alive(group, f"process {os.getpid()} on {platform.node()}")
    mailbox.tell.remote(me)
    while not ended.wait(BEAT_S):
        mailbox.tell.remote(me)


def _start(address: str | None, cores: int, waiting: Callable[[float], None]) -> bool:
    """Start Ray on this machine, or join a running cluster.

    `cores` is what a worker group wants. Where this machine has fewer, threads share them, two to
    a core at the most: they compute the same, only slower. Return whether it comes to that.
    """
    global _starter
    own = environment.processor()["cores"]
    shared = not address and own < cores <= 2 * own
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        _knock(address)
        # its workers have the variables of their node, not of this process; a job may name them too
        named = (*environment.AVX2, "MAECT_EVALS")
        ours = {name: os.environ[name] for name in named if name in os.environ}
        options["runtime_env"] = {"env_vars": ours}
        os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    else:
        options |= {
            "num_cpus": cores if shared else None,
            "include_dashboard": False,
            "object_store_memory": 256 * 2**20,
            "_temp_dir": _folder(),
        }
        signals.adopt_orphans()
    _guard_token(own=not address)
    for name, level in (("ray", logging.ERROR), ("ray.tune", logging.CRITICAL)):
        # a trial that ends with a failed stage is told of by the driver
        logging.getLogger(name).setLevel(level)
    # what Ray plans to do about GPUs in a later version
    warnings.filterwarnings("ignore", "Tip: In future versions of Ray", FutureWarning)
    # it would print what it hears of dead workers, in colour, among our own lines
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    # the parts of Ray Train import it; that takes as long as Ray takes to start
    threading.Thread(target=importlib.import_module, args=("torch",), daemon=True).start()
    # in a thread, while this one hears of signals and of the time
    began, _starter = time.monotonic(), ThreadPoolExecutor(1)
    starting = _starter.submit(_init, address or "local", **options)
    while not wait([starting], timeout=0.2).done and time.monotonic() - began < START_S:
        signals.check()
        waiting(time.monotonic() - began)
    if not starting.done():
        told = f"no answer within {START_S:.0f} s; is the machine overloaded?"
    elif problem := starting.exception():
        told = (str(problem).strip() or repr(problem)).splitlines()[0]
    else:
        return shared
    if not address:
        raise MachineError(f"Ray could not start on this machine: {told}")
    if not os.environ.get("RAY_AUTH_MODE"):
        told += ". If it asks for a token, set RAY_AUTH_MODE=token"
    raise UserError(f"no Ray cluster answers at {_named(address)}: {told}")


def _folder() -> str:
    """Return where Ray may keep its files and sockets: Ray itself would let everyone in.

    Raises `UserError` where no folder will do: the names of sockets have a limit.
    """
    for folder in (os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR"), "/tmp", "/dev/shm"):
        own = Path(folder or "/tmp", f"ray-{os.getuid()}").absolute()
        if len(os.fsencode(own)) + SOCKET > LONGEST:
            continue
        with contextlib.suppress(OSError):
            own.mkdir(0o700, exist_ok=True)
            if own.lstat().st_uid == os.getuid() and not own.is_symlink():
                own.chmod(0o700)
                return str(own / "ray")
    raise UserError(
        f"Ray needs a folder for its sockets that can be written, its name no longer than "
        f"{LONGEST - SOCKET - 9} bytes: set RAY_TMPDIR to one"
    )


def _init(address: str, **options: Any) -> None:
    """Start Ray or join it. Ray gives its own node 30 s; on a busy machine it gets them twice."""
    try:
        ray.init(address, **options)
    except Exception as error:
        if "timed out during startup" not in str(error):
            raise
        ray.init(address, **options)


def _guard_token(*, own: bool) -> None:
    """See to it that nobody else can read the token that Ray asks of whoever calls it."""
    if own:  # for this run only, in no file
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with contextlib.suppress(OSError, RuntimeError):  # no home, or no such file
        kept = Path.home() / ".ray" / "auth_token"
        if kept.stat().st_mode & 0o077:
            kept.chmod(0o600)


def _knock(address: str) -> None:
    """Raise `UserError` at once where nothing listens; Ray itself would try for minutes."""
    if "://" in address:  # Ray's client, its job server
        raise UserError(
            f"a run cannot join {_named(address)} from outside: start it on a node of the cluster, "
            "with --address auto or the HOST:6379 that `ray start --head` printed"
        )
    host, _, port = address.rpartition(":")
    if not host:  # auto, local: Ray knows where
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(
            f"no Ray cluster answers at {_named(address)} ({error}). On its first machine: "
            "ray start --head --port 6379"
        ) from None


def _named(address: str) -> str:
    """Return an address as messages show it: with where it comes from, if that may be forgotten."""
    forgotten = os.environ.get("RAY_ADDRESS") == address
    hint = " (RAY_ADDRESS names it; unset it for a Ray of this run's own)" if forgotten else ""
    return f"'{address}'{hint}"
