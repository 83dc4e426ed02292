"""`export`: what a suite has in the store, as files for others."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.commands import common
from bench.errors import OK, UserError, short
from reports.display import plural

#: formats of figures
DRAWN = ("pdf", "svg", "png")
#: modules of `bench.report.trackers`
TRACKERS = ("tensorboard", "mlflow", "wandb")


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    common.suite_arguments(parser)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True).add_argument
    results = "the tables with every value by seed, as JSON; `report --against` reads it"
    what("--results", action="store_true", help=results)
    figures = f"the report's figures at the size of a paper's column: {', '.join(DRAWN)}"
    what("--figures", type=_formats, metavar="FORMATS", help=figures)
    row = "the encoder of a row, for timm and transformers, with a model card"
    what("--checkpoint", metavar="ROW", help=row)
    bundle = "one file for a reviewer, without weights; `report` and `verify` take it as --store"
    what("--bundle", nargs="?", const=True, type=common.path, metavar="F.tar", help=bundle)
    tracker = "each row and seed as a run of tensorboard (a folder), mlflow (a file of SQLite) or "
    tracker += "wandb (a folder of offline runs): curves, metrics, settings, where artifacts lie"
    what("--tracker", choices=TRACKERS, metavar="NAME", help=tracker)
    seed = "of --checkpoint: which seed (default: the suite's first)"
    add("--seed", type=common.count_from(0), metavar="N", help=seed)
    license = "of --checkpoint: licence of the weights as the Hub names it, e.g. mit"
    add("--license", metavar="ID", default="other", help=license)
    hub = "of --checkpoint: upload it to the Hugging Face Hub too; a new repository is private"
    add("--push-to-hub", metavar="OWNER/NAME", help=hub)
    to = "new file; of figures and of --checkpoint a folder; a bundle's may stand after --bundle"
    add("--to", type=common.path, metavar="PATH", help=to)


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
    # here, so that --help is quick
    from bench.report.bundle import write_bundle
    from bench.report.checkpoint import encoder_of, push_to_hub, require_token, write_checkpoint
    from bench.report.frames import build_view
    from bench.report.results import write_results
    from bench.report.trackers import write_tracker
    from bench.report.write import write_figures

    if isinstance(options.bundle, Path):
        options.to = options.to or options.bundle
    if options.to is None:
        raise UserError("say where to write it: --to PATH")
    store, to, hub = common.existing(options.store), options.to, options.push_to_hub
    plan = common.planned(options, store, keep_stale=options.keep_stale)
    for name in ("seed", "push_to_hub") if options.checkpoint is None else ():
        if getattr(options, name) is not None:
            raise UserError("goes with --checkpoint", file=f"--{name.replace('_', '-')}")
    view = build_view(plan, store, options.command_line)
    if options.checkpoint is not None:
        if hub is not None:
            require_token()  # before anything is written
        row, stage = encoder_of(plan, options.checkpoint, options.seed)
        write_checkpoint(to, row, stage, store, view, options.license)
        print(f"{row.variant.name}, seed {row.seed}: {to}")
        print(f'timm.create_model("local-dir:{to}", pretrained=True)')
        if hub is not None:
            print(push_to_hub(to, hub))
    elif options.bundle:
        chosen = {name: getattr(options, name) for name in ("sets", "only", "keep_stale")}
        count = write_bundle(to, plan, store, view, chosen)
        print(f"bundle: {to}, {plural(count, 'file')} of {to.stat().st_size / 2**20:.1f} MiB")
        print(f"to check it: python -m bench verify --store {to}")
    elif options.tracker:
        count, new = write_tracker(options.tracker, to, plan, store, view)
        print(f"{options.tracker}: {to}, {plural(count, 'run')}, {new} new or changed")
    elif options.results:
        write_results(to, view)
        print(f"results: {to}")
    else:
        count = write_figures(to, view, options.figures)
        print(f"figures: {plural(count, 'file')} in {to}")
    return OK
