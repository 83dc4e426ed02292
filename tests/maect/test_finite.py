"""What is not finite is found and named, at one wait for a GPU however many tensors there are."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from maect.finite import first_not_finite, is_finite


class Reads(TorchDispatchMode):
    """Counts what makes a CPU wait for a GPU: values, and copies between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_first_that_is_not_finite_is_named(bad: float):
    tensors = {"a": torch.ones(3, 2), "b": torch.tensor([1.0, bad, 2.0]), "c": torch.tensor(bad)}
    assert first_not_finite(tensors) == "b"
    assert is_finite(tensors["a"])
    assert not is_finite(tensors["b"])


def test_all_types_and_shapes_of_a_state_are_taken():
    found = {
        "ids": torch.tensor([2**60, -1]),
        "none": torch.empty(0, 4),
        "half": torch.full((2,), 3e38, dtype=torch.bfloat16),
        "large": torch.tensor([1.7e308, -1.7e308], dtype=torch.float64),
        "flag": torch.tensor(True),
    }
    assert first_not_finite(found) is None
    assert first_not_finite({}) is None


def test_a_gpu_is_waited_for_once():
    with Reads() as reads:
        assert first_not_finite({str(n): torch.ones(n + 1) for n in range(50)}) is None
    assert reads.calls["aminmax"] == 50
    assert reads.calls["_local_scalar_dense"] == 0
