"""Multinomial logistic regression with an L2 penalty, several problems together.

Truncated Newton: directions by preconditioned conjugate gradients in float32, objective, gradient
and line search in float64, so the answer has double precision and most of the work is single.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from maect.finite import require_finite

if TYPE_CHECKING:
    from torch import Tensor

#: the largest share of the model's decrease that one more step of conjugate gradients may still
#: bring, times the steps taken so far (Nash and Sofer 1990, "Assessing a search direction")
_CG_SHARE = 0.2
_CG_STEPS = 500
_NEWTON_STEPS = 100
_ARMIJO = 1e-4
_SHORTEST_STEP = 1e-8
#: keeps a problem that is solved exactly from dividing 0 by 0
_TINY = 1e-30
#: numbers of a matrix above which batched products do not pay on CPUs
_LARGE = 2**13


class Regression(NamedTuple):
    weight: Tensor  # [P, C, D] float64
    objective: Tensor  # [P] float64
    converged: bool


def fit_logistic(x: Tensor, y: Tensor, classes: int, l2: float, tol: float = 1e-5) -> Regression:
    """Minimise sum_i cross_entropy(W x_i, y_i) + l2 / 2 |W|^2 for each of P problems.

    x [P, n, D], y [P, n] int64; a problem with fewer than n images is filled up with rows of
    zeros and class -1. No intercept. Ends for a problem when the Newton model says that the step
    just taken gained at most `tol` of the objective: the optimum is then nearer still, as the
    method converges faster than linearly. scikit-learn's `C` is 1 / l2.
    """
    import torch

    x = x.double()
    problems, n, dim = x.shape
    # the solution lies in the span of the rows; there the Gram matrix is diagonal
    if n < dim:
        basis = torch.linalg.svd(x, full_matrices=False).Vh
    else:
        basis = torch.linalg.eigh(_product(x.mT, x)).eigenvectors.mT
    x = _product(x, basis.mT.contiguous())  # [P, n, r]
    x_low, energy = x.float(), x.square().sum(1, keepdim=True)  # [P, 1, r]
    real = (y >= 0).double()[:, None]  # [P, 1, n]
    target = x.new_zeros(problems, classes, n).scatter_(1, y[:, None].clamp_min(0), real)
    weight = x.new_zeros(problems, classes, x.shape[2])
    logits = x.new_zeros(problems, classes, n)
    objective = _objective(logits, target, real, weight, l2)
    active = torch.ones_like(objective, dtype=torch.bool)
    for _ in range(_NEWTON_STEPS):
        probability = logits.softmax(1) * real
        gradient = _product(probability - target, x) + l2 * weight
        direction = _direction(x_low, energy, probability, gradient, l2)
        slope = _dot(gradient, direction)
        along = _product(direction, x.mT)
        step = active.double()
        while True:
            scale = step[:, None, None]
            trial = (logits + scale * along, weight + scale * direction)
            value = _objective(trial[0], target, real, trial[1], l2)
            long = (value > objective + _ARMIJO * step * slope) & (step > _SHORTEST_STEP)
            if not bool(long.any()):
                break
            step = torch.where(long, step / 2, step)
        # a step that rounding alone makes fail ends its problem
        active = active & (-slope / 2 > tol * objective) & (step > _SHORTEST_STEP)
        logits, weight = trial
        objective = value
        if not bool(active.any()):
            break
    require_finite("the objectives of the regression", objective)
    return Regression(_product(weight, basis), objective, not bool(active.any()))


def _direction(
    x: Tensor, energy: Tensor, probability: Tensor, gradient: Tensor, l2: float
) -> Tensor:
    """Return the Newton direction by conjugate gradients in float32: [P, C, r] float64.

    Preconditioned by the Hessian that equal curvature of all images and classes would give, which
    is diagonal in the basis of `x` [P, n, r].
    """
    import torch

    spread = (probability * (1 - probability)).sum((1, 2), keepdim=True)
    curvature = spread / probability.sum((1, 2), keepdim=True) / probability.shape[1]
    inverse = (1.0 / (curvature * energy + l2)).float()
    probability = probability.float()
    residual = -gradient.float()
    result = torch.zeros_like(residual)
    search = scaled = residual * inverse
    product = _dot(residual, scaled)
    total, active = torch.zeros_like(product), product > 0
    across = x.mT if len(x) == 1 else x.mT.contiguous()
    for count in range(1, _CG_STEPS + 1):
        change = probability * _product(search, across)
        change = torch.addcmul(change, probability, change.sum(1, keepdim=True), value=-1)
        curved = _product(change, x).add_(search, alpha=l2)
        length = product / _dot(search, curved).clamp_min(_TINY) * active
        long = length[:, None, None]
        result = torch.addcmul(result, long, search)
        residual = torch.addcmul(residual, long, curved, value=-1)
        gain = length * product
        total = total + gain
        active = gain * count > _CG_SHARE * total
        if not active.any():
            break
        scaled = residual * inverse
        product, last = _dot(residual, scaled), product
        search = torch.addcmul(scaled, (product / last.clamp_min(_TINY))[:, None, None], search)
    return result.double()


def _objective(logits: Tensor, target: Tensor, real: Tensor, weight: Tensor, l2: float) -> Tensor:
    """[P, C, n], [P, C, n], [P, 1, n], [P, C, r] -> [P]."""
    fit = _dot(logits.logsumexp(1, keepdim=True), real) - _dot(logits, target)
    return fit + l2 / 2 * weight.square().sum((1, 2))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of products of each problem: two of [P, a, b] -> [P]."""
    return (a * b).sum((1, 2))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return batched matrix products; on CPUs, large ones are much faster one by one."""
    import torch

    if a.device.type == "cpu" and (len(a) == 1 or b[0].numel() > _LARGE):
        return torch.stack([one @ other for one, other in zip(a, b, strict=True)])
    return torch.bmm(a, b)
