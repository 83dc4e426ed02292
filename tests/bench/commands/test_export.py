"""`export --checkpoint`: an encoder of a suite as timm and transformers load it, with a card.

`export --bundle`: what a reviewer receives. `export --tracker`: read with the trackers' libraries.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import numpy as np
import pytest
import timm
import torch
import yaml
from bench_helpers import ROOT, SMOKE, command, environment, fill_store
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config

from bench.cli import main
from bench.plan import planner as bench_planner
from bench.plan.planner import make_plan
from bench.store.bundle import tar
from bench.store.store import Store
from bench.suite.load import data_info, load_suite
from maect import datasets
from maect.settings import DataSettings

SETS = [f"{stage}.steps=4" for stage in ("mae", "head", "tune")]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Its first stage has an attempt that was killed before it wrote a word."""
    root = tmp_path_factory.mktemp("store")
    Store(root).create()
    plan = make_plan(load_suite(SMOKE, seeds=1, sets=SETS), None, only="MAE-CT")
    first = next(iter(plan.stages))
    (root / "stages" / first / "attempts" / "1").mkdir(parents=True)
    return fill_store(root, only="MAE-CT", sets=SETS)


def export(store: Store, folder: Path, row: str = "MAE-CT", *more: str) -> int:
    chosen = ["export", str(SMOKE), "--seeds", "1", *(f"--set={one}" for one in SETS)]
    chosen += ["--store", str(store.root), "--checkpoint", row, "--to", str(folder), *more]
    return main(chosen)


