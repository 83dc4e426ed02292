"""`validate`: every fault of a suite file at once; or what a suite may say at all."""

from __future__ import annotations

import argparse
import json

from bench.commands import common
from bench.errors import OK, USAGE, UserError
from bench.suite import reference
from bench.suite.load import faults_of
from reports.display import plural


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    text = "suite file, or the name of one that comes with the package"
    parser.add_argument("suite", type=common.suite_file, nargs="?", help=text)
    parser.add_argument("--profile", help="look at this profile only; default: all")
    common.json_argument(parser)
    sides = parser.add_mutually_exclusive_group()
    schema = "print instead the JSON schema of suite files, for editors"
    sides.add_argument("--schema", action="store_true", help=schema)
    keys = "print instead what each key is for: docs/suite.md"
    sides.add_argument("--reference", action="store_true", help=keys)


def run(options: argparse.Namespace) -> int:
    """Print the faults, or what a suite may say. Return the exit code."""
    if options.schema or options.reference:
        print(reference.schema_text() if options.schema else reference.markdown(), end="")
        return OK
    if options.suite is None:
        raise UserError("name a suite file, or write --schema or --reference")
    faults, profiles = faults_of(options.suite, options.profile)
    if options.json:
        told = [{"line": fault.line, "message": str(fault)} for fault in faults]
        print(json.dumps({"profiles": profiles, "faults": told}, indent=1))
    elif faults:
        count = plural(len(faults), "fault")
        print("\n".join([*map(str, faults), f"{count}; what depends on them was not looked at"]))
    else:
        print(f"{options.suite}: no fault in profile {', '.join(profiles)}")
    return USAGE if faults else OK
