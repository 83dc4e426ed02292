"""Memory of the CPU, and numbers on their way from it to the device that computes with them."""

from __future__ import annotations

import ctypes

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


def keep_freed_memory() -> None:
    """Let this process keep what it frees for its next step, up to half a GB.

    By default glibc gives it back to the system, and gets it again a moment later, page by page:
    up to a fifth of the time of a small step.
    """
    trim_threshold, mmap_threshold = -1, -3  # as malloc.h has them
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):  # musl and macOS have none
        library.mallopt(mmap_threshold, 32 << 20)
        library.mallopt(trim_threshold, 512 << 20)
