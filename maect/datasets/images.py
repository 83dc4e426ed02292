"""One encoded image -> RGB pixels, and what was wrong or unusual with it."""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import os
import stat
import threading
import warnings
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

#: where encoded bytes are: a file, and if they are a part of it the first byte and their number
Place = tuple[Path, int, int | None]
#: what is opened, by Pillow's names; others start programs (EPS) or are seldom tested
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP")
#: pixels of the largest picture that is decoded: where Pillow begins to warn
MAX_PIXELS = 2**28 // 3
#: bytes of the largest file that is read
MAX_BYTES = 2**29
#: of pictures with more pixels than this, one is decoded at a time
_LARGE = 2**24
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class Inspection:
    """What one read of an encoded image found; `reason` says why it cannot be used, if so."""

    sha256: bytes
    height: int = 0
    width: int = 0
    #: "RGB", or what it is converted from
    kind: str = ""
    reason: str = ""


def read_file(path: Path, first: int = 0, length: int | None = None) -> bytes:
    """Return a file's content, or `length` bytes of it from byte `first` on.

    Raises OSError, also for what is no file: a pipe, a device.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "is no regular file")
        size = status.st_size if length is None else length
        if size > MAX_BYTES:
            raise OSError(0, f"has {size:,} bytes, more than {MAX_BYTES:,}")
        file.seek(first)
        return file.read(size)


def decode(data: bytes, *, fast: bool = False) -> tuple[np.ndarray, str]:
    """Return pixels uint8 [h, w, 3] and the kind of image they were converted from.

    They are Pillow's; where `fast`, torchvision decodes the JPEGs of which it gives the same.

    16-bit values keep their upper 8 bits; transparency is dropped; palettes and CMYK are
    converted by Pillow; orientation tags are not applied and animations give their first frame,
    as in torchvision's `ImageFolder`. Raises ValueError saying what is wrong.
    """
    from PIL import Image, UnidentifiedImageError

    _quiet()
    if not data:
        raise ValueError("empty file")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            pixels = _claimed(image)
            if pixels <= MAX_PIXELS:
                with _one_at_a_time if pixels > _LARGE else nullcontext():
                    return _rgb(image, data, fast)
    except UnidentifiedImageError:
        raise ValueError(f"not an image of these formats: {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        pass
    except Exception as error:  # a damaged file can make a decoder raise anything
        raise ValueError(str(error) or type(error).__name__) from None
    raise ValueError(f"more than {MAX_PIXELS:,} pixels")


@functools.cache
def _quiet() -> None:
    """Keep warnings off the terminal: what cannot be used is told with its file's name.

    torchvision's says that a later version leaves decoding to TorchCodec; Pillow decodes then.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.|torchvision\.io")


def _claimed(image: Image) -> int:
    """Return how many pixels decoding would hold; a tile of a TIFF can exceed its picture."""
    width, height = image.size
    tags = getattr(image, "tag_v2", {})
    return max(width * height, int(tags.get(322, 0)) * int(tags.get(323, 0)))


def _rgb(image: Image, data: bytes, fast: bool) -> tuple[np.ndarray, str]:
    kind = image.mode
    if fast and image.format == "JPEG" and kind == "RGB" and _decoders_agree():
        with suppress(RuntimeError):  # what is wrong with it, Pillow says
            return _by_torchvision(data), kind
    if kind == "F":
        raise ValueError("32-bit float image, of no known range")
    if kind.startswith("I"):
        grey = (np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2), "16-bit grey"
    if image.format == "PNG" and data[24:25] == b"\x10" and kind in ("RGB", "RGBA"):
        kind = f"16-bit {kind}"  # Pillow keeps the upper 8 bits
    return np.array(image if image.mode == "RGB" else image.convert("RGB")), kind


def _by_torchvision(data: bytes) -> np.ndarray:
    """Return the pixels of a JPEG. Raises RuntimeError where it is damaged."""
    import torch
    from torchvision.io import decode_jpeg

    encoded = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
    return decode_jpeg(encoded).permute(1, 2, 0).numpy()


@functools.cache
def _decoders_agree() -> bool:
    """Return whether torchvision gives Pillow's pixels here: each brings a libjpeg of its own."""
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (61, 83, 3), np.uint8)
    for sampling, progressive in itertools.product((0, 1, 2), (False, True)):
        file = io.BytesIO()
        Image.fromarray(noise).resize((251, 187)).save(
            file, "JPEG", subsampling=sampling, progressive=progressive
        )
        try:
            found = _by_torchvision(file.getvalue())
        except (ImportError, OSError, RuntimeError):  # torchvision without its libraries
            return False
        if not np.array_equal(found, decode(file.getvalue())[0]):
            return False
    return True


def inspect(data: bytes) -> Inspection:
    """Decode an image once to know whether it can be used."""
    digest = hashlib.sha256(data).digest()
    try:
        pixels, kind = decode(data)
    except ValueError as error:
        return Inspection(digest, reason=str(error))
    return Inspection(digest, pixels.shape[0], pixels.shape[1], kind)
