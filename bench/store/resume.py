"""Checkpoints of a running stage: written aside, whole or not at all, the last few kept.

    stages/<key>/checkpoints/<code>/<step>.safetensors
    stages/<key>/checkpoints/<code>/<step>.json          written last: checksum, curves

A state that a crash cut short lacks its JSON file or does not fit its checksum, and the one
before it is used. They go when the stage is complete.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from pydantic import BaseModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bench.errors import MachineError
from bench.store.files import read_json, regular, write_atomic, write_json
from bench.store.record import Count, Curves
from bench.store.store import Store
from maect.files import sha256
from maect.stages.job import State

#: seconds between two checkpoints at the least, and the share of the time that they may take from
#: the training
EVERY_S, SHARE = 60.0, 0.01
KEPT = 2
#: names of types in the safetensors format
_TYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}


class _Note(BaseModel):
    """What lies beside a state."""

    step: Count
    sha256: str
    curves: Curves


class StageCheckpoints:
    """The checkpoints of one stage under one version of its code."""

    def __init__(self, store: Store, key: str, code: str) -> None:
        self.store, self.folder = store, store.checkpoints(key) / code
        #: the attempt's folder: what it holds is made known with each checkpoint
        self.attempt: Path | None = None
        self.key = key
        #: the run that must have the stage's lease, where one must
        self.leased_to: str | None = None
        self._last = self._asked = time.monotonic()
        #: seconds that the training stood still for the last one
        self._stood_s = 0.0
        self._writer: threading.Thread | None = None

    def load(self) -> State | None:
        """Return the newest whole state, or None."""
        self.store.fetch_checkpoint(self.folder)
        for note in reversed(self._notes()):
            try:
                entry = _Note.model_validate(read_json(note))
                self.store.fetch_checkpoint(note.with_suffix(".safetensors"), entry.sha256)
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
        self._asked = time.monotonic()
        every_s = max(EVERY_S, self._stood_s / SHARE)
        return self._asked - self._last >= every_s and not writing

    def save(self, state: State) -> None:
        """Write in the background; the training goes on meanwhile."""
        self._writer = threading.Thread(target=self._write, args=(state,), daemon=True)
        self._writer.start()
        self._last = time.monotonic()
        self._stood_s = self._last - self._asked

    def save_now(self, state: State) -> None:
        """Write after what is being written. Raises OSError."""
        self.wait()
        self._write(state)

    def _ours(self) -> bool:
        """Return whether no other run has taken the stage's lease, as far as that can be seen."""
        with suppress(MachineError):
            run = self.leased_to
            return run is None or self.store.leases.still_ours(self.key, run)
        return True

    def _write(self, state: State) -> None:
        if not self._ours():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path, checksum = self.folder / f"{state.step}.safetensors", hashlib.sha256()

        def parts() -> Iterator[bytes | memoryview]:
            for part in _safetensors(state.tensors):
                checksum.update(part)
                yield part

        write_atomic(path, parts())
        note = {"step": state.step, "sha256": checksum.hexdigest(), "curves": state.curves}
        write_json(path.with_suffix(".json"), note)
        with suppress(MachineError):  # the next one may be known elsewhere again
            self.store.publish(path, path.with_suffix(".json"))
            if self.attempt is not None:
                self.store.publish(self.attempt)
            for old in self._notes()[:-KEPT]:
                self.store.discard(old, old.with_suffix(".safetensors"))

    def wait(self) -> None:
        """Wait until no checkpoint is being written."""
        if self._writer is not None:
            self._writer.join()


def _safetensors(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield the parts of a file in the safetensors format: https://huggingface.co/docs/safetensors.

    The library's own writer holds Python's lock for seconds, and the training would stand still.
    """
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        told = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = told | {"data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        yield tensor.reshape(-1).view(torch.uint8).numpy().data
