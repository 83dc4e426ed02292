"""The files of docs/cluster: what can be checked of them without a cluster.

No Kubernetes, Slurm or builder of images is here. The manifest is held against a minimal schema of
our own, after KubeRay's fields (ray.io/v1, KubeRay 1.6); it knows no more of pods than we use. The
Slurm script runs with stand-ins for Slurm's commands. The Containerfile is read, and unbuilt.
`ray job submit` runs against a real cluster of one node.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from bench_helpers import ROOT, SMOKE, completed, environment, free_port, running_cluster

from bench.commands import run

FILES = ROOT / "docs" / "cluster"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)
    assert found is not None
    return found[1]


def is_a_run(words: list[str]) -> None:
    """`python -m bench run SUITE ...` with a suite that is there and arguments that exist."""
    assert words[:4] == ["python", "-m", "bench", "run"]
    parser = argparse.ArgumentParser(exit_on_error=False)
    run.declare(parser)
    assert (ROOT / parser.parse_args(words[4:]).suite).is_file()


@pytest.mark.parametrize("script", sorted(FILES.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_bash(script: Path):
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", script], check=True)


# -------------------------------------------------------------------------------- the manifest


def only(required: list[str], **properties: Any) -> dict[str, Any]:
    """A mapping with these fields and no others."""
    return {
        "type": "object",
        "required": required,
        "properties": properties,
        "additionalProperties": False,
    }


TEXT, COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": TEXT}
AMOUNTS = only(["requests", "limits"], requests=TEXTS, limits=TEXTS)
CONTAINER = only(
    ["name", "image", "resources"],
    name={"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"},
    image={"type": "string", "pattern": "^[^:]+:[^:]+$"},
    envFrom={"type": "array", "items": only(["secretRef"], secretRef=only(["name"], name=TEXT))},
    env={"type": "array", "items": only(["name", "value"], name=TEXT, value=TEXT)},
    resources=AMOUNTS,
    volumeMounts={
        "type": "array",
        "items": only(["name", "mountPath"], name=TEXT, mountPath=TEXT),
    },
)
POD = only(
    ["containers"],
    containers={"type": "array", "minItems": 1, "items": CONTAINER},
    volumes={"type": "array", "items": {"type": "object", "required": ["name"]}},
    tolerations={
        "type": "array",
        "items": only(["key", "operator", "effect"], key=TEXT, operator=TEXT, effect=TEXT),
    },
    terminationGracePeriodSeconds=COUNT,
)
GROUP = {"rayStartParams": TEXTS, "template": only(["spec"], spec=POD)}
WORKERS = only(
    ["groupName", "rayStartParams", "template"],
    groupName=TEXT,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    **GROUP,
)
CLUSTER = only(
    ["headGroupSpec"],
    rayVersion=TEXT,
    authOptions=only(["mode"], mode={"enum": ["disabled", "token"]}),
    headGroupSpec=only(["template"], **GROUP),
    workerGroupSpecs={"type": "array", "items": WORKERS},
)
RAY_JOB = only(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=only(["name"], name=TEXT, namespace=TEXT, labels=TEXTS),
    spec=only(
        ["entrypoint", "rayClusterSpec"],
        entrypoint=TEXT,
        runtimeEnvYAML=TEXT,
        backoffLimit=COUNT,
        activeDeadlineSeconds=COUNT,
        shutdownAfterJobFinishes={"type": "boolean"},
        ttlSecondsAfterFinished=COUNT,
        rayClusterSpec=CLUSTER,
    ),
)


def test_the_manifest_is_a_ray_job_of_this_version():
    job = yaml.safe_load((FILES / "kuberay.yaml").read_text())
    jsonschema.validate(job, RAY_JOB)
    is_a_run(shlex.split(job["spec"]["entrypoint"]))
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == pinned("ray")
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        for container in pod["containers"]:
            assert container["image"].endswith(f"/maect-bench:{PROJECT['project']['version']}")
            assert container["resources"]["requests"] == container["resources"]["limits"]
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert mounted == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize(
    ("before", "after"),
    [("headGroupSpec:", "headGroupSpecs:"), ("replicas: 2", "replicas: two"), ('"16"', "16")],
)
def test_the_schema_refuses_what_kuberay_would(before: str, after: str):
    text = (FILES / "kuberay.yaml").read_text()
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(text.replace(before, after, 1)), RAY_JOB)


# --------------------------------------------------------------------------- the Containerfile


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions of a Containerfile, comments left out and continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    split = [line.partition(" ") for line in joined.splitlines() if line.strip()]
    return [(name, rest.strip()) for name, _, rest in split]


def test_the_containerfile_installs_what_is_pinned():
    found = instructions((FILES / "Containerfile").read_text())
    names = [name for name, _ in found]
    assert names[0] == "FROM" and names.count("FROM") == 1
    assert {*names} <= {"FROM", "RUN", "WORKDIR", "COPY", "USER", "ENV"}
    image = re.fullmatch(r"docker\.io/library/python:(3\.\d+)-slim-\w+", found[0][1])
    assert image is not None and image[1] in ("3.11", "3.12", "3.13", "3.14")
    copied = [source for name, rest in found if name == "COPY" for source in rest.split()[:-1]]
    assert all((ROOT / source).exists() for source in copied)
    packages = PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {*copied} >= {package.rstrip("*") for package in packages} | {"suites", "LICENSE"}
    (install,) = [rest for name, rest in found if name == "RUN" and "pip install" in rest]
    assert "-c constraints.txt" in install and "constraints.txt" in copied
    assert names.index("USER") > max(i for i, name in enumerate(names) if name == "RUN")


# ----------------------------------------------------------------------------- scripts that run


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    """A virtual environment whose commands are stand-ins."""
    folder = tmp_path / "env" / "bin"
    folder.mkdir(parents=True)
    (folder / "activate").write_text(f"PATH={folder}:$PATH\n")
    return folder


def stub(folder: Path, name: str, text: str) -> None:
    told = f'echo "{name} $*" >> {folder.parent}/calls\n'
    (folder / name).write_text(f"#!/bin/bash\n{told}{text}\n")
    (folder / name).chmod(0o755)


def test_a_job_is_submitted_with_the_working_directory(stubs: Path):
    stub(stubs, "ray", "exit 7")
    own = {"PATH": f"{stubs}:/usr/bin:/bin", "RAY_ADDRESS": "http://head:8265"}
    line = [FILES / "ray-job.sh", "run", "suites/smoke.yaml", "--only", "raw pixels"]
    done = subprocess.run(line, env=own, capture_output=True, text=True)
    assert done.returncode != 0 and "STORE: a bucket, or a folder" in done.stderr
    assert subprocess.run(line, env=own | {"STORE": "s3://b/p"}).returncode == 7
    assert (stubs.parent / "calls").read_text() == (
        "ray job submit --address http://head:8265 --working-dir . --runtime-env "
        "docs/cluster/runtime-env.yaml -- python -m bench run suites/smoke.yaml --only raw pixels "
        "--store s3://b/p\n"
    )


def test_the_slurm_script_starts_ray_then_the_run_and_queues_again(stubs: Path):
    stub(stubs, "scontrol", '[ "$1" = show ] && printf "one\\ntwo\\n"; exit 0')
    listen = "import socket, sys, time; s = socket.create_server(('127.0.0.1', int(sys.argv[1])))"
    head = (
        f'"{sys.executable}" -c "{listen}; time.sleep(60)" "$(grep -oP "port=\\K[0-9]+" <<< "$*")"'
    )
    stub(stubs, "srun", f'case "$*" in *hostname*) echo "127.0.0.1 ::1";; *--head*) {head};; esac')
    stub(stubs, "python", '[ "$1" = - ] && exit; trap "exit 143" TERM; while :; do sleep 0.1; done')
    slurm = {"JOB_ID": str(free_port()), "JOB_NODELIST": "n", "JOB_NUM_NODES": "2"}
    slurm |= {"CPUS_PER_TASK": "16", "GPUS_ON_NODE": "4"}
    own = {f"SLURM_{name}": value for name, value in slurm.items()}
    own |= {"PATH": f"{stubs}:/usr/bin:/bin", "MAECT_ENV": str(stubs.parent)}
    calls = stubs.parent / "calls"
    line = [FILES / "slurm.sh", "run", "suites/smoke.yaml", "--store", "s3://b/p"]
    job = subprocess.Popen(line, env=own, cwd=ROOT, start_new_session=True)
    try:
        end = time.monotonic() + 90
        while not (calls.exists() and "-m bench" in calls.read_text()):
            assert job.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(90) == 143
    finally:
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
    port = 20000 + int(slurm["JOB_ID"]) % 10000
    told = re.sub("(?m)^srun .*? (?=ray|hostname)", "srun ", calls.read_text()).splitlines()
    head = f"ray start --head --node-ip-address=127.0.0.1 --port={port}"
    has = "--num-cpus=16 --num-gpus=4 --block"
    told.remove(f"srun ray start --address=127.0.0.1:{port} {has}")  # beside what comes next
    assert told == [
        "scontrol show hostnames n",
        "srun hostname --ip-address",
        f"srun {head} --temp-dir=/tmp/ray-{slurm['JOB_ID']} {has}",
        f"python - 127.0.0.1:{port} 2",
        f"python -u -m bench run suites/smoke.yaml --store s3://b/p --address 127.0.0.1:{port}",
        f"scontrol requeue {slurm['JOB_ID']}",
    ]


@pytest.mark.slow
def test_a_job_runs_on_a_cluster_that_knows_nothing_of_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its nodes have no variables of ours, and it asks for a token."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    store, port = tmp_path / "store", free_port()
    own = environment() | {"RAY_ADDRESS": f"http://127.0.0.1:{port}", "STORE": str(store)}
    own["PATH"] = f"{Path(sys.executable).parent}:{own['PATH']}"
    line = [FILES / "ray-job.sh", "run", SMOKE.relative_to(ROOT), "--only", "raw pixels"]
    agent = f"--dashboard-agent-listen-port={free_port()}"
    waits = (FILES / "slurm.sh").read_text().partition("<< 'PYTHON'\n")[2].partition("PYTHON\n")[0]
    with running_cluster(f"--dashboard-port={port}", agent) as head:
        nodes = [sys.executable, "-c", waits, f"127.0.0.1:{head}", "1"]
        assert not subprocess.run(nodes, env=own, check=True, capture_output=True).stdout
        end, text = time.monotonic() + 200, "No available agent"
        while "No available agent" in text or "Failed to connect" in text:
            assert time.monotonic() < end, text
            done = subprocess.run([*line, "--seeds", "1"], env=own, capture_output=True, text=True)
            text = done.stdout + done.stderr
    assert done.returncode == 0, text
    assert len(completed(store)) == 3
