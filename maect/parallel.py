"""One global batch over several workers, so that its result does not depend on their number.

The batch is cut into pieces. A worker computes the gradients of its pieces' share of the *global*
loss; the sum over all pieces is the global gradient. With one logical shard (`fast`) every worker
has one piece, and the order of summation follows the number of workers. With S shards (`exact`)
there are S pieces on any number of workers, and their gradients are summed in one fixed binary
tree: the sums are bitwise equal for every number of workers that divides S.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from threadpoolctl import threadpool_info
from torch import Tensor, nn


def make_deterministic(threads: int, *, tf32: bool = False) -> None:
    """Make this process compute the same bits whenever it is given the same, on CPU or GPU."""
    torch.set_num_threads(threads)
    # cuBLAS repeats its sums with a workspace of fixed size only; read when a GPU is first used
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # a guard against reads of unset memory, at 4 % of a small step
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_tf32 = tf32


#: gradients that are summed over workers together: fewer calls cost less, more begin earlier
_BUCKET_BYTES = 25 << 20
#: what takes kernels from numpy, which reads it when it is imported
_NUMPY = "NPY_DISABLE_CPU_FEATURES"
#: what `mkl_cbwr_get` answers
_MKL_AUTO, _MKL_AVX2 = 2, 10


def require_avx2(*, intel: bool) -> None:
    """Raise RuntimeError unless torch, MKL, numpy and OpenBLAS compute with AVX2 instructions.

    Asks the libraries themselves, but for oneDNN, which cannot be asked: its variable is looked at.
    On processors that are not `intel`, MKL is documented to choose a branch by itself (AUTO), one
    whose results repeat. An OPENBLAS_CORETYPE of the user's own is kept, and stands in the record.
    """
    blas = threadpool_info() if os.environ.get("OPENBLAS_CORETYPE") == "Haswell" else []
    found = {
        "torch": torch.backends.cpu.get_cpu_capability(),
        "oneDNN": os.environ.get("ONEDNN_MAX_CPU_ISA"),
        "numpy": "AVX-512" if _numpy_has_avx512() else "AVX2",
        **{one["prefix"]: one["architecture"] for one in blas if "architecture" in one},
    }
    wrong = {name: isa for name, isa in found.items() if isa not in ("AVX2", "Haswell")}
    mkl = _mkl_branch()
    if mkl not in (None, _MKL_AVX2 if intel else _MKL_AUTO):
        wrong["MKL"] = f"branch {mkl}"
    if wrong:
        told = ", ".join(f"{name}: {isa}" for name, isa in wrong.items())
        raise RuntimeError(
            f"numerics.isa is avx2, but not all libraries compute with it ({told}). Unset "
            "ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA, MKL_CBWR and NPY_DISABLE_CPU_FEATURES; where "
            "something imports numpy before bench does, as plugins of pytest do, set the last one "
            f"beforehand: export {_NUMPY}='{os.environ.get(_NUMPY, '')}'"
        )


def _numpy_has_avx512() -> bool:
    """Return whether numpy chooses kernels beyond AVX2."""
    inside = np._core._multiarray_umath  # type: ignore[attr-defined]
    beyond = [n for n in inside.__cpu_dispatch__ if n.startswith(("AVX512", "X86_V4"))]
    return any(inside.__cpu_features__[name] for name in beyond)


def _mkl_branch() -> int | None:
    """Return the branch that MKL takes for reproducible results; None if torch has no MKL."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        ask = ctypes.CDLL(str(library)).mkl_serv_cbwr_get
    except (OSError, AttributeError):
        return None
    return int(ask(1))


