"""Pictures of what two encoders see: reconstructions, nearest neighbours, a map of the features.

They are looked at, nothing is measured by them; no evaluation reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from maect.datasets import Split
from maect.evals.neighbors import nearest, normalize_rows, standardized, statistics
from maect.losses import patchify, unpatchify
from maect.models import build_decoder, random_masking
from maect.stages.encoder import encoder_of
from maect.stages.features import prepared
from maect.stages.job import Job, Output
from maect.streams import Stream

#: images reconstructed, images with neighbours, neighbours of each
SHOWN, STRIPS, NEIGHBORS = 8, 8, 5
#: images of the split that are looked at, evenly spread over it
LOOKED_AT = 1000
#: classes on the map; more could not be told apart
CLASSES = 12
#: side of a picture at most, pixels
SIDE = 64
#: what stands for a hidden patch, of [0, 1]
GREY = 0.5
PERPLEXITY = 30.0


def run(job: Job) -> Output:
    """Leave `gallery`: pictures as uint8 [.., C, s, s], rows and labels as int64.

    `original`, `masked`, `reconstructed` [8, ..] by the MAE (input `encoder`); `query` [8, ..] and
    `neighbor` [2, 8, 5, ..] of the features of inputs `before` and `after`, with `query_row`,
    `query_label`, `neighbor_row`, `neighbor_label`; `map` [2, M, 2] float32 with `map_label` [M].
    """
    job.prepare()
    split = job.split(job.settings["split"])
    labels = np.asarray(split.labels).astype(np.int64)
    rows = _spread(len(split), LOOKED_AT)
    few = (labels < CLASSES).nonzero()[0]
    few = few[_spread(len(few), LOOKED_AT)]
    near, shown = zip(
        *(_features(job, name, rows, few) for name in ("before", "after")), strict=True
    )
    strips, counts = _strips(job, split, rows, np.stack(near))
    tensors = _reconstructions(job, split, rows) | strips | {"map": _map(shown)}
    tensors["map_label"] = torch.from_numpy(labels[few])
    return Output(tensors={"gallery": tensors}, summary=counts)


def _spread(count: int, most: int) -> np.ndarray:
    """At most `most` of `count` rows, evenly spread: int64."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def _features(
    job: Job, name: str, rows: np.ndarray, few: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return training rows nearest to `rows` [M, 5], standardised features of `few` [F, D]."""
    tensors = job.tensors(name, "features")
    shown = tensors[f"{job.settings['split']}_x"].to(job.device)
    train = tensors["train_x"].to(job.device)
    found, count = statistics(train), min(NEIGHBORS, len(train))
    wanted, mapped = (shown[torch.from_numpy(own).to(job.device)] for own in (rows, few))
    _, near = nearest(train, wanted, count, partial(normalize_rows, found=found))
    return near.numpy(), standardized(mapped, found).float().cpu().numpy()


def _pictures(images: Tensor) -> Tensor:
    """Return small copies to look at: [.., C, S, S] in [0, 1] -> uint8 [.., C, s, s] on the CPU."""
    if images.shape[-1] > SIDE:
        images = torch.nn.functional.interpolate(images, SIDE, mode="area")
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()


# --------------------------------------------------------------------------------- reconstructions


def _reconstructions(job: Job, split: Split, rows: np.ndarray) -> dict[str, Tensor]:
    """Return what the MAE makes of hidden patches, put beside the visible ones.

    Where it predicts normalised patches, they are given the mean and spread of the true ones.
    """
    chosen = rows[_spread(len(rows), SHOWN)]
    originals, size = prepared(job, split, chosen, pixels=True), job.data.image_size
    channels = len(split.mean)
    mean = torch.tensor(split.mean, dtype=job.dtype, device=job.device).view(-1, 1, 1)
    std = torch.tensor(split.std, dtype=job.dtype, device=job.device).view(-1, 1, 1)
    encoder = encoder_of(job, channels).eval()
    decoder = build_decoder(job.model, size, channels)
    decoder.load_state_dict(job.tensors("encoder", "decoder"))
    decoder.to(job.device, job.dtype).eval()
    count, patch = encoder.grid[0] * encoder.grid[1], encoder.patch_size
    noise = torch.from_numpy(Stream(job.seed, "gallery", "mask").uniform(0, chosen, count))
    keep, restore, mask = random_masking(noise.to(job.device), job.settings["mask_ratio"])
    images = (originals - mean) / std
    with torch.inference_mode(), job.autocast():
        predicted = decoder(encoder(images, keep), restore).to(job.dtype)
    true = patchify(images, patch)
    if job.settings["norm_pix"]:
        spread = torch.sqrt(true.var(-1, keepdim=True, unbiased=True) + 1e-6)
        predicted = predicted * spread + true.mean(-1, keepdim=True)
    hidden = mask[..., None].bool()
    made = unpatchify(torch.where(hidden, predicted, true), patch, encoder.grid) * std + mean
    visible = patchify(originals, patch).masked_fill(hidden, GREY)
    return {
        "original": _pictures(originals),
        "masked": _pictures(unpatchify(visible, patch, encoder.grid)),
        "reconstructed": _pictures(made),
    }


# ------------------------------------------------------------------------------ nearest neighbours


def _strips(
    job: Job, split: Split, rows: np.ndarray, near: np.ndarray
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return the training images nearest to some images, before and after; and how many changed.

    near: training rows [2, M, 5].

    Half of the images shown are ones whose nearest neighbour came to be of their class, half ones
    where it ceased to be, as far as there are any; the first of each, chosen by nothing else.
    """
    train = job.split("train")
    labels, trained = np.asarray(split.labels)[rows], np.asarray(train.labels)
    right = trained[near[:, :, 0]] == labels
    gained, lost = (~right[0] & right[1]).nonzero()[0], (right[0] & ~right[1]).nonzero()[0]
    half = STRIPS // 2
    first = [*gained[: max(half, STRIPS - len(lost))], *lost[: max(half, STRIPS - len(gained))]]
    same = np.setdiff1d(np.arange(len(rows)), first)
    wanted = max(0, min(STRIPS - len(first), len(same)))
    chosen = np.array([*first, *same[_spread(len(same), wanted)]] if wanted else first, np.int64)
    near = near[:, chosen]
    found, place = np.unique(near, return_inverse=True)
    pictures = _pictures(prepared(job, train, found, pixels=True))[torch.from_numpy(place.ravel())]
    tensors = {
        "query": _pictures(prepared(job, split, rows[chosen], pixels=True)),
        "query_row": torch.from_numpy(rows[chosen]),
        "query_label": torch.from_numpy(labels[chosen].astype(np.int64)),
        "neighbor": pictures.view(*near.shape, *pictures.shape[1:]),
        "neighbor_row": torch.from_numpy(near),
        "neighbor_label": torch.from_numpy(trained[near].astype(np.int64)),
    }
    counts = {"images": len(rows), "gained": len(gained), "lost": len(lost)}
    return tensors, counts | {"right": int(right[1].sum())}


# --------------------------------------------------------------------------------------- the map


def _map(features: Sequence[np.ndarray]) -> Tensor:
    """t-SNE (van der Maaten and Hinton 2008) from the PCA: [F, D] of each -> [2, F, 2] float32."""
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    maps = []
    for shown in features:
        perplexity = min(PERPLEXITY, (len(shown) - 1) / 3)
        # sums over threads would differ from run to run
        with threadpool_limits(limits=1):
            found = TSNE(perplexity=perplexity, init="pca", random_state=0, max_iter=500)
            maps.append(found.fit_transform(shown).astype(np.float32))
    return torch.from_numpy(np.stack(maps))
