"""A first suite of one's own, all faults of one at once, and help that shows how."""

from __future__ import annotations

import argparse
import importlib
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
from bench_helpers import SMOKE
from PIL import Image

from bench.cli import COMMANDS, main
from bench.suite.load import data_info, faults_of, load_suite


def made(tmp_path: Path, side: int, train: int) -> Path:
    """A folder of images of two classes."""
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("val", 4)):
        for label in ("a", "b"):
            place = tmp_path / "images" / split / label
            place.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (side, side + 3, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")
    data_info.cache_clear()
    return tmp_path / "images"


def test_a_first_suite_needs_no_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "first one.yaml"
    assert main(["init", str(file)]) == 0
    assert main(["validate", str(file)]) == 0
    suite = load_suite(file)
    assert suite.name == "first-one" and "MAE-CT_aug" in suite.variants
    assert (tmp_path / "suite.schema.json").exists()
    first = file.read_text()
    assert main(["init", str(file)]) == 2 and file.read_text() == first
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(("side", "size"), [(9, 8), (50, 48), (90, 64)])
def test_a_first_suite_fits_the_images(
    side: int, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MAECT_DATA", str(tmp_path / "data"))
    file = tmp_path / "mine.yaml"
    assert main(["init", str(file), "--data", str(made(tmp_path, side, 40))]) == 0
    data_info.cache_clear()
    row = load_suite(file).variants["MAE-CT"].row
    assert row.data.image_size == size and row.mae.batch_size == 32
    assert data_info(row.data).counts == {"train": 70, "selection": 10, "test": 8}


def test_too_few_images_make_no_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("MAECT_DATA", str(tmp_path / "data"))
    assert main(["init", str(tmp_path / "x.yaml"), "--data", str(made(tmp_path, 8, 10))]) == 2
    assert "20 training images, too few" in capsys.readouterr().err
    assert not (tmp_path / "x.yaml").exists()


@pytest.mark.needs("bash")
def test_a_shell_completes_commands_and_their_options(capsys: pytest.CaptureFixture[str]):
    assert main(["--completion", "bash"]) == 0
    ask = "COMP_WORDS=(maect-bench %s); COMP_CWORD=%d; _shtab_maect_bench; echo ${COMPREPLY[@]}"
    script = capsys.readouterr().out
    script += "\n".join(["", ask % ("wa", 1), ask % ("export x --check", 3)])
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["watch", "--checkpoint"], done.stderr
    assert main(["--completion", "csh"]) == 2


#: what is written for what, and what is said of it
FAULTS = {
    "profile: tiny": ("profile: tny", "there is no profile 'tny'"),
    "title: Smoke": ("titel: Smoke", "unknown setting 'titel'"),
    "seeds: [0, 1]": ("seeds: [0, a]", "'seeds[1]' should be a whole number"),
    "evaluate: [knn, probe]": ("evaluate: [kn, probe]", "there is no evaluation 'kn'"),
    "  MAE: {stages: [mae]}": (
        "  MAE: {stages: [mae], sett: 3}",
        "unknown setting 'variants.MAE.sett'",
    ),
    "baseline: MAE": ("baseline: MEA", "there is no variant 'MEA'"),
    "epochs: 5, ": ("epoch: 5, ", "unknown setting 'evaluations.probe.epoch'"),
    "patch_size: 2": ("patch_size: 3", "patch_size 3 does not divide image_size 8"),
    "topk: 5": ("topk: 5000", "tune.topk 5000 is more than the queue"),
}


@pytest.mark.parametrize("left_out", ["nothing", "epochs: 5, "])
def test_validate_names_every_fault_at_once(
    left_out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    text, wanted = SMOKE.read_text(), []
    for right, (wrong, said) in FAULTS.items():
        # a faulty setting of all rows hides the rules that join it with others
        if (left_out == "nothing") != (right in ("patch_size: 2", "topk: 5")) and right != left_out:
            assert right in text
            text = text.replace(right, wrong, 1)
            line = next(n for n, one in enumerate(text.splitlines(), 1) if wrong in one)
            wanted.append(f"broken.yaml:{line}: {said}")
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    assert main(["validate", str(file)]) == 2
    out = capsys.readouterr().out
    assert all(one in out for one in wanted), out
    assert f"{len(wanted)} faults" in out


def test_the_suites_here_have_no_fault():
    """Some take over profiles of which one does not fit them: that is none of theirs."""
    profiles = {}
    for file in SMOKE.parent.glob("*.yaml"):
        faults, profiles[file.stem] = faults_of(file)
        assert faults == [], file
    assert "imagenet" not in profiles["successors"] and "cifar10" in profiles["successors"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_shows_examples_that_can_be_called(
    name: str, capsys: pytest.CaptureFixture[str]
):
    _, *examples = COMMANDS[name]
    module = "run" if name == "sweep" else name
    parser = argparse.ArgumentParser(exit_on_error=False)
    importlib.import_module(f"bench.commands.{module}").declare(parser)
    for example in examples:
        parser.parse_args(shlex.split(example))
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert all(example in capsys.readouterr().out for example in examples[:1])
