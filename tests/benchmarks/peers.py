"""Our steps beside those of lightly and transformers: same shapes, same machine, same run.

    python tests/benchmarks/peers.py docs/results/peers.json      needs maect-bench[peers]

CPU time of one thread, fp32, on images at hand: no data path, no augmentation. All take turns
within a round; ratios are of the same round, and several processes tell how far one goes by chance.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from bench import environment

if __name__ == "__main__":
    environment.use("avx2")  # before numpy and torch are imported

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.store.files import write_json
from maect.evals.nearest import knn
from maect.heads import NeighborQueue
from maect.losses import mae_loss_per_image, nnclr_loss, patchify
from maect.models import Decoder, Encoder, random_masking

Step = Callable[[], object]
PROCESSES, ROUNDS = 3, 15
#: ViT-Ti/4 at 32 x 32, as for CIFAR-10, a decoder of four blocks
SIDE, PATCH, DIM, DEPTH, HEADS, BATCH = 32, 4, 192, 12, 3, 64
DECODER, DECODER_DEPTH, DECODER_HEADS = 128, 4, 4
GRID = (SIDE // PATCH, SIDE // PATCH)
#: the published queue, of 256 values, and a batch of two views
QUEUE, WIDTH, VIEWS, TEMPERATURE = 65_536, 256, 256, 0.15


def stepping(modules: list[nn.Module], loss: Callable[[], Tensor]) -> Step:
    """Return steps of AdamW on a loss."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, foreach=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    return step


def mae() -> dict[str, Step]:
    """An MAE step: 75 % masked, loss on normalised pixels."""
    from lightly.models import utils
    from lightly.models.modules import MaskedVisionTransformerTIMM
    from lightly.models.modules.masked_autoencoder_timm import MAEDecoderTIMM
    from timm.models.vision_transformer import VisionTransformer
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    images, patches = torch.rand(BATCH, 3, SIDE, SIDE), GRID[0] * GRID[1]
    encoder = Encoder(SIDE, PATCH, 3, DIM, DEPTH, HEADS)
    decoder = Decoder(DIM, GRID, 3 * PATCH**2, DECODER, DECODER_DEPTH, DECODER_HEADS)

    def ours() -> Tensor:
        keep, restore, mask = random_masking(torch.rand(BATCH, patches), 0.75)
        predicted = decoder(encoder(images, keep), restore)
        return mae_loss_per_image(predicted, images, mask, PATCH, True).sum() / mask.sum()

    config = ViTMAEConfig(
        hidden_size=DIM, num_hidden_layers=DEPTH, num_attention_heads=HEADS,
        intermediate_size=4 * DIM, image_size=SIDE, patch_size=PATCH, norm_pix_loss=True,
        decoder_hidden_size=DECODER, decoder_num_hidden_layers=DECODER_DEPTH,
        decoder_num_attention_heads=DECODER_HEADS, decoder_intermediate_size=4 * DECODER,
    )  # fmt: skip
    theirs = ViTMAEForPreTraining(config).train()

    vit = VisionTransformer(
        img_size=SIDE, patch_size=PATCH, embed_dim=DIM, depth=DEPTH, num_heads=HEADS, num_classes=0
    )
    masked = MaskedVisionTransformerTIMM(vit=vit)
    from_masked = MAEDecoderTIMM(
        patches, PATCH, embed_dim=DIM, decoder_embed_dim=DECODER, decoder_depth=DECODER_DEPTH,
        decoder_num_heads=DECODER_HEADS,
    )  # fmt: skip

    def lightly() -> Tensor:
        size = (BATCH, patches + 1)
        keep, hidden = utils.random_token_mask(size, mask_ratio=0.75)
        encoded = from_masked.embed(masked.encode(images, idx_keep=keep))
        tokens = utils.repeat_token(from_masked.mask_token, size)
        tokens = utils.set_at_index(tokens, keep, encoded.type_as(tokens))
        predicted = from_masked.predict(utils.get_at_index(from_masked.decode(tokens), hidden))
        target = utils.get_at_index(patchify(images, PATCH), hidden - 1)
        mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        return F.mse_loss(predicted, (target - mean) / (var + 1e-6).sqrt())

    return {
        "ours": stepping([encoder, decoder], ours),
        "transformers": stepping([theirs], lambda: theirs(images).loss),
        "lightly": stepping([masked, from_masked], lightly),
    }


