"""The command line: `python -m bench COMMAND`. Each command is a module of `bench.commands`."""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys

from bench import signals
from bench.errors import OK, USAGE, UserError
from maect.datasets import DataError

#: command -> the module that has its `declare(parser)` and `run(options)`, and what it is for
COMMANDS = {
    "run": ("run", "run what a suite lacks, then print its table"),
    "sweep": ("run", "run the search a suite declares, through Ray Tune"),
    "plan": ("plan", "show what would run, and why; start nothing"),
    "report": ("report", "render a suite's report from the store alone"),
    "verify": ("verify", "derive a suite's numbers again from what is stored"),
    "eval": ("eval", "evaluate a ViT checkpoint without a suite"),
    "ls": ("ls", "list the records of a store"),
    "show": ("show", "show one record, its lineage and its log"),
    "diff": (
        "diff",
        "what differs between two runs; exit 3 if anything but the environment does",
    ),
    "data": ("data", "data sets: list, fetch, check"),
    "doctor": ("doctor", "what is here, what is missing, how to get it"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Return the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="A reproducible, Ray-distributed benchmark suite for MAE-CT.",
    )
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if given[:1] == [name]:  # the others need not be imported
            chosen = importlib.import_module(f"bench.commands.{module}")
            chosen.declare(command)
    options = parser.parse_args(given)
    options.command_line = "python -m bench " + shlex.join(given)
    try:
        return int(chosen.run(options))
    except (UserError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print(f"interrupted. To continue: {options.command_line}", file=sys.stderr)
        return signals.code()
    except BrokenPipeError:
        sys.stderr.close()
        return OK