def test_timm_and_transformers_give_the_features_that_the_table_was_measured_on(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert export(store, tmp_path / "new" / "encoder", "MAE-CT", "--seed", "0") == 0
    folder = tmp_path / "new" / "encoder"
    plan = make_plan(load_suite(SMOKE, seeds=1, sets=SETS), store, only="MAE-CT")
    row = plan.rows[0]
    stored = load_file(store.fetch(row.features.key) / "features.safetensors")["test_x"]
    split = datasets.load(DataSettings(name="digits", image_size=8), split="test")

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    told = resolve_model_data_config(model)
    assert told["mean"] == [*split.mean] and told["std"] == [*split.std] and told["crop_pct"] == 1.0
    pixels = split.batch(np.arange(len(split)))[:, 0].numpy()
    transform = create_transform(**told)
    images = torch.stack([transform(Image.fromarray(one)) for one in pixels])
    with torch.inference_mode():
        torch.testing.assert_close(model(images), stored, rtol=1e-4, atol=1e-5)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        transformers = pytest.importorskip("transformers")
        other = transformers.AutoModel.from_pretrained(folder).eval()
        torch.testing.assert_close(other(images).pooler_output, model(images))


def test_the_card_tells_row_protocol_data_cost_and_licence(store: Store, tmp_path: Path):
    assert export(store, tmp_path / "encoder", "MAE-CT", "--license", "cc-by-4.0") == 0
    card = (tmp_path / "encoder" / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    told = yaml.safe_load(head)
    assert told["library_name"] == "timm" and told["license"] == "cc-by-4.0"
    plan = make_plan(load_suite(SMOKE, seeds=1, sets=SETS), store, only="MAE-CT")
    record = plan.rows[0].evaluations["knn"].record
    assert record is not None and record.protocol_fingerprint is not None
    [metric] = [m for m in told["model-index"][0]["results"][0]["metrics"] if m["type"] == "knn"]
    assert metric["value"] == record.metrics[0].value
    wanted = [f"{metric['value']:.1f}", record.protocol_fingerprint, plan.rows[0].chain[-1].key]
    wanted += ["MAE-CT tuning, seed 0: 4", "digits, 1097 train", "training cost, cumulative"]
    assert all(one in body for one in wanted), body


@pytest.mark.parametrize(
    ("row", "more", "told"),
    [
        ("MAE-TC", (), "there is no row 'MAE-TC'; did you mean 'MAE-CT'?"),
        ("MAE-CT", ("--seed", "7"), "there is no seed 7; the suite has 0"),
        ("raw pixels", (), "row 'raw pixels' has no encoder"),
        ("random encoder", (), "trains nothing: its encoder is random"),
        ("MAE-CT_aug", (), "MAE-CT_aug tuning, seed 0 is pending"),
    ],
)
def test_what_cannot_be_exported_is_told(
    row: str, more: tuple[str, ...], told: str, store: Store, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    assert export(store, tmp_path / "encoder", row, *more) == 2
    assert told in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == []


def test_no_folder_is_written_over(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "notes.txt").write_text("mine")
    assert export(store, tmp_path) == 2
    assert "is there already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_damaged_encoder_is_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    damaged = fill_store(tmp_path / "store", only="MAE", sets=["mae.steps=2"])
    [file] = damaged.root.rglob("encoder.safetensors")
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    given = ["--set=mae.steps=2", "--only", "MAE", "--seeds", "1", "--store", str(damaged.root)]
    to = ["--checkpoint", "MAE", "--to", str(tmp_path / "encoder")]
    assert main(["export", str(SMOKE), *given, *to]) == 2
    assert "encoder.safetensors does not fit its checksum" in capsys.readouterr().err
    assert not (tmp_path / "encoder").exists()


# ------------------------------------------------------------------------------------- bundles


@pytest.fixture(scope="module")
def bundle(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "new" / "F.tar"
    chosen = ["--seeds", "1", "--only", "MAE-CT", *(f"--set={one}" for one in SETS)]
    chosen += ["--store", str(store.root)]
    assert main(["export", str(SMOKE), *chosen, "--bundle", str(path)]) == 0
    again = path.with_name("again.tar")
    assert main(["export", str(SMOKE), *chosen, "--bundle", "--to", str(again)]) == 0
    assert again.read_bytes() == path.read_bytes()
    return path


def members(bundle: Path) -> dict[str, bytes]:
    with tarfile.open(bundle, "r:") as file:
        return {one.name: file.extractfile(one).read() for one in file}  # type: ignore[union-attr]


def rewritten(folder: Path, files: dict[str, bytes]) -> Path:
    path = folder / "changed.tar"
    path.write_bytes(b"".join(tar(files.items())))
    return path


def test_a_bundle_gives_the_tables_of_the_store_and_verifies(
    bench, store: Store, bundle: Path, monkeypatch: pytest.MonkeyPatch
):
    files = members(bundle)
    sums = dict(line.split("  ")[::-1] for line in files.pop("SHA256SUMS").decode().splitlines())
    assert sums == {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    assert files["suite/smoke.yaml"] == SMOKE.read_bytes()
    assert json.loads(files["environment.json"])["environment"]["python"]
    assert not any("encoder" in name or "features" in name for name in files)
    chosen = [SMOKE, "--seeds", "1", "--only", "MAE-CT", *(f"--set={one}" for one in SETS)]
    ours = json.loads(bench("report", *chosen, "--store", store.root, "--json").out)
    # on another machine, without the data
    monkeypatch.setattr(bench_planner, "processors", lambda isa: "others")
    known, describe = data_info.cache_clear, datasets.describe
    gone = {"fingerprint": None, "hint": "fetch them"}
    monkeypatch.setattr(datasets, "describe", lambda *of: replace(describe(*of), **gone))
    known()
    theirs = json.loads(bench("report", "--store", bundle, "--json").out)
    assert "their checksum are the bundle's word" in bench("report", "--store", bundle).out
    assert theirs["tables"] == ours["tables"] and theirs["problems"] == []
    done = bench("verify", "--store", bundle)
    known()
    assert (done.code, done.err) == (0, "")
    assert "6 of 6 stages" in done.out and "more are not in the bundle" in done.out


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ("predictions", "predictions.safetensors does not fit its checksum"),
        ("record", "record.json does not fit the bundle's checksum"),
        ("runs/", "runs/in-process.json does not fit the bundle's checksum"),
        ("suite/", "suite/smoke.yaml does not fit the bundle's checksum"),
    ],
)
def test_changed_bytes_of_a_bundle_are_found(
    bench, bundle: Path, tmp_path: Path, part: str, told: str
):
    files = members(bundle)
    name = next(name for name in files if part in name)
    middle = len(files[name]) - 3 if part == "predictions" else files[name].index(b" ")
    files[name] = files[name][:middle] + b"\t" + files[name][middle + 1 :]
    done = bench("verify", "--store", rewritten(tmp_path, files))
    assert done.code == 3 and told in done.err
    gone = {other: data for other, data in members(bundle).items() if other != name}
    done = bench("verify", "--store", rewritten(tmp_path, gone))
    assert f"{name} is missing in the bundle" in done.err if done.code == 3 else done.code == 2


LINK, FOLDER, SPARSE = tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.GNUTYPE_SPARSE


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"name": "/etc/passwd"}, "holds '/etc/passwd', as no bundle does"),
        ({"name": "suite/../../x"}, "holds 'suite/../../x'"),
        ({"name": "stages/k/attempts/1/artifact/encoder.safetensors"}, "as no bundle does"),
        ({"type": LINK, "linkname": "/etc"}, "holds 'suite/x', as no bundle does"),
        ({"type": FOLDER}, "holds 'suite/x'"),
        ({"type": SPARSE}, "holds 'suite/x'"),
        ({"size": 2**40}, "has not the size that it says"),
        ({"size": -512}, "has not the size that it says"),
        ({"name": "store.json"}, "file exists"),
        ({"name": "suite/\x1b[31m"}, "holds 'suite/\\x1b[31m'"),
    ],
    ids=str,
)
def test_what_no_bundle_holds_is_refused(
    bench, bundle: Path, tmp_path: Path, changes: dict[str, Any], told: str
):
    info = tarfile.TarInfo("suite/x")
    for name, value in changes.items():
        setattr(info, name, value)
    path = tmp_path / "F.tar"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bundle.read_bytes())
    if info.name == "store.json":
        path.write_bytes(info.tobuf() + bundle.read_bytes())
    done = bench("report", "--store", path)
    assert done.code == 2 and told in done.err and "Traceback" not in done.err
    assert [one.name for one in tmp_path.iterdir()] == ["F.tar"]


