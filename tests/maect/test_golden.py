"""Our method against arrays computed with the published MAE-CT implementation.

`golden/official_a.npz`: commit 6c82cb6 of github.com/ml-jku/MAE-CT, tiny shapes, fp32, CPU.
The prefixes `knn/`, `lowshot/` and `probe/` are compared where the evaluations are tested.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from maect.heads import NeighborQueue, NNCLRHead
from maect.losses import mae_loss, nnclr_loss, patchify
from maect.models import Decoder, Encoder, pool, random_masking, sincos_positions
from maect.optim import (
    adamw,
    freeze,
    layer_decay,
    learning_rate,
    parameter_groups,
    set_learning_rate,
)

TOLERANCE = 1e-5
#: the published head keeps its queue in itself, ours in a module
QUEUE_NAMES = {
    "queue": "queue.embeddings",
    "queue_y": "queue.labels",
    "queue_id": "queue.ids",
    "queue_ptr": "queue.pointer",
}


class Golden:
    """The archive, numbers as tensors and names as lists."""

    def __init__(self) -> None:
        self.arrays = dict(np.load(Path(__file__).parent / "golden" / "official_a.npz"))

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])

    def names(self, name: str) -> list[str]:
        return self.arrays[name].tolist()

    def below(self, prefix: str) -> dict[str, Tensor]:
        keys = [key for key in self.arrays if key.startswith(prefix)]
        return {key.removeprefix(prefix): self[key] for key in keys}


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden()


def close(actual: Tensor | float, expected: Tensor | float, scale: float = 1.0) -> None:
    """Within 1e-5 of the expected value, and of `scale` where values are small (gradients)."""
    difference = torch.as_tensor(actual) - torch.as_tensor(expected)
    assert difference.shape == torch.as_tensor(expected).shape
    assert difference.abs().max().item() <= TOLERANCE * min(1.0, scale)


def mae(golden: Golden) -> nn.ModuleDict:
    values = golden["mae/cfg_img_patch_dim_depth_heads_decdim_decdepth_decheads"].tolist()
    image, patch, dim, depth, heads, *decoder_sizes = values
    encoder = Encoder(image, patch, 3, dim, depth, heads)
    decoder = Decoder(dim, encoder.grid, 3 * patch**2, *decoder_sizes)
    encoder.load_state_dict(golden.below("mae/enc/"))
    decoder.load_state_dict(golden.below("mae/dec/"))
    return nn.ModuleDict({"encoder": encoder, "decoder": decoder})


def reconstruct(golden: Golden, model: nn.ModuleDict, norm_pix: bool = True) -> Tensor:
    keep, ids_restore, mask = random_masking(golden["mae/noise"].flatten(1), 0.75)
    pred = model["decoder"](model["encoder"](golden["mae/x"], keep), ids_restore)
    return mae_loss(pred, golden["mae/x"], mask, model["encoder"].patch_size, norm_pix)


def test_patchify(golden: Golden) -> None:
    close(patchify(golden["patchify/img"], 4), golden["patchify/out_p4"])


def test_positions(golden: Golden) -> None:
    close(sincos_positions(14, 192), golden["pos/official_14x14_192"])
    # facebookresearch/mae adds a zero row for the class token, and nothing else
    assert golden["pos/max_abs_diff_official_vs_fbmae"] == 0
    assert not golden["pos/cls_row_fbmae"].any()


def test_positions_of_the_models(golden: Golden) -> None:
    _, _, dim, *_ = golden["mae/cfg_img_patch_dim_depth_heads_decdim_decdepth_decheads"].tolist()
    close(sincos_positions(4, dim)[None], golden["mae/enc/pos_embed"])
    close(sincos_positions((4, 4), 16)[None], golden["mae/dec/pos_embed"])


def test_masking_and_forward(golden: Golden) -> None:
    model = mae(golden)
    keep, ids_restore, mask = random_masking(golden["mae/noise"].flatten(1), 0.75)
    assert torch.equal(ids_restore, golden["mae/ids_restore"])
    assert torch.equal(mask, golden["mae/mask"])
    latent = model["encoder"](golden["mae/x"], keep)
    close(latent, golden["mae/latent_tokens"])
    close(model["decoder"](latent, ids_restore), golden["mae/x_hat"])


def test_features_without_masking(golden: Golden) -> None:
    tokens = mae(golden)["encoder"].forward_features(golden["mae/x"])
    close(tokens, golden["mae/features_nomask"])
    close(pool(tokens, "mean"), golden["mae/features_mean_patch"])
    close(pool(tokens, "cls"), golden["mae/features_cls"])


def test_mae_loss_and_gradients(golden: Golden) -> None:
    model = mae(golden)
    close(reconstruct(golden, model, norm_pix=False), golden["mae/loss_nonorm"])
    loss = reconstruct(golden, model)
    close(loss, golden["mae/loss_normpix"])
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    norms = golden.below("mae/grad_norm/")
    assert norms.keys() == gradients.keys()
    for name, norm in norms.items():
        close(gradients[name].norm(), norm, scale=norm.item())
    stored = golden.below("mae/grad/")
    assert len(stored) == 5
    for name, gradient in stored.items():
        close(gradients[name], gradient, scale=gradient.abs().max().item())


def test_three_optimizer_steps(golden: Golden) -> None:
    model = mae(golden)
    optimizer = adamw(parameter_groups(model.named_parameters(), 0.05), lr=1.0)
    losses = golden["mae/steps3_losses"].tolist()
    for step, rate in enumerate(golden["mae/steps3_lrs"].tolist()):
        assert learning_rate(step, total=50, warmup=10, peak=1.2e-3) == pytest.approx(rate)
        optimizer.zero_grad()
        loss = reconstruct(golden, model)
        close(loss.item(), losses[step])
        loss.backward()
        set_learning_rate(optimizer, rate)
        optimizer.step()
    weights = golden.below("mae/steps3/")
    assert len(weights) == 5
    for name, expected in weights.items():
        close(model.get_parameter(name).detach(), expected)


def test_weight_decay_groups(golden: Golden) -> None:
    names: dict[float, list[str]] = {}
    for group in parameter_groups(mae(golden).named_parameters(), 0.05):
        names.setdefault(group["weight_decay"], []).extend(group["names"])
    assert names[0.0] == golden.names("mae/wd_zero_names")
    assert names[0.05] == golden.names("mae/wd_decay_names")


@pytest.mark.parametrize("temperature", [0.15, 0.2, 0.3])
def test_nnclr_loss(golden: Golden, temperature: float) -> None:
    predicted, neighbors = golden["nnclr/predicted"].requires_grad_(), golden["nnclr/nn"]
    loss = nnclr_loss(predicted, neighbors, temperature)
    close(loss, golden[f"nnclr/loss_t{temperature}_transposed0"])
    loss.backward()
    expected = golden[f"nnclr/grad_predicted_t{temperature}"]
    close(predicted.grad, expected, scale=expected.abs().max().item())
    transposed = nnclr_loss(neighbors, nn.functional.normalize(predicted, dim=1), temperature)
    close(transposed, golden[f"nnclr/loss_t{temperature}_transposed1"])


def test_nnclr_loss_of_two_published_ranks(golden: Golden) -> None:
    """Two ranks' losses average to ours; their gradients, once averaged over ranks, are ours."""
    predicted = golden["nnclr/predicted"].requires_grad_()
    loss = nnclr_loss(predicted, golden["nnclr/nn"], 0.15)
    loss.backward()
    ranks = (0, 1)
    close(loss, sum(golden[f"nnclr/ddp2_loss_rank{rank}"] for rank in ranks) / 2)
    gradient = torch.cat([golden[f"nnclr/ddp2_grad_rank{rank}"] for rank in ranks])
    # each rank holds the gradient of its own four rows only; averaging two ranks halves it
    close(predicted.grad, gradient / 2)


