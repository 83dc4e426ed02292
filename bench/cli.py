"""The command line: `python -m bench COMMAND`. Each command is a module of `bench.commands`."""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import sys
from typing import Any, NoReturn

from bench.commands import terminal
from bench.errors import USAGE, UserError, reason, short, suggestion, written
from bench.run import signals
from maect.datasets import DataError

#: command -> the module that has its `declare(parser)` and `run(options)`, and what it is for
COMMANDS = {
    "run": ("run", "run what a suite lacks, then print its table"),
    "sweep": ("run", "run the search a suite declares, through Ray Tune"),
    "plan": ("plan", "show what would run, and why; start nothing"),
    "calibrate": ("calibrate", "measure how fast a suite's stages go on this machine"),
    "report": ("report", "render a suite's report from the store alone"),
    "export": ("export", "write a suite's results as a file"),
    "verify": ("verify", "derive a suite's numbers again from what is stored"),
    "eval": ("eval", "evaluate a ViT checkpoint without a suite"),
    "ls": ("ls", "list the records of a store"),
    "show": ("show", "show one record, its lineage and its log"),
    "diff": (
        "diff",
        "what differs between two runs; exit 3 if anything but the environment does",
    ),
    "gc": ("gc", "list what no suite refers to; with --yes, remove it"),
    "data": ("data", "data sets: list, fetch, check"),
    "doctor": ("doctor", "what is here, what is missing, how to get it"),
}


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
    line = written(f"python -m bench {shlex.join(given)}")
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


def _command(given: list[str], line: str) -> int:
    """Run the command that the arguments name. Return its exit code."""
    try:
        os.getcwd()
    except FileNotFoundError:
        message = "the working directory was removed; change to another"
        raise UserError(message) from None
    parser = _Parser(
        prog="python -m bench",
        description="A reproducible, Ray-distributed benchmark suite for MAE-CT.",
    )
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")
    added = {
        name: commands.add_parser(name, help=t, description=t) for name, (_, t) in COMMANDS.items()
    }
    if not given or given[0] not in COMMANDS:
        parser.parse_args(given)
        parser.error("name the command first")
    module = importlib.import_module(f"bench.commands.{COMMANDS[given[0]][0]}")
    module.declare(added[given[0]])
    options = added[given[0]].parse_args(given[1:])
    options.name, options.command_line = given[0], line
    return int(module.run(options))
