"""Runs cases for the gate in processes of their own, with the code that is on its path.

`Server` starts this file. It imports what is heavy once, then forks for each case: a child whose
memory nothing else has touched. Requests and answers are lines of JSON, one after the other.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, Self

HERE = Path(__file__).parent
#: calls after which the peak of a case's memory is read
PEAK_CALLS = 3


class Unable(Exception):
    """The code under test cannot run the case; says why."""


class Server:
    """Cases by the code of a checkout. Close it at the end."""

    def __init__(self, checkout: Path) -> None:
        paths = (checkout, HERE.parents[1] / "tests" / "bench")
        path = os.pathsep.join(map(str, paths))
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "serve.py"), str(checkout)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=checkout,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            text=True,
            bufsize=1,
        )

    def ask(self, *request: Any) -> Any:
        """Return the answer. Raises `Unable`."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer = json.loads(line or '{"error": "its process died"}')
        if "error" in answer:
            raise Unable(answer["error"])
        return answer["value"]

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ------------------------------------------------------------------------------ in the processes


def memory_mib(name: str) -> float:
    """Return VmRSS, the memory that this process has, or VmHWM, its peak; MiB. Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def peak(name: str, folder: Path) -> float:
    """Return by how much a case raises the memory of this process at the most, MiB."""
    import cases

    before = memory_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    case = cases.build(name, folder)
    for _ in range(PEAK_CALLS):
        case.ours()
    return memory_mib("VmHWM") - before


def growth(kind: str, steps: int, settled: int) -> float:
    """Return by how much memory grows from step `settled` to the end of a training, MiB."""
    import cases

    from maect.stages.loop import train

    training = cases.training_of(kind, cases.SMOKE, [f"{kind}.steps={steps}"])
    held: list[float] = []
    once = training.step

    def step(number: int) -> Any:
        values = once(number)
        held.append(memory_mib("VmRSS"))
        return values

    training.step = step
    train(training)
    return max(held[settled:]) - held[settled]


def rounds(name: str, folder: Path) -> Any:
    """Return a case's call, once it has warmed up: it returns the CPU seconds that it took."""
    import cases

    case = cases.build(name, folder)

    def timed() -> float:
        began = time.process_time()
        case.ours()
        return time.process_time() - began

    for _ in range(2):
        timed()
    return timed


def _serve(checkout: Path) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the code prints is no answer
    import cases

    assert checkout.samefile(cases.ROOT), f"{cases.ROOT} is on the path before {checkout}"
    while line := sys.stdin.readline():
        if line.strip() == "[]":  # the end of rounds that an error has ended
            answers.write('{"value": 0}\n')
            continue
        if child := os.fork():
            if os.waitpid(child, 0)[1]:
                answers.write('{"error": "its process died"}\n')
            continue
        what, *given = json.loads(line)
        try:
            with tempfile.TemporaryDirectory() as place:
                if what == "growth":
                    answers.write(json.dumps({"value": growth(*given)}) + "\n")
                elif what == "peak":
                    answers.write(json.dumps({"value": peak(*given, Path(place))}) + "\n")
                else:  # a round for each line, until one is empty
                    timed = rounds(*given, Path(place))
                    answers.write('{"value": 0}\n')
                    while json.loads(sys.stdin.readline() or "[]"):
                        answers.write(json.dumps({"value": timed()}) + "\n")
                    answers.write('{"value": 0}\n')
        except BaseException as error:
            traceback.print_exc()
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            answers.write(json.dumps({"error": said}) + "\n")
        answers.flush()
        os._exit(0)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