def test_queue(golden: Golden) -> None:
    queue = NeighborQueue(64, 16)
    queue.embeddings.copy_(golden["queue/queue"])
    queue.ids.copy_(golden["queue/queue_id"])
    queries, ids = golden["queue/proj_normed"], golden["queue/ids"]
    assert torch.equal(queue.lookup(queries, ids)[0][:, 0], golden["queue/idx_excl"])
    own_too, _ = queue.lookup(queries, ids, exclude_own=False)
    assert torch.equal(own_too[:, 0], golden["queue/idx_noexcl"])
    assert torch.equal(queue.lookup(queries, ids, topk=20)[0], golden["queue/top20_idx_excl"])


def head(golden: Golden) -> NNCLRHead:
    module = NNCLRHead(24, hidden_dim=32, predictor_dim=48, out_dim=16, queue_size=64)
    state = golden.below("head/init/")
    module.load_state_dict({QUEUE_NAMES.get(name, name): value for name, value in state.items()})
    return module


def test_head_outputs(golden: Golden) -> None:
    module = head(golden)
    for view, tokens in enumerate(golden["head/tokens_2views"].chunk(2)):
        features = pool(tokens, "mean")
        close(module.target_projector(features), golden[f"head/view{view}/projected"])
        predicted = module.predictor(module.projector(features))
        close(predicted, golden[f"head/view{view}/predicted"])