def queue() -> dict[str, Step]:
    """NNCLR's loss of two views with its queue: look-up, loss both ways, gradients, push."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import NNMemoryBankModule

    first, second = (torch.randn(VIEWS, WIDTH, requires_grad=True) for _ in range(2))
    held, ids = NeighborQueue(QUEUE, WIDTH), torch.arange(VIEWS)

    def ours() -> None:
        found = [held.lookup(view.detach(), ids)[0][:, 0] for view in (first, second)]
        one, two = (held.embeddings[rows] for rows in found)
        loss = (nnclr_loss(second, one, TEMPERATURE) + nnclr_loss(first, two, TEMPERATURE)) / 2
        loss.backward()
        held.push(second.detach(), ids)

    bank, criterion = NNMemoryBankModule(size=(QUEUE, WIDTH)), NTXentLoss(TEMPERATURE)

    def lightly() -> None:
        one = bank(first.detach(), update=False)
        two = bank(second.detach(), update=True)
        (0.5 * (criterion(one, second) + criterion(two, first))).backward()

    return {"ours": ours, "lightly": lightly}


def nearest() -> dict[str, Step]:
    """k-NN of 2,000 images among 20,000 of 192 values, k = 20, 10 classes."""
    from lightly.utils.benchmarking import knn_predict

    train, test = torch.randn(20_000, 192), torch.randn(2_000, 192)
    labels, answers = torch.randint(10, (20_000,)), torch.randint(10, (2_000,))

    def lightly() -> Tensor:
        bank, parts = F.normalize(train, dim=1).T, F.normalize(test, dim=1).split(200)
        return torch.cat([knn_predict(part, bank, labels, 10, 20) for part in parts])

    ours = partial(knn, train, labels, test, answers, 20, standardize=False)
    return {"ours": ours, "lightly": lightly}


CASES: dict[str, Callable[[], dict[str, Step]]] = {"mae": mae, "queue": queue, "nearest": nearest}


def measure(name: str) -> dict[str, list[float]]:
    """Return the CPU seconds of each peer's rounds, in turn."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    steps = CASES[name]()
    taken: dict[str, list[float]] = {peer: [] for peer in steps}
    for number in range(ROUNDS + 2):
        for peer, step in steps.items():
            began = time.process_time()
            step()
            if number >= 2:
                taken[peer].append(time.process_time() - began)
    return taken


def main(path: Path) -> None:
    found: dict[str, Any] = {}
    for name in CASES:
        command = [sys.executable, __file__, "--measure", name]
        told = [subprocess.check_output(command, text=True) for _ in range(PROCESSES)]
        rounds = [json.loads(text.splitlines()[-1]) for text in told]
        found[name] = {"what": str(CASES[name].__doc__).split("\n")[0]}
        for peer in rounds[0]:
            ratios = [median(np.divide(taken[peer], taken["ours"]).tolist()) for taken in rounds]
            found[name][peer] = {
                "ms_by_process": [round(1000 * median(taken[peer]), 2) for taken in rounds],
                "times_ours_by_process": [round(ratio, 3) for ratio in ratios],
            }
    versions = {name: version(name) for name in ("lightly", "transformers")}
    write_json(path, {
        "command": f"python tests/benchmarks/peers.py {path}",
        "processor": environment.processor(),
        "versions": environment.versions() | versions,
        "rounds": ROUNDS,
        "cases": found,
    })  # fmt: skip


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if sys.argv[1] == "--measure":
        print(json.dumps(measure(sys.argv[2])))
    else:
        main(Path(sys.argv[1]))
