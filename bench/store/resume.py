"""Checkpoints of a running stage: written aside, whole or not at all, the last few kept.

    stages/<key>/checkpoints/<code>/<step>.safetensors
    stages/<key>/checkpoints/<code>/<step>.json          written last: checksum, curves

A state that a crash cut short lacks its JSON file or does not fit its checksum, and the one
before it is used. They go when the stage is complete.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from pathlib import Path

from pydantic import BaseModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from bench.store.files import read_json, regular, write_atomic, write_json
from bench.store.record import Count, Curves
from bench.store.store import Store
from maect.files import sha256
from maect.stages.job import State

#: seconds between two checkpoints
EVERY_S = 30.0
KEPT = 2


class _Note(BaseModel):
    """What lies beside a state."""

    step: Count
    sha256: str
    curves: Curves


class StageCheckpoints:
    """The checkpoints of one stage under one version of its code."""

    def __init__(self, store: Store, key: str, code: str) -> None:
        self.folder = store.checkpoints(key) / code
        self._last = time.monotonic()
        self._writer: threading.Thread | None = None

    def load(self) -> State | None:
        """Return the newest whole state, or None."""
        for note in reversed(self._notes()):
            try:
                entry = _Note.model_validate(read_json(note))
                tensors = regular(note.with_suffix(".safetensors"))
                if sha256(tensors) == entry.sha256:
                    return State(entry.step, load_file(tensors), entry.curves)
            except (OSError, ValueError, SafetensorError):
                continue
        return None

    def _notes(self) -> list[Path]:
        """Return the notes beside whole states, oldest first."""
        found = [p for p in self.folder.glob("*.json") if re.fullmatch("[0-9]{1,15}", p.stem)]
        return sorted(found, key=lambda path: int(path.stem))

    def due(self) -> bool:
        """Return whether it is time for another checkpoint and the last one is written."""
        writing = self._writer is not None and self._writer.is_alive()
        return time.monotonic() - self._last >= EVERY_S and not writing

    def save(self, state: State) -> None:
        """Write in the background; the training goes on meanwhile."""
        self._last = time.monotonic()
        self._writer = threading.Thread(target=self._write, args=(state,), daemon=True)
        self._writer.start()

    def _write(self, state: State) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        data = save(state.tensors)
        path = self.folder / f"{state.step}.safetensors"
        write_atomic(path, data)
        checksum = hashlib.sha256(data).hexdigest()
        note = {"step": state.step, "sha256": checksum, "curves": state.curves}
        write_json(path.with_suffix(".json"), note)
        for old in self._notes()[:-KEPT]:
            old.unlink(missing_ok=True)
            old.with_suffix(".safetensors").unlink(missing_ok=True)
