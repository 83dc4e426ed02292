"""`export`: what a suite has in the store, as files for others."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from bench.commands import common
from bench.errors import OK, UserError, short
from reports.display import plural

if TYPE_CHECKING:
    from bench.plan.stage import Plan
    from bench.store.store import Store

#: formats of figures
DRAWN = ("pdf", "svg", "png")
#: modules of `bench.report.trackers`
TRACKERS = ("tensorboard", "mlflow", "wandb")


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    common.suite_arguments(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    results = "the tables with every value by seed, as JSON; `report --against` reads it"
    what.add_argument("--results", action="store_true", help=results)
    figures = f"the report's figures at the size of a paper's column: {', '.join(DRAWN)}"
    what.add_argument("--figures", type=_formats, metavar="FORMATS", help=figures)
    row = "the encoder of a row, for timm and transformers, with a model card"
    what.add_argument("--checkpoint", metavar="ROW", help=row)
    bundle = "one file for a reviewer, without weights; `report` and `verify` take it as --store"
    what.add_argument(
        "--bundle", nargs="?", const=True, type=common.path, metavar="F.tar", help=bundle
    )
    tracker = "each row and seed as a run of tensorboard (a folder), mlflow (a file of SQLite) or "
    tracker += "wandb (a folder of offline runs): curves, metrics, settings, where artifacts lie"
    what.add_argument("--tracker", choices=TRACKERS, metavar="NAME", help=tracker)
    seed = "of --checkpoint: which seed (default: the suite's first)"
    parser.add_argument("--seed", type=common.count_from(0), metavar="N", help=seed)
    license = "of --checkpoint: licence of the weights as the Hub names it, e.g. mit"
    parser.add_argument("--license", metavar="ID", default="other", help=license)
    hub = "of --checkpoint: upload it to the Hugging Face Hub too; a new repository is private"
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help=hub)
    to = "new file; of figures and of --checkpoint a folder; a bundle's may stand after --bundle"
    parser.add_argument("--to", type=common.path, metavar="PATH", help=to)


def _formats(text: str) -> list[str]:
    """Return the type of an argument that is a list of formats: "pdf,svg"."""
    found = list(dict.fromkeys(text.lower().split(",")))
    for name in found:
        if name not in DRAWN:
            message = f"'{short(name)}' is no format of figures: {', '.join(DRAWN)}"
            raise argparse.ArgumentTypeError(message)
    return found


def run(options: argparse.Namespace) -> int:
    """Write what is asked for. Return the exit code."""
    if isinstance(options.bundle, Path):
        options.to = options.to or options.bundle
    if options.to is None:
        raise UserError("say where to write it: --to PATH")
    store = common.existing(options.store)
    plan = common.planned(options, store, keep_stale=options.keep_stale)
    if options.checkpoint is not None:
        _checkpoint(options, plan, store)
        return OK
    for name in ("seed", "push_to_hub"):
        if getattr(options, name) is not None:
            raise UserError("goes with --checkpoint", file=f"--{name.replace('_', '-')}")
    if options.bundle:
        from bench.report.bundle import write_bundle

        chosen = {name: getattr(options, name) for name in ("sets", "only", "keep_stale")}
        count = write_bundle(options.to, plan, store, **chosen)
        size = options.to.stat().st_size / 2**20
        print(f"bundle: {options.to}, {plural(count, 'file')} of {size:.1f} MiB")
        print(f"to check it: python -m bench verify --store {options.to}")
        return OK
    if options.tracker:
        from bench.report.trackers import write_tracker

        count, new = write_tracker(options.tracker, plan, store, options.to)
        print(f"{options.tracker}: {options.to}, {plural(count, 'run')}, {new} new or changed")
        return OK
    from bench.report.frames import build_view
    from bench.report.results import write_results
    from bench.report.write import write_figures

    view = build_view(plan, store, options.command_line)
    if options.results:
        write_results(options.to, view)
        print(f"results: {options.to}")
    else:
        found = write_figures(view, options.figures, options.to)
        print(f"figures: {plural(len(found), 'file')} in {options.to}")
    return OK


def _checkpoint(options: argparse.Namespace, plan: Plan, store: Store) -> None:
    from bench.report.checkpoint import push_to_hub, require_token, write_checkpoint

    if options.push_to_hub is not None:
        require_token()  # before anything is written
    command = options.command_line
    row = write_checkpoint(
        plan, store, options.to, row=options.checkpoint, seed=options.seed,
        license=options.license, command=command,
    )  # fmt: skip
    print(f"{row.variant.name}, seed {row.seed}: {options.to}")
    print(f'timm.create_model("local-dir:{options.to}", pretrained=True)')
    if options.push_to_hub is not None:
        print(push_to_hub(options.to, options.push_to_hub))
