"""One encoded image -> RGB pixels, and what was wrong or unusual with it."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Inspection:
    """What one read of an encoded image found; `reason` says why it cannot be used, if so."""

    sha256: bytes
    height: int = 0
    width: int = 0
    #: "RGB", or what it is converted from
    kind: str = ""
    reason: str = ""


def decode(data: bytes) -> tuple[np.ndarray, str]:
    """Return pixels uint8 [h, w, 3] and the kind of image they were converted from.

    16-bit values keep their upper 8 bits; transparency is dropped; palettes and CMYK are
    converted by Pillow; orientation tags are not applied and animations give their first frame,
    as in torchvision's `ImageFolder`. Raises ValueError saying what is wrong.
    """
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise ValueError("empty file")
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _rgb(image, data)
    except UnidentifiedImageError:
        raise ValueError("not an image") from None
    except Image.DecompressionBombError:
        raise ValueError("larger than Pillow opens safely") from None
    except Exception as error:  # a damaged file can make a decoder raise anything
        raise ValueError(str(error) or type(error).__name__) from None


def _rgb(image: Image, data: bytes) -> tuple[np.ndarray, str]:
    kind = image.mode
    if kind == "F":
        raise ValueError("32-bit float image, of no known range")
    if kind.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        grey = (values >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2), "16-bit grey"
    if image.format == "PNG" and data[24:25] == b"\x10" and kind in ("RGB", "RGBA"):
        kind = f"16-bit {kind}"  # Pillow keeps the upper 8 bits
    return np.array(image if image.mode == "RGB" else image.convert("RGB")), kind


def inspect(data: bytes) -> Inspection:
    """Decode an image once to know whether it can be used."""
    digest = hashlib.sha256(data).digest()
    try:
        pixels, kind = decode(data)
    except ValueError as error:
        return Inspection(digest, reason=str(error))
    return Inspection(digest, pixels.shape[0], pixels.shape[1], kind)
