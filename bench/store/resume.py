"""Checkpoints of a running stage: written aside, whole or not at all, the last few kept.

    stages/<key>/checkpoints/<code>/<step>.safetensors
    stages/<key>/checkpoints/<code>/<step>.json          written last: checksum, curves

A state that a crash cut short lacks its JSON file or does not fit its checksum, and the one
before it is used. They go when the stage is complete.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from pathlib import Path

from safetensors.torch import load_file, save

from bench.store.files import write_atomic, write_json
from bench.store.store import Store
from maect.files import sha256
from maect.stages.job import State

#: seconds between two checkpoints
EVERY_S = 30.0
KEPT = 2


class StageCheckpoints:
    """The checkpoints of one stage under one version of its code."""

    def __init__(self, store: Store, key: str, code: str) -> None:
        self.folder = store.checkpoints(key) / code
        self._last = time.monotonic()
        self._writer: threading.Thread | None = None

    def load(self) -> State | None:
        for note in reversed(self._notes()):
            try:
                entry = json.loads(note.read_text(encoding="utf-8"))
                tensors = note.with_suffix(".safetensors")
                if sha256(tensors) == entry["sha256"]:
                    return State(entry["step"], load_file(tensors), entry["curves"])
            except (OSError, ValueError, KeyError):
                continue
        return None

    def _notes(self) -> list[Path]:
        """Of whole checkpoints, oldest first."""
        found = [p for p in self.folder.glob("*.json") if p.stem.isdigit()]
        return sorted(found, key=lambda path: int(path.stem))

    def due(self) -> bool:
        return time.monotonic() - self._last >= EVERY_S and not self._writing()

    def _writing(self) -> bool:
        return self._writer is not None and self._writer.is_alive()

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
        entry = {
            "step": state.step,
            "sha256": hashlib.sha256(data).hexdigest(),
            "curves": state.curves,
        }
        write_json(path.with_suffix(".json"), entry)
        for note in self._notes()[:-KEPT]:
            note.unlink(missing_ok=True)
            note.with_suffix(".safetensors").unlink(missing_ok=True)