class Group:
    """The workers of a stage: this process alone, or all of the default process group.

    Raises ValueError where the logical shards cannot be dealt to the workers equally.
    """

    def __init__(self, shards: int = 1) -> None:
        joined = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if joined else 0
        self.size = dist.get_world_size() if joined else 1
        self.shards = shards
        if shards > 1 and shards % self.size:
            raise ValueError(f"{shards} logical shards cannot be dealt to {self.size} workers")

    def pieces(self, batch: int, *, uneven: bool = False) -> list[slice]:
        """Return this worker's pieces of a global batch, in order.

        Raises ValueError where the pieces would not be equal, unless they may be `uneven`; then
        they differ by one image at most, and some are empty if there are fewer images than pieces.
        """
        count = max(self.shards, self.size)
        if batch % count and not uneven:
            raise ValueError(f"a batch of {batch} cannot be cut into {count} equal pieces")
        ends = [batch * i // count for i in range(count + 1)]
        own = count // self.size
        first = self.rank * own
        return [slice(ends[i], ends[i + 1]) for i in range(first, first + own)]

    def dealt(self, count: int, size: int) -> list[slice]:
        """Return the slices that this worker computes of what is `shared`, in order; the last one
        again where the others have one more."""
        starts = range(0, count, size)
        turns = range(self.rank, len(starts) + self.rank, self.size)
        own = [starts[min(turn, len(starts) - 1)] for turn in turns]
        return [slice(start, min(start + size, count)) for start in own]

    def shared(self, count: int, size: int, compute: Callable[[slice], Tensor]) -> Iterator[Tensor]:
        """Yield `compute(rows)` for consecutive slices of at most `size` of `count` rows, in order.

        Each worker computes its share of the slices; every worker gets all results [rows, ...].
        The slices do not depend on the number of workers, and so neither do the results.
        """
        starts = range(0, count, size)
        for turn, rows in enumerate(self.dealt(count, size)):
            found = compute(rows)
            if self.size == 1:
                yield found
                continue
            room = found.new_zeros(size, *found.shape[1:])
            room[: len(found)] = found
            together = zip(starts[turn * self.size :], self.gather(room).split(size), strict=False)
            for own, part in together:
                yield part[: count - own]

    def gather(self, local: Tensor) -> Tensor:
        """Return the rows of all workers in the order of the global batch: [b, ...] -> [B, ...]."""
        if self.size == 1:
            return local
        parts = [torch.empty_like(local) for _ in range(self.size)]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    def share(self, value: Any) -> Any:
        """Return the first worker's value on every worker, once all have come here."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        dist.barrier()
        return box[0]

    def share_tensors(self, tensors: Mapping[str, Tensor], device: Any) -> Mapping[str, Tensor]:
        """Return the first worker's tensors on every worker; of the others they may be missing."""
        if self.size == 1:
            return tensors
        kinds = self.share({name: (one.shape, one.dtype) for name, one in tensors.items()})
        found = {}
        for name, (shape, dtype) in kinds.items():
            own = tensors[name].to(device) if self.rank == 0 else None
            found[name] = torch.empty(shape, dtype=dtype, device=device) if own is None else own
            dist.broadcast(found[name], src=0)
        return found

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Make `tensors` those of the first worker, in place."""
        if self.size > 1:
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            dist.broadcast(flat, src=0)
            _unflatten(flat, tensors)


class GradientSum:
    """Adds up the gradients of a worker's pieces and of all workers.

    After each piece's backward passes, `passes` of them, call `add`; after the last piece `finish`
    leaves the global sum in `parameter.grad`. Parameters must all take part in every pass.

    Of several workers with one piece each (`fast`), gradients are summed in buckets, while the
    backward pass computes the others. A bucket is sent after the one before it, so that all workers
    send them in the same order.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], group: Group, *, passes: int = 1
    ) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.group = group
        self.alone = group.size == 1 and group.shards == 1
        self._tree: list[tuple[int, Tensor]] = []
        self._passes = passes
        self._buckets: list[list[nn.Parameter]] = []
        #: of each bucket, the gradients that its passes have yet to give
        self._missing: list[int] = []
        self._sent: list[tuple[Tensor, Any]] = []
        if group.size > 1 and group.shards == 1:
            self._buckets = _buckets(self.parameters)
            for index, bucket in enumerate(self._buckets):
                for parameter in bucket:
                    parameter.register_post_accumulate_grad_hook(partial(self._arrived, index))

    def start(self) -> None:
        """Forget the gradients of the step before."""
        self._tree.clear()
        self._sent.clear()
        self._missing = [self._passes * len(bucket) for bucket in self._buckets]
        for parameter in self.parameters:
            parameter.grad = None

    def add(self) -> None:
        """Take the gradients of the piece that was just back-propagated."""
        if self.alone or self._buckets:
            return
        self._push(0, torch.cat([_gradient(p).reshape(-1) for p in self.parameters]))
        for parameter in self.parameters:
            parameter.grad = None

    def finish(self) -> None:
        """Leave the sum over all pieces of all workers in the gradients."""
        if self.alone:
            return
        if self._buckets:
            self._send(len(self._buckets))  # what no backward pass has come to, too
            for bucket, (total, work) in zip(self._buckets, self._sent, strict=True):
                work.wait()
                _unflatten(total, [_gradient(p) for p in bucket])
            return
        ((level, total),) = self._tree
        if self.group.size > 1:
            total = self._sum_of_workers(level, total)
        for parameter in self.parameters:
            parameter.grad = torch.empty_like(parameter)
        _unflatten(total, [_gradient(p) for p in self.parameters])
        self._tree.clear()

    def _arrived(self, index: int, _: Tensor) -> None:
        """Count a gradient of a bucket; send the buckets that are whole."""
        self._missing[index] -= 1
        end = len(self._sent)
        while end < len(self._buckets) and not self._missing[end]:
            end += 1
        self._send(end)

    def _send(self, end: int) -> None:
        """Begin to sum the buckets before number `end` that are not sent yet."""
        for bucket in self._buckets[len(self._sent) : end]:
            flat = torch.cat([_gradient(p).reshape(-1) for p in bucket])
            self._sent.append((flat, dist.all_reduce(flat, async_op=True)))

    def _sum_of_workers(self, level: int, own: Tensor) -> Tensor:
        """Return the sum [n] of all workers' sums, which stand at a level of the tree.

        Each worker adds one slice of all, so that the memory does not grow with their number.
        """
        size, length = self.group.size, len(own)
        whole = torch.nn.functional.pad(own, (0, -length % size))
        slices = torch.empty_like(whole)
        dist.all_to_all_single(slices, whole)
        self._tree.clear()
        for part in slices.view(size, -1):
            self._push(level, part)
        ((_, total),) = self._tree
        dist.all_gather_into_tensor(whole, total)
        return whole[:length]

    def _push(self, level: int, value: Tensor) -> None:
        """Merge equal levels as they meet: a binary tree over the pieces in their order."""
        while self._tree and self._tree[-1][0] == level:
            value = self._tree.pop()[1] + value
            level += 1
        self._tree.append((level, value))


def _buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Return the parameters by the bytes of a bucket, the last first, as gradients come."""
    buckets: list[list[nn.Parameter]] = []
    size = _BUCKET_BYTES
    for parameter in reversed(parameters):
        if size >= _BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.nbytes
    return buckets


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


@torch.no_grad()
def _unflatten(flat: Tensor, targets: Sequence[Tensor]) -> None:
    """Write the numbers of `flat` into `targets`, one after the other."""
    parts = flat.split([target.numel() for target in targets])
    shaped = [part.view_as(target) for target, part in zip(targets, parts, strict=True)]
    torch._foreach_copy_(list(targets), shaped)
