"""The command line: `python -m bench COMMAND`."""

from __future__ import annotations

import argparse
import gc
import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

from bench.commands import run
from bench.errors import INTERRUPTED, MISMATCH, OK, STAGE_FAILED, USAGE, UserError
from maect.datasets import DataError

FORMATS = ("latex", "markdown", "csv", "parquet", "json")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(given)
    options.command_line = "python -m bench " + shlex.join(given)
    try:
        return int(options.run(options))
    except (UserError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="A reproducible, Ray-distributed benchmark suite for MAE-CT.",
    )
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")

    def add(
        name: str, run: Any, text: str, *, suite: bool = True, store: bool = True
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        if suite:
            command.add_argument(
                "suite",
                type=Path,
                nargs="?" if name == "report" else None,
                help="suite file, e.g. suites/paper_table.yaml",
            )
            command.add_argument("--profile", help="scale of the suite; default: the suite's own")
            command.add_argument("--seeds", type=_count, metavar="N", help="run N seeds")
            command.add_argument(
                "--only", default="*", metavar="GLOB", help="only rows whose name fits, e.g. 'MAE*'"
            )
            command.add_argument(
                "--set",
                dest="sets",
                action="append",
                default=[],
                metavar="PATH=VALUE",
                help="override a setting, e.g. mae.steps=100; may be repeated",
            )
            command.add_argument(
                "--keep-stale", action="store_true", help="keep results of older code, marked"
            )
        if store:
            command.add_argument(
                "--store", type=Path, default=Path("store"), help="folder of results"
            )
        return command

    for name, text in (
        ("run", "run what a suite lacks, then print its table"),
        ("sweep", "run the search a suite declares, through Ray Tune"),
    ):
        run.declare(add(name, run.run, text, suite=False, store=False))
    plan = add("plan", plan_suite, "show what would run, and why; start nothing")
    plan.add_argument("--json", action="store_true")
    report = add("report", report_suite, "render a suite's report from the store alone")
    report.add_argument("--export", action="append", choices=FORMATS, metavar="FORMAT",
                        help=f"also write {', '.join(FORMATS)}; may be repeated")  # fmt: skip
    report.add_argument("--compare", type=Path, nargs="+", metavar="STORE", help="beside another "
                        "store's; of two stores, the one's beside the other's")  # fmt: skip
    report.add_argument("--check", action="store_true", help="exit 3 if the table is not sound")
    report.add_argument("--extract-suite", type=Path, metavar="FILE",
                        help="print the suite that a report embeds, and nothing else")  # fmt: skip
    check = add("verify", verify_suite, "derive a suite's numbers again from what is stored")
    check.add_argument("--rerun", metavar="GLOB", help="also run these stages again and compare "
                       "bit for bit: a kind or titles, e.g. tune or 'MAE-CT *'")  # fmt: skip
    check.add_argument("--json", action="store_true")
    evaluate = add("eval", evaluate_weights, "evaluate a ViT checkpoint without a suite",
                   suite=False)  # fmt: skip
    evaluate.add_argument("--weights", type=Path, required=True, metavar="FILE",
                          help="a checkpoint: MAE-CT's, facebookresearch/mae's, timm's or Hugging "
                          "Face's, or a folder that holds one")  # fmt: skip
    evaluate.add_argument("--data", required=True, metavar="DIR_OR_NAME",
                          help="a data set's name, or a folder of images or shards")  # fmt: skip
    evaluate.add_argument("--evaluate", default="knn,probe", metavar="NAMES",
                          help="evaluations, with commas between (default: knn,probe)")  # fmt: skip
    evaluate.add_argument("--pool", choices=["cls", "mean", "both"], default="mean",
                          help="class token, mean of the patches (default), or both")  # fmt: skip
    evaluate.add_argument("--block", metavar="N",
                          help="tokens after this block, from 0, or `all` (default: after the last "
                          "one and the final norm)")  # fmt: skip
    evaluate.add_argument("--split", choices=["test", "selection"], default="test",
                          help="images to report on (default: test)")  # fmt: skip
    evaluate.add_argument("--image-size", type=_count, metavar="N",
                          help="side in pixels (default: the checkpoint's)")  # fmt: skip
    evaluate.add_argument("--heads", type=_count, metavar="N",
                          help="attention heads, where the file does not show them")  # fmt: skip
    evaluate.add_argument("--threads", type=_count, default=1, metavar="N",
                          help="default 1; others may change the last digits")  # fmt: skip
    evaluate.add_argument("--seed", type=_workers, default=0, metavar="N")
    evaluate.add_argument("--set", dest="sets", action="append", default=[], metavar="PATH=VALUE",
                          help="a setting, e.g. probe.epochs=10; may be repeated")  # fmt: skip
    evaluate.add_argument("--predictions", type=Path, metavar="FILE",
                          help="also write each image's predictions, as safetensors")  # fmt: skip
    evaluate.add_argument("--json", action="store_true")
    ls = add("ls", ls_store, "list the records of a store", suite=False)
    ls.add_argument("--json", action="store_true")
    ls.add_argument("--reindex", action="store_true",
                    help="read every record and make the index of the store anew")  # fmt: skip
    show = add("show", show_record, "show one record, its lineage and its log", suite=False)
    show.add_argument("key", help="a stage's key, or the beginning of one")
    show.add_argument("--json", action="store_true")
    diff = add("diff", diff_runs, "what differs between two runs; exit 3 if anything but the "
               "environment does", suite=False)  # fmt: skip
    for side in ("a", "b"):
        diff.add_argument(side, metavar=side.upper(), help="a store's folder, FILE.yaml or "
                          "FILE.yaml:PROFILE, a run's id, or the beginning of a key")  # fmt: skip
    diff.add_argument("--json", action="store_true")
    data = add("data", manage_data, "data sets: list, fetch, check", suite=False)
    data.add_argument("action", choices=["ls", "fetch", "check"])
    data.add_argument("names", nargs="*", metavar="NAME", help="default: ls and check, all")
    data.add_argument("--from", dest="from_path", type=Path, help="files already at hand")
    data.add_argument("--json", action="store_true")
    doctor = add("doctor", run_doctor, "what is here, what is missing, how to get it", suite=False)
    doctor.add_argument("--json", action="store_true")
    return parser


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def _workers(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 0")
    return int(text)


def _hours(text: str) -> float:
    try:
        hours = float(text)
    except ValueError:
        hours = math.nan
    if not 0 < hours < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of hours above 0")
    return hours


def _load(options: argparse.Namespace) -> Any:
    from bench.suite.load import load_suite

    return load_suite(
        options.suite, profile=options.profile, seeds=options.seeds, sets=options.sets
    )


def plan_suite(options: argparse.Namespace) -> int:
    from bench.commands import plan as plan_command
    from bench.plan.planner import make_plan
    from bench.store.store import Store

    plan = make_plan(
        _load(options), Store(options.store), keep_stale=options.keep_stale, only=options.only
    )
    print(
        json.dumps(plan_command.plan_data(plan), indent=1)
        if options.json
        else plan_command.plan_text(plan)
    )
    return OK


def report_suite(options: argparse.Namespace) -> int:
    # of a large store nearly all objects live to the end; to look for garbage among them again and
    # again would take a quarter of the time
    gc.disable()
    try:
        return _report(options)
    finally:
        gc.enable()


def _report(options: argparse.Namespace) -> int:
    from bench.plan.planner import make_plan
    from bench.report import write
    from bench.store.store import Store

    if options.extract_suite is not None:
        print(write.extract(options.extract_suite), end="")
        return OK
    if options.suite is None:
        after = " --compare A B" if options.compare else ""
        raise UserError(f"say which suite: python -m bench report suites/paper_table.yaml{after}")
    if options.compare is not None:
        return _compare([options.store, *options.compare][-2:], options)
    # whether the table is sound is a question to the records themselves
    store = _existing(Store(options.store))
    suite = _load(options)
    plan = make_plan(suite, store, keep_stale=options.keep_stale, only=options.only)
    if plan.unresolved:
        raise UserError(f"the data are not here, so no key is known: {plan.unresolved}")
    write.write_report(plan, store, options.command_line, options.export)
    found = write.problems(plan, store, options.command_line) if options.check else []
    for problem in found:
        print(f"check: {problem}", file=sys.stderr)
    return MISMATCH if found else OK


def _compare(stores: list[Path], options: argparse.Namespace) -> int:
    """The suite of one store beside that of another."""
    from bench.report import write
    from bench.store.store import Store

    if len(options.compare) > 2:
        raise UserError("--compare sets two stores side by side; name one or two")
    one, other = (_existing(Store(store)) for store in stores)
    write.compare(_load(options), (one, other), options.only, options.command_line)
    return OK


def verify_suite(options: argparse.Namespace) -> int:
    from bench.commands import verify
    from bench.plan.planner import make_plan
    from bench.store.store import Store

    store = _existing(Store(options.store))
    plan = make_plan(_load(options), store, keep_stale=True, only=options.only)
    if plan.unresolved:
        raise UserError(f"the data are not here, so no key is known: {plan.unresolved}")
    found = verify.verify(plan, store, options.rerun)
    print(json.dumps(vars(found), indent=1) if options.json else verify.text(found, plan))
    for mismatch in found.mismatches:
        print(f"mismatch: {mismatch}", file=sys.stderr)
    return MISMATCH if found.mismatches else OK


def evaluate_weights(options: argparse.Namespace) -> int:
    from bench.commands import eval

    found = eval.run(options)
    print(json.dumps(found, indent=1) if options.json else eval.text(found))
    return OK


def ls_store(options: argparse.Namespace) -> int:
    from bench.commands import ls
    from bench.store.store import Store

    store = _existing(Store(options.store))
    rows = ls.records(store)
    print(json.dumps(rows, indent=1) if options.json else ls.records_text(rows))
    return OK


def show_record(options: argparse.Namespace) -> int:
    from bench.commands import ls
    from bench.store.store import Store

    store = _existing(Store(options.store))
    state = ls.find(store, options.key)
    print(
        json.dumps([a.plain() for a in state.attempts], indent=1)
        if options.json
        else ls.state_text(state)
    )
    return OK


def diff_runs(options: argparse.Namespace) -> int:
    from bench.commands import diff
    from bench.store.store import Store

    store = Store(options.store)
    found = diff.compare(diff.side(options.a, store), diff.side(options.b, store))
    print(json.dumps(found, indent=1) if options.json else diff.text(found))
    return MISMATCH if found["different"] else OK


def manage_data(options: argparse.Namespace) -> int:
    from bench.commands import data

    whole = data.run(options.action, options.names, options.from_path, as_json=options.json)
    return OK if whole else MISMATCH


def run_doctor(options: argparse.Namespace) -> int:
    from bench.commands import doctor

    checks = doctor.examine(options.store)
    print(json.dumps(checks, indent=1) if options.json else doctor.text(checks))
    return OK if all(check["ok"] for check in checks) else STAGE_FAILED


def _existing(store: Any) -> Any:
    if not (store.root / "stages").is_dir():
        raise UserError(f"there is no store at {store.root}; run a suite first, or give --store")
    return store
