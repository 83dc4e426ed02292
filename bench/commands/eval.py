"""`eval`: any ViT checkpoint on any data set, without a suite, a store or Ray."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.commands import common
from bench.commands.data import settings_of, unusual_lines
from bench.errors import OK, UserError, reason, require_writable, short, suggestion
from bench.suite import yamlfile
from bench.suite.evaluations import POOLS, Evaluation, declare_all
from bench.suite.load import parse_set
from bench.suite.messages import require
from maect import datasets, evals
from maect.datasets import DataInfo
from maect.files import digest, sha256, write_atomic
from maect.settings import DataSettings, ModelSettings, NumericsSettings

if TYPE_CHECKING:
    from maect.models import VisionEncoder
    from maect.stages.job import Output


#: of an encoder, what the output tells
_SIZES = ("image_size", "patch_size", "in_chans", "dim", "depth", "heads")


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add, count = parser.add_argument, common.count_from(1)
    weights = "a ViT of any origin (docs/evaluation.md), its folder, timm:NAME or hf:OWNER/NAME"
    add("--weights", type=common.path, required=True, metavar="FILE", help=weights)
    data = "a data set's name, or a folder of images or shards"
    add("--data", required=True, metavar="DIR_OR_NAME", help=data)
    names = "evaluations, with commas between (default: knn,probe)"
    add("--evaluate", default="knn,probe", metavar="NAMES", help=names)
    pools = "class token, mean of the patches, or both (default: as its file says, else mean)"
    add("--pool", choices=["cls", "mean", "both"], help=pools)
    block = "tokens after this block, from 0, or `all` (default: the last one, and the final norm)"
    add("--block", metavar="N", help=block)
    split = "images to report on (default: test)"
    add("--split", choices=["test", "selection"], default="test", help=split)
    add("--image-size", type=count, metavar="N", help="side in pixels (default: the checkpoint's)")
    add("--heads", type=count, metavar="N", help="attention heads, if the file does not tell")
    threads = "default 1; others may change the last digits"
    add("--threads", type=count, default=1, metavar="N", help=threads)
    add("--seed", type=common.count_from(0), default=0, metavar="N")
    common.set_argument(parser, "a setting, e.g. probe.epochs=10; may be repeated")
    predictions = "also write each image's predictions, as safetensors"
    add("--predictions", type=common.path, metavar="FILE", help=predictions)
    common.json_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Evaluate and print. Return the exit code. Raises `UserError` and `DataError`."""
    names = [*dict.fromkeys(filter(None, map(str.strip, options.evaluate.split(","))))]
    wanted = _tree(options, names)
    if options.predictions:
        _check_output(options.predictions, keep=options.weights)
    file, encoder = _encoder(options)
    data = settings_of(options.data, encoder.image_size[0])
    info = datasets.prepare(data)
    if info.channels != encoder.in_chans:
        raise UserError(
            f"{options.weights} takes images of {encoder.in_chans} channel(s), those of "
            f"'{options.data}' have {info.channels}; take other data or other weights"
        )
    # as much of a model's settings as an evaluation's declaration looks at
    usual = options.pool or encoder.stated.get("pool", "mean")
    model = ModelSettings.model_construct(depth=encoder.depth, pool=usual)
    chosen = declare_all(names, model, data, wanted)
    outputs, notes = _evaluated(chosen, options, encoder, data, usual)
    if options.predictions:
        _write_predictions(outputs, options.predictions)
    if not {options.pool, encoder.stated.get("pool")} - {None}:
        notes.append("features are the mean of patches: the file says nothing of them")
    found = {
        "weights": {"file": str(file), "sha256": sha256(file), "notes": notes},
        "encoder": {name: getattr(encoder, name) for name in _SIZES},
        "images": {"pool": usual, "mean": info.mean, "std": info.std, "normalised_by": info.name},
        "data": {
            "name": info.name,
            "fingerprint": info.fingerprint,
            "images": info.counts,
            "unusual": unusual_lines(info),
        },
        "evaluations": {name: _result(chosen[name], told, info) for name, told in outputs.items()},
    }
    print(json.dumps(found, indent=1) if options.json else _text(found))
    return OK


def _evaluated(
    chosen: dict[str, Evaluation],
    options: argparse.Namespace,
    encoder: VisionEncoder,
    data: DataSettings,
    usual: str,
) -> tuple[dict[str, Output], list[str]]:
    """Return what each evaluation leaves, and what was assumed of the images.

    Features of equal tokens are made once; those of `usual` ones where none are declared. Raises
    `UserError`.
    """
    import torch

    from maect.stages.evaluate import evaluate
    from maect.stages.features import JobImages, extract
    from maect.stages.job import Job

    numerics = NumericsSettings(threads=options.threads).resolved()

    def job(kind: str, **settings: Any) -> Job:
        return Job(
            kind=kind,
            settings=settings | {"seed": options.seed, "numerics": numerics},
            inputs={},
            data_name=data.name,
            data_root=datasets.data_root(),
            data_path=data.path,
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        )

    outputs: dict[str, Output] = {}
    notes: list[str] = []
    made: dict[str, tuple[JobImages, Any]] = {}
    for name, one in chosen.items():
        tokens: dict[str, Any] = {"pool": one.pool or usual, "block": one.block}
        tokens |= {"norm": True} if one.norm else {}
        try:
            if (key := digest(tokens)) not in made:
                extraction = job("features", data=data.resolved(), **tokens)
                extraction.prepare()
                images = JobImages(extraction, encoder)
                made[key] = images.reporting(options.split), extract(images)
                notes += [note for note in images.notes if note not in notes]
            own = job(one.kind, split=options.split, **one.resolved())
            images, features = made[key]
            outputs[name] = evaluate(own, features, images)
        except ValueError as error:
            raise UserError(f"{one.kind}: {error}") from None
    return outputs, notes


