"""The objects of a bucket below a prefix; what goes wrong is told in a sentence."""

from __future__ import annotations

import configparser
import os
from collections.abc import Iterator
from configparser import ConfigParser
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

from bench.errors import MachineError, UserError

#: seconds for which the first request is tried, and later ones
FIRST_S, PATIENCE_S = 8.0, 120.0
#: bytes of a part; what has no more is put in one request, and its ETag is most often its MD5
PART = 64 * 2**20
#: variables that name another server than Amazon's
_ADDRESSES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
#: what servers and the client say -> what to tell
_KNOWN = {
    "NoSuchBucket": "there is no such bucket",
    "InvalidAccessKeyId": "the credentials are not known there",
    "SignatureDoesNotMatch": "the credentials are not known there",
    "ExpiredToken": "the credentials have expired",
    "AccessDenied": "the credentials do not allow it",
    "403 Forbidden": "the credentials do not allow it",
    "401 Unauthorized": "the credentials are not known there",
}
#: words of it where no credentials are set: it asks the machine for some
_NONE = ("/latest/api/token", "/latest/meta-data", "/computeMetadata/", "Missing ")


class StoreGone(UserError, MachineError):
    """A store cannot be reached, or does not let us in: at the start of a command a mistake of its
    user, while a run goes on what ends it."""


#: what tells one content of an object from another: its ETag, its version
Mark = dict[str, str]


class Seen(NamedTuple):
    """What a listing tells of an object."""

    bytes: int
    modified: datetime
    mark: Mark

    @property
    def tag(self) -> str:
        """Return its ETag: the MD5 of its content, or something else."""
        return self.mark.get("e_tag", "").strip('"')


class Objects:
    """The objects below the prefix of a URL, by their names from there on.

    Every call raises `StoreGone` where the bucket cannot be used; it is tried again for a while
    where it cannot be reached.
    """

    def __init__(self, url: str, *, patient: bool = True) -> None:
        self.url = url
        #: whether the last request was answered; whoever was silent is given little time
        self.answers = False
        told = os.environ.get("MAECT_STORE_PATIENCE_S", "")
        patience_s = float(told) if told.replace(".", "", 1).isdigit() else PATIENCE_S
        with self._told():
            self._short = self._long = self._client(FIRST_S, FIRST_S)
            if patient:
                self._long = self._client(patience_s, max(patience_s, 30.0))
        self.answers = False

    def _client(self, patience_s: float, request_s: float) -> Any:
        config: Any = _profile() if self.url.startswith("s3://") else None
        return obstore.store.from_url(
            self.url,
            config=config,
            client_options={
                "timeout": timedelta(seconds=request_s),
                # it is the person's own wish where the address says so
                "allow_http": any(os.environ.get(n, "").startswith("http://") for n in _ADDRESSES),
            },
            retry_config={
                "max_retries": 10_000,
                "retry_timeout": timedelta(seconds=min(patience_s, 10_000)),
                "backoff": {"max_backoff": timedelta(seconds=3)},
            },
        )

    @property
    def _objects(self) -> Any:
        return self._long if self.answers else self._short

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Raise `StoreGone` for what the bucket or the way to it is to blame for."""
        try:
            yield
        except (FileNotFoundError, BaseError, ValueError) as error:
            text = str(error)
            ours = isinstance(error, FileNotFoundError | AlreadyExistsError | PreconditionError)
            if ours and "NoSuchBucket" not in text:
                self.answers = True
                raise
            self.answers = False
            why = next((told for said, told in _KNOWN.items() if said in text), None)
            if any(word in text for word in _NONE):
                why = "no credentials are set (for s3:// AWS_ACCESS_KEY_ID and others)"
            elif why is None:
                line = text.partition("\n")[0].partition("<?xml")[0].rstrip(" :")
                why = f"it cannot be reached: {line}"
            raise StoreGone(f"the store {self.url}: {why}; see docs/cluster.md") from None
        self.answers = True

    def get(self, name: str) -> bytes:
        """Return an object's content. Raises FileNotFoundError."""
        with self._told():
            return bytes(self._objects.get(name).bytes())

    def download(self, name: str, path: Path) -> None:
        """Write an object's content to a file of its own. Raises FileNotFoundError, OSError."""
        with path.open("xb") as file, self._told():
            for part in self._objects.get(name).stream(min_chunk_size=PART):
                file.write(part)

    def put(
        self, name: str, data: bytes | Path, *, over: Mark | None = None, new: bool = False
    ) -> Mark:
        """Put an object: over the one with the mark `over`, or if it is `new` where there is none.

        Return its mark. Raises AlreadyExistsError or PreconditionError of `obstore.exceptions`.
        """
        mode = over or ("create" if new else "overwrite")
        with self._told():
            return _mark(self._objects.put(name, data, mode=mode, chunk_size=PART))

    def head(self, name: str) -> Seen:
        """Return what is known of an object. Raises FileNotFoundError."""
        with self._told():
            return _seen(self._objects.head(name))

    def listing(self, prefix: str = "") -> dict[str, Seen]:
        """Return what lies below a folder, by name."""
        with self._told():
            pages = self._objects.list(prefix.strip("/") or None, chunk_size=1000)
            return {meta["path"]: _seen(meta) for page in pages for meta in page}

    def move(self, name: str, to: str) -> None:
        """Give an object another name; nothing happens where there is none."""
        with suppress(FileNotFoundError), self._told():
            self._objects.rename(name, to)

    def delete(self, names: list[str]) -> None:
        """Remove objects, if they are there."""
        with suppress(FileNotFoundError), self._told():
            self._objects.delete(names)


def _profile() -> dict[str, str]:
    """Return what the credentials file of AWS's own tools says, where the environment has none."""
    path = os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or os.path.expanduser("~/.aws/credentials")
    file = ConfigParser(interpolation=None)
    if "AWS_ACCESS_KEY_ID" not in os.environ:
        with suppress(configparser.Error, UnicodeDecodeError):
            file.read(path, encoding="utf-8")
    profile = os.environ.get("AWS_PROFILE", "default")
    known = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
    return {name: file[profile][name] for name in known if file.has_option(profile, name)}


def _seen(meta: Any) -> Seen:
    return Seen(meta["size"], meta["last_modified"], _mark(meta))


def _mark(meta: Any) -> Mark:
    return {name: meta[name] for name in ("e_tag", "version") if meta[name] is not None}
