"""Queue and NNCLR head, apart from the golden values."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from maect.heads import HeadOutput, NeighborQueue, NNCLRHead
from maect.losses import nnclr_loss
from maect.optim import adamw, parameter_groups


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def filled(size: int = 8, dim: int = 4) -> NeighborQueue:
    queue = NeighborQueue(size, dim)
    queue.push(numbers(size, dim), torch.arange(size), torch.arange(size) % 3)
    return queue


def test_queue_starts_with_random_unit_vectors_of_no_sample() -> None:
    queue = NeighborQueue(100, 16)
    torch.testing.assert_close(queue.embeddings.norm(dim=1), torch.ones(100))
    assert queue.ids.tolist() == [-1] * 100
    assert queue.labels.tolist() == [-1] * 100
    cosines = queue.embeddings @ queue.embeddings.T - torch.eye(100)
    assert cosines.abs().max() < 0.95
    assert abs(cosines.mean().item()) < 0.02
    assert torch.equal(queue.embeddings, NeighborQueue(100, 16).embeddings)


def test_push_wraps_around_and_normalises() -> None:
    queue, rows = NeighborQueue(5, 3), numbers(3, 3)
    queue.push(rows, torch.tensor([10, 11, 12]))
    queue.push(2 * rows, torch.tensor([20, 21, 22]))
    assert queue.ids.tolist() == [22, 11, 12, 20, 21]
    assert queue.pointer.item() == 1
    torch.testing.assert_close(queue.embeddings[[3, 4, 0]], F.normalize(rows, dim=1))


def test_push_of_more_than_the_queue_keeps_the_last() -> None:
    queue = NeighborQueue(4, 3)
    queue.push(numbers(10, 3), torch.arange(10), torch.arange(10) + 50)
    assert sorted(queue.ids.tolist()) == [6, 7, 8, 9]
    assert torch.equal(queue.labels, queue.ids + 50)


def test_lookup_gives_cosines_most_similar_first() -> None:
    queue, queries = filled(), 7.0 * numbers(3, 4, seed=1)
    indices, similarities = queue.lookup(queries, torch.full((3,), 99), topk=5)
    cosines = F.cosine_similarity(queries[:, None], queue.embeddings[None], dim=2)
    expected = cosines.sort(dim=1, descending=True)
    assert torch.equal(indices, expected.indices[:, :5])
    torch.testing.assert_close(similarities, expected.values[:, :5])
    nearest, _ = queue.lookup(queries, torch.full((3,), 99))
    assert torch.equal(nearest, indices[:, :1])


def test_lookup_of_equals_takes_the_lowest_index() -> None:
    queue = NeighborQueue(6, 4)
    queue.push(numbers(1, 4).expand(6, 4), torch.arange(6))
    indices, _ = queue.lookup(numbers(2, 4), torch.tensor([0, 9]))
    assert indices.tolist() == [[1], [0]]


def test_own_sample_is_excluded_unless_asked_for() -> None:
    queue = filled()
    queries, ids = queue.embeddings.clone(), torch.arange(8)
    own, similarities = queue.lookup(queries, ids, exclude_own=False)
    assert own[:, 0].tolist() == ids.tolist()
    torch.testing.assert_close(similarities, torch.ones(8, 1))
    other, _ = queue.lookup(queries, ids)
    assert not (other[:, 0] == ids).any()
    everything = queue.lookup(queries, ids, topk=8)
    assert everything[1].min(dim=1).values.tolist() == [-1.0] * 8


def test_lookup_among_a_label() -> None:
    queue = filled()
    labels = torch.tensor([2, 0])
    indices, similarities = queue.lookup(
        numbers(2, 4, seed=1), torch.tensor([99, 99]), topk=8, labels=labels
    )
    # rows 2 and 5 hold label 2, rows 0, 3 and 6 label 0; the others follow, below -1
    assert sorted(indices[0, :2].tolist()) == [2, 5]
    assert sorted(indices[1, :3].tolist()) == [0, 3, 6]
    assert (similarities > -1).sum(dim=1).tolist() == [2, 3]


def test_queue_state_comes_back() -> None:
    queue, again = filled(), NeighborQueue(8, 4)
    queue.push(numbers(3, 4, seed=2), torch.arange(3) + 70)
    again.load_state_dict(queue.state_dict())
    for one in (queue, again):
        one.push(numbers(3, 4, seed=3), torch.arange(3) + 80)
    for name, value in queue.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_age_counts_entries_written_since() -> None:
    queue = NeighborQueue(5, 3)
    queue.push(numbers(7, 3), torch.arange(7))
    queue.push(numbers(2, 3), torch.tensor([50, 51]))
    newest_first = queue.ids[queue.age(torch.arange(5)).argsort()]
    assert newest_first.tolist() == [51, 50, 6, 5, 4]
    assert sorted(queue.age(torch.arange(5)).tolist()) == [1, 2, 3, 4, 5]


# ------------------------------------------------------------------------------------------ head

IDS = torch.arange(100, 106)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def make_head(seed: int = 0) -> NNCLRHead:
    torch.manual_seed(seed)
    head = NNCLRHead(8, hidden_dim=16, predictor_dim=12, out_dim=4, queue_size=24)
    head.queue.push(numbers(24, 4, seed=9), torch.arange(24), torch.arange(24) % 3)
    return head


def run(head: NNCLRHead, **settings: Any) -> HeadOutput:
    values = {"topk": 1, "temperature": 0.2, "labels": LABELS, **settings}
    return head(numbers(6, 8, seed=1), numbers(6, 8, seed=2), IDS, **values)


def parts(head: NNCLRHead) -> tuple[list[Tensor], list[Tensor]]:
    """Normalised projections and predictions of both views, without a change to the head."""
    frozen = copy.deepcopy(head)
    projected = [frozen.projector(numbers(6, 8, seed=seed)) for seed in (1, 2)]
    return [F.normalize(p, dim=1) for p in projected], [frozen.predictor(p) for p in projected]


def test_head_stage_finds_neighbours_by_the_online_projector() -> None:
    head = make_head()
    for parameter in head.target_projector.parameters():
        parameter.data.fill_(float("nan"))  # it must not be asked
    keys, predicted = parts(head)
    rows = [head.queue.lookup(key, IDS)[0][:, 0] for key in keys]
    neighbors = [head.queue.embeddings[row] for row in rows]
    output = run(head)
    expected = (
        nnclr_loss(predicted[0], neighbors[1], 0.2) + nnclr_loss(predicted[1], neighbors[0], 0.2)
    ) / 2
    torch.testing.assert_close(output.loss, expected)
    assert torch.equal(output.indices, torch.stack(rows))
    # lookups came before the push of view 0's projections
    torch.testing.assert_close(head.queue.embeddings[:6], keys[0].detach())
    assert head.queue.ids[:6].tolist() == IDS.tolist()
    assert head.queue.labels[:6].tolist() == LABELS.tolist()


def test_diagnostics() -> None:
    head = make_head()
    labels, ages = head.queue.labels.clone(), head.queue.age(torch.arange(24))
    keys, _ = parts(head)
    output = run(head)
    assert output.neighbor_accuracy.item() == pytest.approx(
        (labels[output.indices[0]] == LABELS).float().mean().item()
    )
    similarities = [NeighborQueue.lookup(make_head().queue, key, IDS)[1].mean() for key in keys]
    assert output.neighbor_similarity.item() == pytest.approx(float(sum(similarities) / 2))
    assert output.queue_age.item() == pytest.approx(ages[output.indices].float().mean().item() / 24)
    assert run(head, labels=None).neighbor_accuracy is None


def test_draws_choose_among_the_nearest() -> None:
    keys, _ = parts(make_head())
    nearest = torch.stack([make_head().queue.lookup(key, IDS, topk=4)[0] for key in keys])
    draws = torch.tensor([[0.0, 0.24, 0.26, 0.5, 0.75, 1 - 2**-24]] * 2)
    output = run(make_head(), topk=4, draws=draws)
    for rank, sample in zip((0, 0, 1, 2, 3, 3), range(6), strict=True):
        assert torch.equal(output.indices[:, sample], nearest[:, sample, rank])
    with pytest.raises(ValueError, match=r"top 4 needs draws"):
        run(make_head(), topk=4)


def test_oracle_draws_among_its_own_label_only() -> None:
    head = make_head()
    labels = head.queue.labels.clone()
    draws = torch.full((2, 6), 0.999)
    output = run(head, positive="oracle", topk=20, draws=draws)
    assert (labels[output.indices] == LABELS).all()
    assert output.neighbor_accuracy.item() == 1.0
    with pytest.raises(ValueError, match="'oracle' needs labels"):
        run(head, positive="oracle", labels=None)


@pytest.mark.parametrize("use_target", [False, True])
def test_no_queue_takes_the_other_views_online_projection(use_target: bool) -> None:
    """With gradient through it, whatever fills the queue."""
    head, other = make_head(), make_head()
    projected = [other.projector(numbers(6, 8, seed=seed)) for seed in (1, 2)]
    predicted = [other.predictor(p) for p in projected]
    keys = [F.normalize(p, dim=1) for p in projected]
    expected = (nnclr_loss(predicted[0], keys[1], 0.2) + nnclr_loss(predicted[1], keys[0], 0.2)) / 2
    output = run(head, positive="no_queue", use_target=use_target)
    torch.testing.assert_close(output.loss, expected)
    assert output.indices is None
    expected.backward()
    output.loss.backward()
    for name in ("projector.0.weight", "predictor.3.weight"):
        torch.testing.assert_close(head.get_parameter(name).grad, other.get_parameter(name).grad)


def test_no_swap_takes_the_same_views_neighbour() -> None:
    head = make_head()
    keys, predicted = parts(head)
    neighbors = [head.queue.embeddings[head.queue.lookup(key, IDS)[0][:, 0]] for key in keys]
    expected = sum(nnclr_loss(predicted[i], neighbors[i], 0.2) for i in (0, 1)) / 2
    torch.testing.assert_close(run(head, positive="no_swap").loss, expected)


def test_tuning_finds_neighbours_and_fills_the_queue_by_the_target() -> None:
    head = make_head()
    with torch.no_grad():
        for parameter in head.target_projector.parameters():
            parameter.copy_(numbers(*parameter.shape, seed=parameter.numel()))
    target = copy.deepcopy(head.target_projector)
    key = F.normalize(target(numbers(6, 8, seed=1)), dim=1)
    rows = head.queue.lookup(key, IDS)[0][:, 0]
    output = run(head, use_target=True)
    assert torch.equal(output.indices[0], rows)
    torch.testing.assert_close(head.queue.embeddings[:6], key)
    output.loss.backward()
    assert all(p.grad is None for p in head.target_projector.parameters())
    assert all(p.grad is not None for p in head.projector.parameters())


def test_views_have_their_own_batch_statistics() -> None:
    head = make_head()
    views = numbers(6, 8, seed=1), numbers(6, 8, seed=2)
    shifted = head(views[0], views[1] + 100.0, IDS, topk=1, temperature=0.2)
    assert shifted.loss.item() == pytest.approx(run(make_head()).loss.item(), rel=1e-4)


def test_target_projector_shares_no_storage_and_lags_behind() -> None:
    head = make_head()
    before = head.target_projector[0].weight.clone()
    optimizer = adamw(parameter_groups(head.named_parameters(), 0.0), lr=0.1)
    run(head, use_target=True).loss.backward()
    optimizer.step()
    assert torch.equal(head.target_projector[0].weight, before)
    head.update_target(0.9)
    online = head.projector[0].weight
    torch.testing.assert_close(head.target_projector[0].weight, 0.9 * before + 0.1 * online)
    assert torch.equal(head.target_projector[1].running_var, head.projector[1].running_var)
    head.reset_target()
    assert torch.equal(head.target_projector[0].weight, online)


def test_loading_a_checkpoint_keeps_the_average() -> None:
    head = make_head()
    with torch.no_grad():
        head.target_projector[0].weight.add_(1.0)
    again = make_head(seed=1)
    again.load_state_dict(head.state_dict())
    assert torch.equal(again.target_projector[0].weight, head.target_projector[0].weight)
    assert not torch.equal(again.target_projector[0].weight, again.projector[0].weight)
    assert run(again, use_target=True).loss == run(head, use_target=True).loss


def test_double_precision_agrees_with_single() -> None:
    single = run(make_head())
    views = numbers(6, 8, seed=1).double(), numbers(6, 8, seed=2).double()
    head = make_head().double()
    double = head(*views, IDS, topk=1, temperature=0.2)
    assert double.loss.dtype == head.queue.embeddings.dtype == torch.float64
    assert single.loss.item() == pytest.approx(double.loss.item(), rel=1e-5)
    for positive in ("no_queue", "no_swap"):
        assert head(*views, IDS, topk=1, temperature=0.2, positive=positive).loss.isfinite()


def test_bfloat16_autocast_keeps_lookups_in_full_precision() -> None:
    queue = filled(64, 16)
    queries, ids = numbers(8, 16, seed=1), torch.full((8,), 99)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        indices, similarities = queue.lookup(queries, ids, topk=3)
        loss = run(make_head()).loss
    exact = queue.lookup(queries, ids, topk=3)
    assert torch.equal(indices, exact[0])
    assert torch.equal(similarities, exact[1])
    assert loss.dtype == torch.float32