def _result(evaluation: Evaluation, output: Output, info: DataInfo) -> dict[str, Any]:
    """Return an evaluation's part of the output, its protocol told as in a suite's record."""
    protocol = output.protocol | {"data": info.fingerprint}
    return {
        "metrics": [dataclasses.asdict(metric) for metric in evaluation.measured(output.values)],
        **output.summary,
        "protocol": protocol,
        "protocol_fingerprint": digest(protocol, 16),
    }


def _check_output(path: Path, *, keep: Path) -> None:
    """Raise `UserError` unless a file can be written at `path`; `keep` is read and must stay."""
    origin = f"--predictions {path}"
    try:
        if path.exists() and keep.exists() and path.samefile(keep):
            raise UserError(f"{keep} is read and would be lost; name another file", file=origin)
        require_writable(path)
    except OSError as error:
        raise UserError(f"{reason(error)}; name another file", file=origin) from None


def _write_predictions(outputs: dict[str, Output], path: Path) -> None:
    """Write all predictions, named EVALUATION.PREDICTION, and the labels. Raises OSError."""
    from safetensors.torch import save

    tensors = {}
    for name, output in outputs.items():
        for part, tensor in output.tensors["predictions"].items():
            tensors["labels" if part == "labels" else f"{name}.{part}"] = tensor
    write_atomic(path, save(tensors))


def _text(found: dict[str, Any]) -> str:
    encoder, data = found["encoder"], found["data"]
    size = "x".join(map(str, encoder["image_size"]))
    first = f"{found['weights']['file']}: ViT, dim {encoder['dim']}, depth {encoder['depth']}, "
    first += f"{encoder['heads']} heads, patch {encoder['patch_size']}, image {size}"
    images = ", ".join(f"{count:,} {split}" for split, count in data["images"].items())
    lines = [first, *(f"  note: {note}" for note in found["weights"]["notes"])]
    pool = POOLS[found["images"]["pool"]]
    lines.append(f"{data['name']}: {images}; normalised by its mean and deviation; {pool}")
    lines += data["unusual"]
    for name, result in found["evaluations"].items():
        lines.append(f"\n{name} (protocol {result['protocol_fingerprint']})")
        for metric in result["metrics"]:
            lines.append(f"  {metric['value']:8.2f} {metric['unit']:7} {metric['label']}")
        lines += [f"  note: {note}" for note in result["notes"]]
    return "\n".join(lines)


def _tree(options: argparse.Namespace, names: list[str]) -> yamlfile.Map:
    """Return what the options say of evaluations, as a suite would write it.

    Raises `UserError`, also where an evaluation is unknown, or is set and not asked for.
    """
    place = ("--evaluate", None)
    tokens = yamlfile.Map(*place)
    if options.block is not None:
        origin = f"--block {short(options.block)}"
        block = yamlfile.value(options.block, origin)
        if block != "all" and not isinstance(block, int | list):
            raise UserError("write a number from 0, [0, 2] or all", file=origin)
        tokens.put("block", block, origin, None)
    if options.pool == "both":  # no row's usual features: a suite declares them too
        tokens.put("pool", "both", "--pool both", None)
    layers = [yamlfile.overlay(name, tokens, place) for name in names if tokens]
    declared = yamlfile.merge(yamlfile.Map(*place), *layers, *map(parse_set, options.sets))
    tree = yamlfile.overlay("evaluations", declared, place)
    if not names:
        raise UserError(f"write one of {', '.join(evals.names())}", file="--evaluate")
    for name in names:
        require(name, {*evals.names(), *declared}, "evaluation", tree, ())
    for name in declared:
        if name not in names:
            message = f"'{short(name)}' is not evaluated{suggestion(name, names)}"
            raise UserError(message, file="--set")
        own = declared[name]
        if isinstance(own, yamlfile.Map) and {"data", "rows"} & own.keys():
            message = f"'data' and 'rows' of '{short(name)}' are for suites; give --data instead"
            raise UserError(message, file="--set")
    return tree


def _encoder(options: argparse.Namespace) -> tuple[Path, VisionEncoder]:
    """Return the checkpoint's file and encoder, for square images. Raises `UserError`."""
    from maect.weights import CheckpointError, load_encoder, weights_file

    try:
        file = weights_file(options.weights)
        encoder = load_encoder(file, image_size=options.image_size, heads=options.heads)
    except CheckpointError as error:
        raise UserError(str(error)) from None
    height, width = encoder.image_size
    if height != width:
        raise UserError(
            f"{options.weights}: made for images of {height}x{width}; give a square --image-size"
        )
    return file, encoder
