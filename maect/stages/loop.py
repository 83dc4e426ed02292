"""The loop that all training stages share: order of the samples, schedule, log, checks."""

from __future__ import annotations

import copy
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from maect import methods
from maect.augment import Augment
from maect.datasets.decoders import Request
from maect.finite import first_not_finite
from maect.models import Decoder, VisionEncoder
from maect.optim import learning_rate, set_learning_rate, update_average
from maect.parallel import Group
from maect.settings import ViewSettings
from maect.stages.encoder import encoder_document, encoder_of, usage_notes
from maect.stages.job import Job, Output, Progress, State, TrainingError
from maect.streams import Stream

#: every step of the beginning is logged, then about this many points over the rest
FIRST_LOGGED = 20
LOGGED_POINTS = 500
PROGRESS_S = 0.5
REMEDY = "lower lr, lengthen the warm-up or set clip_grad"

Values = dict[str, Tensor | float]


def is_logged(step: int, steps: int) -> bool:
    """Return whether the curves of a stage of `steps` steps hold this step."""
    return step < FIRST_LOGGED or step % max(1, steps // LOGGED_POINTS) == 0 or step == steps - 1


class Batches:
    """The global batches of a stage: each epoch in an order of its own, its remainder dropped."""

    def __init__(self, images: int, batch_size: int, seed: int, role: str) -> None:
        if batch_size > images:
            raise TrainingError(f"a batch of {batch_size} is larger than the {images} images")
        self.images, self.batch_size = images, batch_size
        self.per_epoch = images // batch_size
        self.stream = Stream(seed, role, "order")
        # two epochs: the training is in one while its images are decoded ahead from the next
        self._order = lru_cache(maxsize=2)(lambda epoch: self.stream.permutation(epoch, images))

    def at(self, step: int) -> tuple[int, np.ndarray]:
        """Return epoch and sample indices [B] of a step."""
        epoch, position = divmod(step, self.per_epoch)
        start = position * self.batch_size
        return epoch, self._order(epoch)[start : start + self.batch_size]


class Training(ABC):
    """A training stage, ready to take its steps.

    Its settings are resolved: told in steps and peak rates. A step is a function of its number
    alone, given the state that the steps before it left. A subclass adds its networks to
    `modules` and sets `optimizers`.
    """

    #: whether steps change the encoder, so that a moving average of it makes sense
    trains_encoder = True

    def __init__(self, job: Job) -> None:
        self.method = methods.get(job.kind)
        settings = self.method.settings.parse(job.settings["train"])
        #: the settings with those that the method borrows
        self.options = methods.options_of(settings, job.settings.get("head", {}))
        self.job, self.steps, self.lr = job, self.options.steps, self.options.lr
        #: names the stage's random streams
        self.role = job.kind
        self.group = job.prepare()
        self.pieces = self.group.pieces(settings.batch_size)

        # ---- data: batches and their augmented views
        self.train = job.split("train")
        self.batches = Batches(len(self.train), settings.batch_size, job.seed, self.role)
        self.augment = Augment(
            [ViewSettings.parse(view) for view in job.settings["views"]],
            image_size=job.data.image_size,
            mean=self.train.mean,
            std=self.train.std,
            seed=job.seed,
            role=self.role,
            device=job.device,
            dtype=job.dtype,
        )

        # ---- encoder, and its moving average for evaluation
        #: everything with weights or buffers that steps change, by the name of its file
        self.modules: dict[str, nn.Module] = {}
        self.encoder = encoder_of(job, len(self.train.mean))
        self.add("encoder", self.encoder)
        if settings.encoder_ema and self.trains_encoder:
            self.modules["encoder_ema"] = copy.deepcopy(self.encoder).requires_grad_(False)
        self.optimizers: list[torch.optim.AdamW] = []

    def add(self, name: str, network: VisionEncoder | Decoder) -> None:
        """Take a network into `modules`: on the job's device, compiled where the job says so."""
        self.modules[name] = network.to(self.job.device, self.job.dtype)
        if self.job.numerics.compile:
            for block in network.blocks:  # once for all blocks of a shape
                block.compile(dynamic=False)

    @abstractmethod
    def gradients(self, epoch: int, indices: np.ndarray) -> Values:
        """Leave the gradient of the global batch in the parameters.

        Return the values to log, "loss" among them.
        """

    def watch(self) -> Values:
        """Return more values to log of the step just computed. Changes nothing."""
        return {}

    def after_step(self) -> None:
        """Update what follows the weights: moving averages."""
        if "encoder_ema" in self.modules:
            update_average(self.modules["encoder_ema"], self.encoder, self.options.encoder_ema)

    def output(self) -> Output:
        """Return what the stage leaves when its steps are taken: a file for each module."""
        tensors = {name: copies(module.state_dict()) for name, module in self.modules.items()}
        pool = self.job.settings.get("pool")
        document = encoder_document(self.encoder, self.train, pool)
        notes = usage_notes(self.encoder, pool, self.train)
        summary = {"notes": notes} if notes else {}
        return Output(tensors=tensors, documents={"encoder": document}, summary=summary)

    def step(self, number: int) -> Values:
        """Take one step. Return the values to log."""
        options = self.options
        values = self.gradients(*self.batches.at(number))
        if is_logged(number, self.steps):
            values |= self.watch()
        for optimizer in self.optimizers:
            peak = optimizer.defaults["lr"]
            rate = learning_rate(number, self.steps, options.warmup_steps, peak)
            values.setdefault("lr", rate)  # the curve shows the first optimizer's
            set_learning_rate(optimizer, rate)
            if options.clip_grad is not None:
                nn.utils.clip_grad_norm_(parameters_of(optimizer), options.clip_grad)
            optimizer.step()
        self.after_step()
        return values

    def state(self) -> dict[str, Tensor]:
        """Return weights, buffers, averages and the optimizers' moments, which steps change.

        Names are `module/name` and `optimizer0/parameter/moment`.
        """
        tensors: dict[str, Tensor] = {}
        for name, module in self.modules.items():
            tensors |= {f"{name}/{key}": one for key, one in module.state_dict().items()}
        for index, optimizer in enumerate(self.optimizers):
            for parameter, moments in optimizer.state_dict()["state"].items():
                owner = f"optimizer{index}/{parameter}"
                tensors |= {f"{owner}/{key}": one for key, one in moments.items()}
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go back to a `state`."""
        owned: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            owner, _, key = name.partition("/")
            owned.setdefault(owner, {})[key] = tensor
        for name, module in self.modules.items():
            module.load_state_dict(owned[name])
        for index, optimizer in enumerate(self.optimizers):
            moments: dict[int, dict[str, Tensor]] = {}
            for name, tensor in owned.get(f"optimizer{index}", {}).items():
                parameter, _, key = name.partition("/")
                moments.setdefault(int(parameter), {})[key] = tensor
            optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})

    def own_crops(self, began: int, end: int | None = None) -> Iterator[Request]:
        """Yield what this worker's pieces need of images, in the order of the steps."""
        for number in range(began, self.steps if end is None else end):
            epoch, indices = self.batches.at(number)
            for piece in self.pieces:
                yield self.augment.request(self.train, epoch, indices[piece])


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return all parameters that an optimizer updates."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def copies(
    tensors: Mapping[str, Tensor], held: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return copies on the CPU, each tensor with its own storage.

    `held` keeps them for the next call, which writes over them: from a GPU they are copied ten
    times as fast to pinned memory, and it takes as long to get that.
    """
    found = {} if held is None else held
    for name, tensor in tensors.items():
        if name not in found:
            pinned = held is not None and tensor.is_cuda
            found[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        found[name].copy_(tensor.detach(), non_blocking=True)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return dict(found)


def _newest(job: Job, group: Group) -> State | None:
    """Return the first worker's newest checkpoint on every worker alike, or None.

    Another may see an older one, or none: a shared file system tells not everyone at once.
    """
    own = job.checkpoints.load() if job.checkpoints is not None and group.rank == 0 else None
    told = group.share(None if own is None else (own.step, own.curves))
    if told is None:
        return None
    tensors = group.share_tensors({} if own is None else own.tensors, job.device)
    return State(told[0], dict(tensors), told[1])


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
        """Take the values of a step. Raises TrainingError as `flush` does."""
        self._held.append((step, values))
        if len(self._held) >= self.patience or step == self.steps - 1:
            self.flush()

    def flush(self) -> None:
        """Read what is held into the curves. Raises TrainingError for a loss not finite."""
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


def train(training: Training) -> Output:
    """Take all steps of a stage, from its newest checkpoint where it has one.

    Return what it leaves, curves included: where the job says `stop_at`, what it has then, the
    checkpoint written before. Raises TrainingError where a loss or a weight is not finite.
    """
    job, steps = training.job, training.steps
    log = Log(steps, job.device)
    state = _newest(job, training.group)
    began = state.step if state else 0
    if state is not None:
        training.restore(state.tensors)
        log.curves = state.curves
        log.loss = [math.nan, *state.curves.get("loss", [])][-1]
    end = steps if job.stop_at is None else min(job.stop_at, steps)
    training.train.expect(training.own_crops(began, end))

    held: dict[str, Tensor] = {}  # where states are copied to
    last, last_step = time.monotonic(), began
    for number in range(began, end):
        log.add(number, training.step(number))
        if training.group.rank > 0:
            continue  # the first worker tells how far the stage is, and keeps its state
        now, done = time.monotonic(), number + 1
        if now - last >= PROGRESS_S or done == end:
            images = (done - last_step) * training.options.batch_size
            epoch = number // training.batches.per_epoch
            job.on_progress(Progress(done, steps, epoch, log.loss, images / max(now - last, 1e-9)))
            last, last_step = now, done
        if job.checkpoints is not None and done < steps and job.checkpoints.due():
            log.flush()  # a loss that is not finite ends the stage before it is kept
            kept = copies(_finite(training.state(), done, steps), held)
            job.checkpoints.save(State(done, kept, copy.deepcopy(log.curves)))

    log.flush()
    end = max(began, end)  # a checkpoint may be past it
    if job.checkpoints is not None and began < end < steps and training.group.rank == 0:
        kept = copies(_finite(training.state(), end, steps))
        job.checkpoints.save_now(State(end, kept, log.curves))
    output = training.output()
    for tensors in output.tensors.values():
        _finite(tensors, end, steps)
    output.curves = log.curves
    trained = sum(p.numel() for o in training.optimizers for p in parameters_of(o))
    output.summary |= {"final_loss": log.loss, "trained_parameters": trained, "resumed_at": began}
    output.summary |= {"stopped_at": end} if end < steps else {}
    return output


def _finite(tensors: dict[str, Tensor], done: int, steps: int) -> dict[str, Tensor]:
    """Return weights; TrainingError where they are not finite, although the loss was."""
    bad = first_not_finite(tensors)
    if bad is not None:
        raise TrainingError(f"{bad} is not finite after step {done - 1} of {steps}; {REMEDY}")
    return tensors
