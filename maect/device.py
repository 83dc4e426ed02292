"""Numbers on their way from the CPU to the device that computes with them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def moved(values: np.ndarray | Tensor, device: torch.device | str) -> Tensor:
    """Return numbers of the CPU on a device.

    On a GPU the call returns before they are there: they are copied from pinned memory, in the
    order of the device's work, and the CPU goes on with the next step meanwhile.
    """
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
