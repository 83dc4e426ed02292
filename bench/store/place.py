"""Where a store is: in a folder, or in a bucket of an object store."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

from bench.errors import UserError, short
from bench.store.store import Store


def open_store(place: Path | str) -> Store:
    """Return the store in a folder or at a URL. Raises `UserError` where it cannot be opened."""
    scheme, mark, rest = str(place).partition("://")
    if isinstance(place, Path) or not mark:
        return Store(Path(place))
    if scheme == "file" and rest.startswith("/"):
        return Store(Path(unquote(rest)))
    if scheme not in ("s3", "gs") or not rest.partition("/")[0]:
        known = "a folder, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or file:///FOLDER"
        raise UserError(f"'{short(str(place))}' is no place of a store; one is {known}")
    from bench.store.objects import ObjectStore  # its client takes a while to import

    return ObjectStore(place)
