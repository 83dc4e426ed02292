"""Where a store is: in a folder, in a bundle, or in a bucket of an object store."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

from bench.errors import UserError, short
from bench.store.store import Store


def open_store(place: Path | str) -> Store:
    """Return the store in a folder, in a bundle's file or at a URL.

    Raises `UserError` where it cannot be opened.
    """
    scheme, mark, rest = str(place).partition("://")
    if isinstance(place, Path) or not mark or (scheme == "file" and rest.startswith("/")):
        path = Path(unquote(rest) if mark and not isinstance(place, Path) else place)
        if not path.expanduser().is_file():
            return Store(path)
        from bench.store.bundle import Bundle

        return Bundle(path.expanduser())
    if scheme not in ("s3", "gs") or not rest.partition("/")[0]:
        known = "a folder, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or file:///FOLDER"
        raise UserError(f"'{short(str(place))}' is no place of a store; one is {known}")
    from bench.store.objects import ObjectStore  # its client takes a while to import

    return ObjectStore(place)
