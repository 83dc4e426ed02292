"""The devices that a run is given: used or told why not, held by whom, and for how long."""

from __future__ import annotations

import pytest
import torch

from bench.errors import MachineError
from bench.run import worker
from bench.store.store import Store


@pytest.mark.parametrize(
    ("cuda", "built"), [("13.2", "for CUDA 13.2"), (None, "for CPUs only")], ids=["driver", "wheel"]
)
def test_a_gpu_that_torch_cannot_use_is_an_error(
    cuda: str | None, built: str, store: Store, monkeypatch: pytest.MonkeyPatch
):
    """As where the driver is older than the wheel needs: Ray counts the GPU all the same."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(worker, "driver_version", lambda: "535.104")
    with pytest.raises(MachineError) as told:
        worker.serve(lambda: None, lambda event: None, store, "run", 1.0)
    assert f"torch {torch.__version__} is built {built}, the driver is 535.104 on " in str(
        told.value
    )
    assert "with --cpu, or install a torch that is built for this driver" in str(told.value)
    assert "\n" not in str(told.value)


def test_a_worker_without_a_gpu_computes_on_the_cpu(store: Store, monkeypatch: pytest.MonkeyPatch):
    """Also where torch sees one: `--cpu` holds none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    worker.serve(lambda: None, lambda event: None, store, "run", 0.0)
    assert worker._device(0.0) == torch.device("cpu")