@pytest.mark.parametrize("content", [b"", b"suite: x", bytes(10_240), b"cut"], ids=str)
def test_what_is_no_bundle_is_told(bench, bundle: Path, tmp_path: Path, content: bytes):
    path = tmp_path / "F.tar"
    path.write_bytes(bundle.read_bytes()[:20_000] if content == b"cut" else content)
    done = bench("verify", "--store", path)
    assert done.code == 2 and f"{path} is a file, and no bundle that can be read" in done.err


def test_commands_that_write_refuse_a_bundle(bench, bundle: Path, tmp_path: Path):
    before = bundle.read_bytes()
    chosen = [f"--set={one}" for one in SETS]
    for name, *more in (
        ("run", SMOKE),
        ("gc", f"{SMOKE}:tiny", "--yes"),
        ("export", SMOKE, *chosen, "--checkpoint", "MAE-CT", "--to", tmp_path),
    ):
        done = bench(name, *more, "--store", bundle)
        assert done.code == 2 and "a bundle, which" in done.err, done
    assert bundle.read_bytes() == before


def test_a_store_that_is_damaged_or_empty_is_not_bundled(bench, store: Store, tmp_path: Path):
    damaged = Path(shutil.copytree(store.root, tmp_path / "store"))
    [file, *_] = damaged.rglob("predictions.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    chosen = ["--seeds", "1", "--only", "MAE-CT", *(f"--set={one}" for one in SETS)]
    done = bench("export", SMOKE, *chosen, "--store", damaged, "--bundle", tmp_path / "F.tar")
    assert done.code == 2 and "does not fit its checksum" in done.err
    done = bench("export", SMOKE, "--store", damaged, "--bundle", tmp_path / "F.tar")
    assert done.code == 2 and "nothing is measured yet" in done.err
    assert bench("export", SMOKE, "--store", damaged, "--bundle").code == 2
    assert [one.name for one in tmp_path.iterdir()] == ["store"]


# ------------------------------------------------------------------------------------ trackers


@pytest.fixture(scope="module")
def kept(store: Store) -> dict[str, Any]:
    """Metrics, curves and some settings and artifacts of the store's row, from its records."""
    plan = make_plan(load_suite(SMOKE, seeds=1, sets=SETS), store, only="MAE-CT")
    [row] = plan.rows
    found: dict[str, Any] = {"metrics": {}, "curves": {}, "artifacts": {}}
    for stage in row.chain:
        assert stage.record is not None
        curves = json.loads(store.read(stage.record, "curves.json"))
        steps = curves.pop("step")
        for name, values in curves.items():
            found["curves"][f"{stage.kind}/{name}"] = [
                list(p) for p in zip(steps, values, strict=True)
            ]
        for name in stage.record.files:
            file = store.artifact(stage.record) / name
            found["artifacts"][f"{stage.kind}/{name}"] = str(file)
    for name, stage in row.evaluations.items():
        assert stage.record is not None
        found["metrics"] |= {f"{name}/{m.name}": m.value for m in stage.record.metrics}
    lr = row.chain[-1].settings["train"]["lr"]
    return found | {"settings": {"tune.train.lr": lr, "mae.model.dim": 32}}


def tracked(store: Store, tracker: str, to: Path) -> list[str]:
    chosen = ["--seeds", "1", "--only", "MAE-CT", *(f"--set={one}" for one in SETS)]
    place = ["--store", str(store.root), "--tracker", tracker, "--to", str(to)]
    return ["export", str(SMOKE), *chosen, *place]


def test_tensorboard_reads_every_value(bench, store: Store, kept: dict[str, Any], tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data

    for new in (1, 0):
        done = bench(*tracked(store, "tensorboard", tmp_path))
        assert done.code == 0 and f"1 run, {new} new or changed" in done.out, done.err
    [file] = tmp_path.rglob("*tfevents*")
    assert file.parent == tmp_path / "smoke-tiny" / "MAE-CT" / "seed-0"
    read = EventAccumulator(str(file.parent), {"scalars": 0, "tensors": 0}).Reload()
    scalars = {tag: [[e.step, e.value] for e in read.Scalars(tag)] for tag in read.scalars.Keys()}
    single = {name: [[0, np.float32(value)]] for name, value in kept["metrics"].items()}
    for name, points in kept["curves"].items():
        single[name] = [[step, np.float32(value)] for step, value in points]
    assert scalars == single
    plugin = read.SummaryMetadata("_hparams_/session_start_info").plugin_data
    settings = parse_session_start_info_plugin_data(plugin.content).hparams
    for name, value in kept["settings"].items():
        assert settings[name].number_value == value
    text = read.Tensors("artifacts")[0].tensor_proto.string_val[0].decode()
    assert all(f"| {name} | {at} |" in text for name, at in kept["artifacts"].items())
    # what has changed takes the place of what was there
    old = file.rename(f"{file}0")
    bench(*tracked(store, "tensorboard", tmp_path))
    assert file.exists() and not old.exists()


def test_a_tracker_that_is_missing_is_told(
    bench, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    done = bench(*tracked(store, "wandb", tmp_path / "new"))
    told = "error: --tracker wandb: needs wandb: pip install 'maect-bench[wandb]'\n"
    assert (done.code, done.err, [*tmp_path.iterdir()]) == (2, told, [])


def test_a_place_that_no_tracker_can_use_is_told(bench, store: Store, tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    done = bench(*tracked(store, "tensorboard", tmp_path / "file"))
    assert done.code == 2 and "cannot be written (not a directory)" in done.err
    done = bench("export", SMOKE, "--set=mae.steps=5", "--only", "MAE", "--store", store.root,
                 "--tracker", "tensorboard", "--to", tmp_path / "new")  # fmt: skip
    assert done.code == 2 and "nothing of suite smoke is in the store yet" in done.err


#: what MLflow's client and W&B's records tell of a single run, as `kept` has it
READ_MLFLOW = """
import json, sys
from mlflow import MlflowClient
client = MlflowClient(tracking_uri=f"sqlite:///{sys.argv[1]}")
[experiment] = [e for e in client.search_experiments() if e.name != "Default"]
[run] = client.search_runs([experiment.experiment_id])
found = {"settings": run.data.params, "artifacts": run.data.tags, "points": {}}
for name in run.data.metrics:
    history = client.get_metric_history(run.info.run_id, name)
    found["points"][name] = sorted([m.step, m.value] for m in history)
print(json.dumps(found))
"""
READ_WANDB = """
import json, struct, sys
from pathlib import Path
from wandb.proto.wandb_internal_pb2 import Record
[path] = Path(sys.argv[1]).glob("wandb/offline-run-*/*.wandb")
data, at, record, records = path.read_bytes(), 7, b"", []
while at < len(data):  # LevelDB's log: blocks of 32 KiB, no piece crosses their ends
    if 2**15 - at % 2**15 < 7:
        at += 2**15 - at % 2**15
        continue
    size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
    record += data[at + 7 : at + 7 + size]
    at += 7 + size
    if kind in (1, 4):
        records.append(Record.FromString(record))
        record = b""
def values(items):
    return {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
found, points, summary = {}, {}, {}
for record in records:
    found |= values(record.run.config.update)
    summary |= values(record.summary.update)
    row = values(record.history.item)
    for name, value in row.items():
        stage, _, column = name.partition("/")
        if column not in ("", "step"):
            points.setdefault(name, []).append([row[f"{stage}/step"], value])
for name in summary.keys() - points.keys():
    if "/" in name and name[0] != "_" and not name.endswith("/step"):
        points[name] = [[0, summary[name]]]
print(json.dumps(found | {"points": points}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "reader"), [("mlflow", READ_MLFLOW), ("wandb", READ_WANDB)])
def test_mlflow_and_wandb_read_every_value(
    name: str, reader: str, store: Store, kept: dict[str, Any], tmp_path: Path
):
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if uv is None:
        pytest.skip("needs uv")
    python, to = tmp_path / "environment" / "bin" / "python", tmp_path / "runs"
    subprocess.run([uv, "venv", "-q", "-p", sys.executable, python.parents[1]], check=True)
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = extra["optional-dependencies"][name]
    done = subprocess.run([uv, "pip", "install", "-q", "-p", python, *wanted], capture_output=True)
    if done.returncode:
        pytest.skip("the packages cannot be had here")
    [packages] = python.parents[1].glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))

    script = "import sys; from bench.cli import main; [main(sys.argv[2:]) for _ in range(2)]\n"
    done = subprocess.run(
        [python, "-c", script + reader, to, *tracked(store, name, to)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told, again, found = done.stdout.splitlines()
    assert told.endswith("1 run, 1 new or changed")
    assert again.endswith("1 run, 0 new or changed")
    read = json.loads(found)
    points = {metric: [[0, value]] for metric, value in kept["metrics"].items()} | kept["curves"]
    assert read["points"] == points
    prefix, kind = ("artifact.", str) if name == "mlflow" else ("", float)
    for file, at in kept["artifacts"].items():
        assert read["artifacts"][prefix + file] == at
    for setting, value in kept["settings"].items():
        assert read["settings"][setting] == kind(value)
    assert not (ROOT / "wandb").exists() and not (ROOT / "mlruns").exists()


class Hub(BaseHTTPRequestHandler):
    """What of the Hub an upload of small files asks for; `files` are those of the last commit."""

    files: ClassVar[dict[str, bytes]] = {}

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"] or 0))
        answer: dict[str, Any] = {}
        if self.headers["authorization"] != "Bearer hf_secret":
            self.send_response(403)
        else:
            self.send_response(200)
        if self.path == "/api/repos/create":
            assert b"private" in content  # said in one of two ways, by the version
            answer = {"url": f"http://{self.headers['Host']}/me/encoder"}
        elif self.path == "/api/models/me/encoder/preupload/main":
            names = [one["path"] for one in json.loads(content)["files"]]
            told = {"uploadMode": "regular", "shouldIgnore": False}
            answer = {"files": [{"path": name} | told for name in names]}
        elif self.path == "/api/models/me/encoder/commit/main":
            lines = [json.loads(line) for line in content.splitlines()]
            held = [line["value"] for line in lines if line["key"] == "file"]
            Hub.files = {one["path"]: base64.b64decode(one["content"]) for one in held}
            answer = {
                "commitUrl": f"http://{self.headers['Host']}/me/encoder",
                "commitOid": "1" * 40,
            }
        body = json.dumps(answer).encode()
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.do_POST()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.mark.slow
def test_the_folder_is_pushed_to_the_hub_where_a_token_is_there(store: Store, tmp_path: Path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    own = environment() | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    own |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    own = {name: value for name, value in own.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")}

    def push(folder: str, **more: str) -> subprocess.CompletedProcess[str]:
        chosen = ["export", SMOKE, "--seeds", "1", *(f"--set={one}" for one in SETS)]
        chosen += ["--store", store.root, "--checkpoint", "MAE-CT", "--to", tmp_path / folder]
        return subprocess.run(
            command(*chosen, "--push-to-hub", "me/encoder"),
            cwd=ROOT, env=own | more, capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    done = push("first")
    assert done.returncode == 2 and "there is no token of the Hub" in done.stderr
    assert not (tmp_path / "first").exists()
    done = push("second", HF_TOKEN="hf_secret")
    assert done.returncode == 0 and "/me/encoder" in done.stdout, done.stderr
    here = {path.name: path.read_bytes() for path in (tmp_path / "second").iterdir()}
    assert Hub.files == here and here.keys() == {"README.md", "config.json", "model.safetensors"}
    done = push("third", HF_TOKEN="hf_other")
    assert done.returncode == 2 and "the Hub did not take it: " in done.stderr
    assert "Traceback" not in done.stderr and (tmp_path / "third" / "README.md").exists()
    server.shutdown()
    server.server_close()
