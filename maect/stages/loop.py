"""The loop that all training stages share: order of the samples, schedule, log, checks."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from maect.datasets import Split
from maect.optim import EncoderEMA, learning_rate, set_learning_rate
from maect.settings import ScheduleSettings
from maect.stages.job import Job, Output, Progress, State, TrainingError
from maect.streams import Stream

#: every step of the beginning is logged, then about this many points over the rest
FIRST_LOGGED = 20
LOGGED_POINTS = 500
PROGRESS_S = 0.5
REMEDY = "lower lr, lengthen the warm-up or set clip_grad"

Values = dict[str, Tensor | float]


def is_logged(step: int, steps: int) -> bool:
    """Whether the curves of a stage of `steps` steps hold this one."""
    return step < FIRST_LOGGED or step % max(1, steps // LOGGED_POINTS) == 0 or step == steps - 1


class Batches:
    """The global batches of a stage: each epoch in an order of its own, its remainder dropped."""

    def __init__(self, images: int, batch_size: int, seed: int, role: str) -> None:
        if batch_size > images:
            raise TrainingError(f"a batch of {batch_size} is larger than the {images} images")
        self.images, self.batch_size = images, batch_size
        self.per_epoch = images // batch_size
        self.stream = Stream(seed, role, "order")
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def at(self, step: int) -> tuple[int, np.ndarray]:
        """Epoch and sample indices [B] of a step."""
        epoch, position = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self.stream.permutation(epoch, self.images)
        start = position * self.batch_size
        return epoch, self._order[start : start + self.batch_size]


class Training(ABC):
    """A training stage, ready to take its steps.

    Its settings are resolved: told in steps and peak rates. A step is a function of its number
    alone, given the state that the steps before it left.
    """

    role: str
    settings: ScheduleSettings

    def __init__(self, job: Job, train: Split) -> None:
        self.job, self.train = job, train
        self.group = job.prepare()
        self.pieces = self.group.pieces(self.settings.batch_size)
        self.batches = Batches(len(train), self.settings.batch_size, job.seed, self.role)
        #: optimizers with their peak rates
        self.optimizers: list[tuple[torch.optim.Optimizer, float]] = []
        self.average: EncoderEMA | None = None

    @abstractmethod
    def gradients(self, epoch: int, indices: np.ndarray) -> Values:
        """Leave the gradient of the global batch in the parameters; what to log, the loss in it."""

    def watch(self) -> Values:
        """What more to log of the step whose gradients were last computed; changes nothing."""
        return {}

    @abstractmethod
    def after_step(self) -> None:
        """Update what follows the weights: moving averages."""

    @abstractmethod
    def output(self) -> Output:
        """What the stage leaves when its steps are taken."""

    def modules(self) -> dict[str, nn.Module]:
        """Everything with weights or buffers that steps change, by name."""
        found = {name: m for name, m in vars(self).items() if isinstance(m, nn.Module)}
        return {name: m for name, m in found.items() if name != "forward"}

    def state(self) -> dict[str, Tensor]:
        """Weights, buffers, averages and the optimizers' moments, copied to the CPU."""
        tensors = {}
        for name, module in self.modules().items():
            for key, tensor in module.state_dict().items():
                tensors[f"{name}/{key}"] = tensor
        for index, (optimizer, _) in enumerate(self.optimizers):
            for parameter, values in optimizer.state_dict()["state"].items():
                for key, tensor in values.items():
                    tensors[f"optimizer{index}/{parameter}/{key}"] = tensor
        return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go back to a `state`."""
        for name, module in self.modules().items():
            start = f"{name}/"
            module.load_state_dict(
                {key[len(start) :]: t for key, t in tensors.items() if key.startswith(start)}
            )
        for index, (optimizer, _) in enumerate(self.optimizers):
            moments: dict[int, dict[str, Tensor]] = {}
            for key, tensor in tensors.items():
                owner, _, rest = key.partition("/")
                if owner == f"optimizer{index}":
                    parameter, _, value = rest.partition("/")
                    moments.setdefault(int(parameter), {})[value] = tensor
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": moments, "param_groups": groups})

    def step(self, number: int) -> Values:
        """Take one step."""
        schedule = self.settings
        assert schedule.steps is not None
        assert schedule.warmup_steps is not None
        epoch, indices = self.batches.at(number)
        values = self.gradients(epoch, indices)
        if is_logged(number, schedule.steps):
            values |= self.watch()
        rates = []
        for optimizer, peak in self.optimizers:
            rates.append(learning_rate(number, schedule.steps, schedule.warmup_steps, peak))
            set_learning_rate(optimizer, rates[-1])
            if schedule.clip_grad is not None:
                nn.utils.clip_grad_norm_(_parameters(optimizer), schedule.clip_grad)
            optimizer.step()
        self.after_step()
        return {**values, "lr": rates[0]}


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


class Log:
    """Curves of a stage. Values stay on the device until they are read."""

    def __init__(self, steps: int, device: torch.device) -> None:
        self.steps = steps
        # reading a value makes a GPU wait for it; a CPU loses nothing
        self.patience = 1 if device.type == "cpu" else 20
        self.loss = math.nan
        self.curves: dict[str, list[float]] = {}
        self._held: list[tuple[int, Values]] = []

    def add(self, step: int, values: Values) -> None:
        self._held.append((step, values))
        if len(self._held) >= self.patience or step == self.steps - 1:
            self.flush()

    def flush(self) -> None:
        for step, values in self._held:
            numbers = {name: float(value) for name, value in values.items()}
            self.loss = numbers["loss"]
            if not math.isfinite(self.loss):
                raise TrainingError(
                    f"the loss is {self.loss} at step {step} of {self.steps}; {REMEDY}"
                )
            if is_logged(step, self.steps):
                for name, number in {"step": float(step), **numbers}.items():
                    self.curves.setdefault(name, []).append(number)
        self._held.clear()

    def copy(self) -> dict[str, list[float]]:
        return {name: list(values) for name, values in self.curves.items()}


def train(training: Training) -> Output:
    """Take all steps of a stage, from its newest checkpoint where it has one."""
    job, steps = training.job, training.settings.steps
    assert steps is not None
    log = Log(steps, job.device)
    began = _resume(training, log)
    training.train.expect(_own_batches(training, began))
    first = training.group.rank == 0
    last, last_step = time.monotonic(), began
    for number in range(began, steps):
        log.add(number, training.step(number))
        if not first:
            continue
        now, done = time.monotonic(), number + 1
        if now - last >= PROGRESS_S or done == steps:
            images = (done - last_step) * training.settings.batch_size
            epoch = number // training.batches.per_epoch
            job.on_progress(Progress(done, steps, epoch, log.loss, images / max(now - last, 1e-9)))
            last, last_step = now, done
        if job.checkpoints is not None and done < steps and job.checkpoints.due():
            log.flush()  # a loss that is not finite ends the stage before it is kept
            state = training.state()
            _require_finite(state, done, steps)
            job.checkpoints.save(State(done, state, log.copy()))
    output = training.output()
    for tensors in output.tensors.values():
        _require_finite(tensors, steps, steps)
    output.curves = log.curves
    trained = sum(p.numel() for optimizer, _ in training.optimizers for p in _parameters(optimizer))
    output.summary |= {"final_loss": log.loss, "trained_parameters": trained, "resumed_at": began}
    return output


def _require_finite(tensors: dict[str, Tensor], done: int, steps: int) -> None:
    """TrainingError where weights are not worth keeping, although the last loss was finite."""
    bad = next((name for name, tensor in tensors.items() if not tensor.sum().isfinite()), None)
    if bad is not None:
        raise TrainingError(f"{bad} is not finite after step {done - 1} of {steps}; {REMEDY}")


def _own_batches(training: Training, began: int) -> Iterator[np.ndarray]:
    """Samples of this worker's pieces in the order of the steps, for decoding ahead."""
    settings, ahead = training.settings, training.batches
    order = Batches(ahead.images, ahead.batch_size, training.job.seed, training.role)
    for number in range(began, settings.steps or 0):
        _, indices = order.at(number)
        for piece in training.pieces:
            yield indices[piece]


def _resume(training: Training, log: Log) -> int:
    """Restore the newest checkpoint; returns the steps already taken."""
    state = training.job.checkpoints.load() if training.job.checkpoints else None
    if state is None:
        return 0
    training.restore(state.tensors)
    log.curves = state.curves
    log.loss = state.curves["loss"][-1]
    return state.step
