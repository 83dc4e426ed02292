"""The objects of a bucket below a prefix; what goes wrong is told in a sentence."""

from __future__ import annotations

import configparser
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

from bench.errors import MachineError, UserError

#: seconds for which the first request is tried, and later ones
FIRST_S, PATIENCE_S = 8.0, 120.0
#: bytes of a part; what has no more is put in one request, and its ETag is most often its MD5
PART = 64 * 2**20
#: what the client asks a machine or the environment for, where no credentials are set
_ASKED = ("/latest/api/token", "/latest/meta-data", "/computeMetadata/", "Missing ")
#: what servers and the client say -> what to tell
_KNOWN = {
    **dict.fromkeys(_ASKED, "no credentials are set (AWS_ACCESS_KEY_ID and others, or Google's)"),
    "NoSuchBucket": "there is no such bucket",
    "incorrectly configured region": "it is in another region; name that in AWS_REGION",
    "InvalidAccessKeyId": "the credentials are not known there",
    "SignatureDoesNotMatch": "the credentials are not known there",
    "401 Unauthorized": "the credentials are not known there",
    "ExpiredToken": "the credentials have expired",
    "AccessDenied": "the credentials do not allow it",
    "403 Forbidden": "the credentials do not allow it",
}
#: what is known of an object: `size`, `last_modified`, `e_tag`, `version`; a put tells the last two
Meta = Mapping[str, Any]


def put_s(meta: Meta) -> float:
    """Return when an object was put, in seconds since the epoch by the server's clock."""
    return float(meta["last_modified"].timestamp())


class StoreGone(UserError, MachineError):
    """A store cannot be reached, or does not let us in: at the start of a command a mistake of its
    user, while a run goes on what ends it."""


class Objects:
    """The objects below the prefix of a URL, by their names from there on.

    Every call raises `StoreGone` where the bucket cannot be used; it is tried again for a while
    where it cannot be reached.
    """

    def __init__(self, url: str, *, patient: bool = True) -> None:
        self.url = url
        with self._told():
            self._short = self._client(FIRST_S)
            self._long = self._client(PATIENCE_S) if patient else self._short
        #: whether the last request was answered; whoever was silent is given little time
        self.answers = False

    def _client(self, patience_s: float) -> Any:
        config: Any = _profile() if self.url.startswith("s3://") else None
        patience = timedelta(seconds=patience_s)
        backoff: Any = {"max_backoff": timedelta(seconds=3)}
        return obstore.store.from_url(
            self.url,
            config=config,
            client_options={"timeout": patience, "allow_http": True},  # AWS_ENDPOINT_URL may say so
            retry_config={"max_retries": 10_000, "retry_timeout": patience, "backoff": backoff},
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
            self.answers = ours and "NoSuchBucket" not in text
            if self.answers:
                raise
            silent = re.search(r"(https?://[^/\s]+).*HTTP error", text)
            why = f"{silent[1]} does not answer" if silent else text.partition("\n")[0]
            why = next((told for said, told in _KNOWN.items() if said in text), why)
            raise StoreGone(f"the store {self.url}: {why}; see docs/cluster.md") from None
        self.answers = True

    def get(self, name: str) -> tuple[bytes, Meta]:
        """Return an object's content and what is known of it. Raises FileNotFoundError."""
        with self._told():
            found = self._objects.get(name)
            return bytes(found.bytes()), found.meta

    def download(self, name: str, path: Path) -> None:
        """Write an object's content to a file of its own. Raises FileNotFoundError, OSError."""
        with path.open("xb") as file, self._told():
            for part in self._objects.get(name).stream(min_chunk_size=PART):
                file.write(part)

    def put(self, name: str, data: bytes | Path) -> None:
        """Put an object, whatever is there."""
        with self._told():
            self._objects.put(name, data, chunk_size=PART)

    def put_over(self, name: str, data: bytes, seen: Meta | None) -> Meta | None:
        """Put an object over the one that was `seen`, or where there was none. Return its mark.

        Return None where another one is there by now, or none any more. A put may be told to have
        failed that was done: it was tried again, as its answer was lost.
        """
        mode: Any = "create"
        if seen is not None:
            mode = {tag: seen[tag] for tag in ("e_tag", "version") if seen[tag] is not None}
        with suppress(FileNotFoundError):
            try:
                with self._told():
                    mark: Meta = self._objects.put(name, data, mode=mode, chunk_size=PART)
                    return mark
            except (AlreadyExistsError, PreconditionError):
                found, mark = self.get(name)
                return mark if found == data else None
        return None

    def listing(self, prefix: str = "") -> dict[str, Meta]:
        """Return what lies below a folder, by name."""
        with self._told():
            pages = self._objects.list(prefix.strip("/") or None, chunk_size=1000)
            return {meta["path"]: meta for page in pages for meta in page}

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
    file = configparser.ConfigParser(interpolation=None)
    if "AWS_ACCESS_KEY_ID" not in os.environ:
        with suppress(configparser.Error, UnicodeDecodeError):
            file.read(path, encoding="utf-8")
    profile = os.environ.get("AWS_PROFILE", "default")
    known = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
    return {name: file[profile][name] for name in known if file.has_option(profile, name)}