def test_head_step(golden: Golden) -> None:
    module = head(golden)
    tokens = golden["head/tokens_2views"].requires_grad_()
    view0, view1 = pool(tokens, "mean").chunk(2)
    output = module(
        view0,
        view1,
        golden["head/idx"],
        topk=1,
        temperature=0.15,
        use_target=True,
        draws=torch.zeros(2, len(view0)),
        labels=golden["head/y"],
    )
    close(output.loss, golden["head/loss"])
    assert output.neighbor_accuracy.item() == golden["head/nn_accuracy"].item()
    output.loss.backward()
    close(tokens.grad, golden["head/grad_tokens"], scale=0.04)
    gradients = {n: p.grad for n, p in module.named_parameters() if p.requires_grad}
    assert list(gradients) == golden.names("head/trainable_names")
    for name, norm in golden.below("head/grad_norm/").items():
        close(gradients[name].norm(), norm)
    for name, expected in golden.below("head/after_loss/").items():
        close(module.state_dict()[QUEUE_NAMES[name]], expected)

    rate = golden["head/lr"].item()
    adamw(parameter_groups(module.named_parameters(), 1e-5), rate).step()
    module.update_target(0.99)
    state = module.state_dict()
    for name, expected in golden.below("head/after_step/").items():
        if name == "projector.7.bias":
            # batch norm in the predictor cancels it: its gradient is rounding noise, which
            # Adam's first step scales up to one step of either sign, depending on the CPU
            assert (state[name] - expected).abs().max() <= 2 * rate
        else:
            close(state[name], expected)


def b16() -> Encoder:
    with torch.device("meta"):
        return Encoder(224, 16, 3, 768, 12, 12)


def test_layer_decay(golden: Golden) -> None:
    names = golden.names("llrd/names")
    assert [name for name, _ in b16().named_parameters()] == names
    factors = layer_decay(names, depth=12, decay=0.65)
    expected = golden["llrd/scale_d12_065"].tolist()
    assert list(factors.values()) == pytest.approx(expected, abs=TOLERANCE)


def test_freeze(golden: Golden) -> None:
    encoder = b16()
    assert freeze(encoder, 6) == golden.names("freeze/trainable")
    frozen = [name for name, p in encoder.named_parameters() if not p.requires_grad]
    assert frozen == golden.names("freeze/frozen_block_idxs_0_5")


@pytest.mark.parametrize("part", ["masked_encoder", "masked_decoder", "nnclr_ema_queue_head"])
def test_state_dict_names_and_shapes(golden: Golden, part: str) -> None:
    with torch.device("meta"):
        module = {
            "masked_encoder": b16,
            "masked_decoder": lambda: Decoder(768, (14, 14), 768),
            "nnclr_ema_queue_head": lambda: NNCLRHead(768),
        }[part]()
    ours = {name: str(list(value.shape)) for name, value in module.state_dict().items()}
    names = [QUEUE_NAMES.get(name, name) for name in golden.names(f"sd/{part}_b16/names")]
    assert ours == dict(zip(names, golden.names(f"sd/{part}_b16/shapes"), strict=True))


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("stage1_10ep_5upe_warm2ep_base1.2e-3", 1.2e-3),
        ("stage3_10ep_5upe_warm20pct_base8e-4", 8e-4),
    ],
)
def test_schedules(golden: Golden, name: str, peak: float) -> None:
    curve = [learning_rate(step, total=50, warmup=10, peak=peak) for step in range(50)]
    assert curve == pytest.approx(golden[f"sched/{name}"].tolist(), rel=TOLERANCE)
