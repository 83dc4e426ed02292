"""MAE pretraining (He et al. 2022, arXiv 2111.06377); `maect.stages.mae` trains it."""

from __future__ import annotations

from maect.methods.base import Method
from maect.settings import MAESettings

METHOD = Method("mae", MAESettings, part="pretraining", pipeline="mae", entry="maect.stages.mae")
