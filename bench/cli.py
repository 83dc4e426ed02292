"""The command line: `maect-bench COMMAND`, or `python -m bench COMMAND`.

Each command is a module of `bench.commands`, with `declare(parser)` and `run(options)`; `sweep` is
another name of `run`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import sys
from typing import Any, NoReturn

import maect
from bench.commands import terminal
from bench.errors import OK, USAGE, UserError, reason, short, suggestion, written
from bench.run import signals
from maect.datasets import DataError
from maect.evals import outside

SUITE = "suites/paper_table.yaml"
#: command -> what it is for, then arguments that are examples of it
COMMANDS: dict[str, tuple[str, ...]] = {
    "init": ("write a first suite of one's own, with comments", "", "mine.yaml --data ~/images"),
    "validate": ("name every fault of a suite at once", "mine.yaml", "--schema"),
    "run": (
        "run what a suite lacks, then print its table",
        SUITE,
        "paper_table --profile cifar10",
        "mine.yaml --set mae.steps=100",
    ),
    "sweep": (
        "run the search a suite declares, through Ray Tune",
        "suites/sweep_queue.yaml",
        "sweep_queue --profile tiny",
    ),
    "plan": ("show what would run, and why; start nothing", SUITE),
    "calibrate": ("measure how fast a suite's stages go on this machine", f"{SUITE} --minutes 3"),
    "watch": ("show what runs on a store, from another terminal", "", "mystore --json"),
    "report": (
        "render a suite's report from the store alone",
        SUITE,
        f"{SUITE} --against docs/results/digits.json",
    ),
    "export": (
        "write a suite's results, figures or an encoder as files",
        f"{SUITE} --results --to results.json",
        f"{SUITE} --checkpoint MAE-CT --seed 0 --to encoder",
        f"{SUITE} --bundle bundle.tar",
        f"{SUITE} --tracker tensorboard --to runs",
    ),
    "verify": (
        "derive a suite's numbers again from what is stored",
        SUITE,
        "--store bundle.tar",
        f"{SUITE} --rerun 'MAE-CT *'",
    ),
    "eval": (
        "evaluate a ViT checkpoint without a suite",
        "--weights encoder/model.safetensors --data ~/images",
    ),
    "ls": ("list the records of a store", "", "--store mystore"),
    "show": ("show one record, its lineage and its log", "3f2a9c41"),
    "diff": (
        "what differs between two runs; exit 3 if anything but the environment does",
        "store other/store",
        f"{SUITE}:digits {SUITE}:cifar10",
    ),
    "gc": (
        "list what no suite refers to; with --yes, remove it",
        SUITE,
        f"{SUITE} mine.yaml --yes",
    ),
    "data": ("data sets: list, fetch, check", "ls", "fetch cifar10", "check ~/images"),
    "doctor": ("what is here, what is missing, how to get it", ""),
}


def program() -> str:
    """Return how people call the command line that runs."""
    called = os.path.basename(sys.argv[0])
    return called if called == "maect-bench" else "python -m bench"


class _Parser(argparse.ArgumentParser):
    """Tells a mistake in the arguments as every other is told, with the nearest word there is."""

    def parse_args(self, *given: Any) -> argparse.Namespace:  # type: ignore[override]
        """Return the options. Raises `UserError` where one of them is unknown."""
        options, unknown = self.parse_known_args(*given)
        if unknown:
            word = unknown[0].partition("=")[0]
            hint = suggestion(word, self._option_string_actions) if word.startswith("-") else ""
            self.error(f"there is no argument '{short(word)}'{hint}")
        return options

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            hint = suggestion(str(value), map(str, action.choices))
            raise argparse.ArgumentError(action, f"there is no '{short(str(value))}'{hint}")

    def error(self, message: str) -> NoReturn:
        """Raise `UserError`."""
        raise UserError(f"{message} (all arguments: {self.prog} --help)")


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Return the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    line = written(f"{program()} {shlex.join(given)}")
    terminal.guard()
    try:
        return _command(given, line)
    except (UserError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        print(f"error: {where}{reason(error)}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"interrupted. To continue: {line}", file=sys.stderr)
        return signals.code()
    finally:
        sys.stdout.flush()
    return USAGE


def _module(command: str) -> Any:
    """Return the module of a command."""
    return importlib.import_module(f"bench.commands.{'run' if command == 'sweep' else command}")


def _completion(parser: _Parser, added: dict[str, _Parser], shell: str = "bash") -> str:
    """Return the script by which a shell completes commands and arguments. Raises `UserError`."""
    try:
        import shtab
    except ModuleNotFoundError:
        message = "needs a package that is not here: pip install 'maect-bench[completion]'"
        raise UserError(message, file="--completion") from None
    if shell not in shtab.SUPPORTED_SHELLS:
        hint = suggestion(shell, shtab.SUPPORTED_SHELLS)
        raise UserError(f"there is no shell '{short(shell)}'{hint}", file="--completion")
    for name, its_parser in added.items():
        _module(name).declare(its_parser)
    parser.prog = "maect-bench"
    # where it knows nothing, bash completes files
    return str(shtab.complete(parser, shell)).replace("complete -o", "complete -o default -o")


def _command(given: list[str], line: str) -> int:
    """Run the command that the arguments name. Return its exit code."""
    try:
        os.getcwd()
    except FileNotFoundError:
        message = "the working directory was removed; change to another"
        raise UserError(message) from None
    outside.settle()
    parser = _Parser(
        prog=program(),
        description="A reproducible, Ray-distributed benchmark suite for MAE-CT.",
        epilog="COMMAND --help shows its arguments and examples.",
    )
    parser.add_argument("--version", action="version", version=f"maect-bench {maect.__version__}")
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")
    added = dict[str, _Parser]()
    as_written = argparse.RawDescriptionHelpFormatter
    for name, (text, *examples) in COMMANDS.items():
        calls = [f"{program()} {name} {example}".rstrip() for example in examples]
        added[name] = commands.add_parser(name, help=text, formatter_class=as_written)
        added[name].description, added[name].epilog = text, "\n  ".join(["examples:", *calls])
    shell = "print what `eval` makes a shell complete by: bash, zsh or tcsh (needs shtab)"
    parser.add_argument("--completion", metavar="SHELL", help=shell)
    if given[:1] == ["--completion"]:
        print(_completion(parser, added, *given[1:2]))
        return OK
    if not given or given[0] not in COMMANDS:
        parser.parse_args(given)
        parser.error("name the command first")
    module, own = _module(given[0]), added[given[0]]
    module.declare(own)
    options = own.parse_args(given[1:])
    options.name, options.command_line = given[0], line
    return int(module.run(options))
