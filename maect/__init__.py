"""MAE-CT (arXiv 2304.10520) in PyTorch: models, losses, training stages, evaluations and data.

The names below are the public, stable API. They load on first use, so that `maect.settings`,
which the planner reads, costs no import of torch.
"""

import importlib
import importlib.metadata
from typing import Any

_NAMES = {
    "maect.losses": ("patchify", "mae_loss", "nnclr_loss"),
    "maect.heads": ("NeighborQueue", "NNCLRHead"),
    "maect.models": ("build_encoder", "sincos_positions"),
    "maect.weights": ("load_encoder", "save_encoder"),
    "maect.optim": ("layer_decay",),
}
_PUBLIC = {name: module for module, names in _NAMES.items() for name in names}
_MODULES = ("datasets", "evals")

__all__ = [*_PUBLIC, *_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"maect.{name}")
    if name == "__version__":
        return importlib.metadata.version("maect-bench")
    raise AttributeError(f"module 'maect' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
