"""Features of all splits, as evaluations read them, and the images and encoder behind them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from maect.augment import Augment, evaluation_transform
from maect.datasets import Split
from maect.datasets.decoders import Request
from maect.datasets.splits import selection_rows
from maect.models import VisionEncoder, pool
from maect.parallel import Group
from maect.settings import ViewSettings
from maect.stages.encoder import encoder_of, usage_notes
from maect.stages.job import Job, Output

BATCH = 256
SPLITS = ("train", "selection", "test")

Block = int | list[int] | None


class FeatureNetwork(nn.Module):
    """An encoder and the pooling of its tokens: [B, C, S, S] -> [B, D] float32.

    `block`: after this block instead of after the final norm; a list of K gives [B, K, D]. `norm`:
    the final norm follows there, too.
    """

    def __init__(
        self,
        encoder: VisionEncoder,
        how: Any,
        block: Block,
        autocast: Callable[[], AbstractContextManager[Any]],
        norm: bool = False,
    ) -> None:
        super().__init__()
        if how != "mean" and getattr(encoder, "cls_token", None) is None:
            raise ValueError("the encoder has no class token; pool 'mean'")
        self.norm = norm
        self.encoder, self.how, self.block, self.autocast = encoder, how, block, autocast

    def forward(self, images: Tensor) -> Tensor:
        with self.autocast():
            if self.block is None:
                return self.encoder.features(images, self.how).float()
            blocks = self.block if isinstance(self.block, list) else [self.block]
            tokens = self.encoder.features_by_depth(images, blocks, self.norm)
            found = [pool(one, self.how).float() for one in tokens]
        return torch.stack(found, dim=1) if isinstance(self.block, list) else found[0]


def with_channels(images: Tensor, count: int) -> Tensor:
    """Return normalised images with `count` channels: [B, C, S, S] -> [B, count, S, S].

    Grey ones are repeated, of colour ones the mean of the channels is taken, and repeated.
    """
    if images.shape[1] == count:
        return images
    return images.mean(1, keepdim=True).expand(-1, count, -1, -1).contiguous()


def _as_many(statistics: tuple[float, ...], count: int) -> tuple[float, ...]:
    """Return statistics of `count` channels: as they are, or of all the mean."""
    return statistics if len(statistics) == count else (sum(statistics) / len(statistics),) * count


def prepared(job: Job, split: Split, rows: np.ndarray, *, pixels: bool) -> Tensor:
    """Return images as an encoder is shown them for evaluation: [B, C, S, S].

    Normalised, or as `pixels` in [0, 1].
    """
    channels, size = len(split.mean), job.data.image_size
    encoded = split.sizes is not None
    return evaluation_transform(
        split.crops(rows, lambda: Request.centres(rows, size)) if encoded else split.batch(rows),
        image_size=size,
        mean=[0.0] * channels if pixels else split.mean,
        std=[1.0] * channels if pixels else split.std,
        dtype=job.dtype,
        device=job.device,
    )


class JobImages:
    """A job's images, and fresh copies of its encoder (`maect.evals.Images`).

    `encoder`: by default what the job starts from.
    """

    def __init__(self, job: Job, encoder: VisionEncoder | None = None) -> None:
        self.job, self.given = job, encoder
        self.group = Group(job.numerics.shards)
        self.block: Block = job.settings.get("block")
        self.split = cache(job.split)
        #: rows of the selection split that stand for two splits: see `reporting`
        self.rows: dict[str, np.ndarray] = {}
        #: what was assumed of the encoder, once there is one
        self.notes: list[str] = []

    @property
    def channels(self) -> int:
        """Channels that the encoder takes: of the data, or as the settings say of other data."""
        return int(self.job.settings.get("channels") or len(self.split("train").mean))

    @property
    def mean(self) -> tuple[float, ...]:
        """Means of the channels that the encoder takes."""
        return _as_many(self.split("train").mean, self.channels)

    @property
    def std(self) -> tuple[float, ...]:
        """Deviations of the channels that the encoder takes."""
        return _as_many(self.split("train").std, self.channels)

    @cached_property
    def pixels(self) -> bool:
        """Whether there is no encoder: the features are the pixels in [0, 1]."""
        return self.job.settings.get("init") == "pixels"

    def network(self) -> FeatureNetwork:
        job = self.job
        if self.given is None:
            encoder = encoder_of(job, self.channels, averaged=True)
        else:
            encoder = copy.deepcopy(self.given).to(job.device, job.dtype)
        self.notes = usage_notes(encoder, job.settings["pool"], self.split("train"))
        norm = bool(job.settings.get("norm"))
        return FeatureNetwork(encoder, job.settings["pool"], self.block, job.autocast, norm)

    def _augment(self, view: ViewSettings, role: str) -> Augment:
        split = self.split("train")
        return Augment(
            [view],
            image_size=self.job.data.image_size,
            mean=split.mean,
            std=split.std,
            seed=self.job.seed,
            role=role,
            device=self.job.device,
            dtype=self.job.dtype,
        )

    def views(self, view: ViewSettings, role: str, epoch: int, rows: np.ndarray) -> Tensor:
        views = self._augment(view, role).batch(self.split("train"), epoch, rows)
        return with_channels(views[0], self.channels)

    def expect_views(
        self, view: ViewSettings, role: str, batches: Iterable[tuple[int, np.ndarray]]
    ) -> None:
        split, augment = self.split("train"), self._augment(view, role)
        split.expect(augment.request(split, epoch, rows) for epoch, rows in batches)

    def _rows(self, split: str, rows: np.ndarray) -> tuple[Split, np.ndarray]:
        """Return where rows of "train", "selection" or "test" lie in the data."""
        if split in self.rows:
            return self.split("selection"), self.rows[split][rows]
        return self.split(split), rows

    def prepared(self, split: str, rows: np.ndarray) -> Tensor:
        found = prepared(self.job, *self._rows(split, rows), pixels=self.pixels)
        return with_channels(found, self.channels)

    def expect_prepared(self, split: str, batches: Iterable[np.ndarray]) -> None:
        source, size = self._rows(split, np.arange(0))[0], self.job.data.image_size
        source.expect(Request.centres(self._rows(split, rows)[1], size) for rows in batches)

    def at(self, place: int) -> JobImages:
        assert isinstance(self.block, list)
        other = copy.copy(self)
        other.block = self.block[place]
        return other

    def reporting(self, split: str) -> JobImages:
        """Return the same images as an evaluation reads them that reports on `split`."""
        other = copy.copy(self)
        other.rows = selection_rows(split, len(self.split("selection")))
        return other


def run(job: Job) -> Output:
    """Leave `features`: for each split x [N, D] float32 and y [N] int64.

    Raw pixels where the settings say `init: pixels`, in [0, 1] and flattened. Features of several
    blocks where `block` is a list: x [N, K, D]. Where the settings name `splits`, of these only;
    of others labels alone. All workers compute; the first one has the output.
    """
    job.prepare()
    images = JobImages(job)
    splits = job.settings.get("splits", SPLITS)
    tensors = extract(images, splits, labels_of=[name for name in SPLITS if name not in splits])
    if images.group.rank > 0:
        return Output()
    summary: dict[str, Any] = {
        "dim": tensors["train_x"].shape[-1],
        "classes": images.split("train").classes,
    }
    summary |= {"notes": images.notes} if images.notes else {}
    return Output(tensors={"features": tensors}, summary=summary)


def extract(
    images: JobImages, splits: Sequence[str] = SPLITS, labels_of: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Return features and labels of `splits`: `train_x`, `train_y` and so on, as `run` leaves.

    `labels_of` are splits of which the features are empty. On the first worker; on the others all
    features are empty.
    """
    network = None if images.pixels else images.network().eval()
    first = images.group.rank == 0
    tensors: dict[str, Tensor] = {}
    for name in splits:

        def features(rows: slice, name: str = name) -> Tensor:
            batch = images.prepared(name, np.arange(rows.start, rows.stop))
            return batch.flatten(1).float() if network is None else network(batch)

        split, group = images.split(name), images.group
        own = group.dealt(len(split), BATCH)
        images.expect_prepared(name, (np.arange(rows.start, rows.stop) for rows in own))
        with torch.inference_mode():
            shared = group.shared(len(split), BATCH, features)
            found = [x.cpu() for x in shared if first]
        tensors[f"{name}_x"] = torch.cat(found) if found else torch.empty(0)
    whole = max((tensors[f"{name}_x"] for name in splits), key=len)
    for name in (*splits, *labels_of):
        labels = np.asarray(images.split(name).labels, dtype=np.int64)
        tensors[f"{name}_y"] = torch.from_numpy(labels)
        if not len(tensors.get(f"{name}_x", ())):  # of the shape that images would give
            tensors[f"{name}_x"] = whole.new_empty(0, *whole.shape[1:])
    return tensors
