"""`bench eval`: any ViT checkpoint on any data set, without a suite, a store or Ray."""

from __future__ import annotations

import hashlib
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.errors import UserError, short, suggestion
from bench.plan.identity import digest
from bench.store.store import write_atomic
from bench.suite import yamlfile
from bench.suite.evaluations import Evaluation, declare_all, eval_input, metric_rows
from bench.suite.load import parse_set
from maect import datasets, evals
from maect.datasets import CATALOG
from maect.settings import DataSettings, ModelSettings, NumericsSettings

if TYPE_CHECKING:
    from maect.models import Encoder


def run(options: Namespace) -> dict[str, Any]:
    """Everything asked for, as plain data. Raises `UserError` and `DataError`."""
    wanted = _tree(options)
    names = _names(options.evaluate, wanted)
    encoder = _encoder(options)
    if encoder.image_size[0] != encoder.image_size[1]:
        raise UserError(
            f"{options.weights}: made for images of {encoder.image_size[0]}x"
            f"{encoder.image_size[1]}; give a square --image-size"
        )
    data = _data(options.data, encoder.image_size[0])
    info = datasets.prepare(data)
    if info.channels != encoder.in_chans:
        raise UserError(
            f"{options.weights} takes images of {encoder.in_chans} channel(s), those of "
            f"'{options.data}' have {info.channels}; take other data or other weights"
        )
    # as much of a model's settings as an evaluation's declaration looks at
    model = ModelSettings.model_construct(depth=encoder.depth, pool=options.pool)
    chosen = declare_all(names, model, wanted)
    _check_blocks(chosen, encoder.depth)
    numerics = NumericsSettings(threads=options.threads).resolved()
    features: dict[str, Any] = {}
    results: dict[str, Any] = {}
    predictions: dict[str, Any] = {}
    for name, evaluation in chosen.items():
        tokens = {"pool": evaluation.pool or options.pool, "block": evaluation.block}
        settings = {"data": data.resolved(), "numerics": numerics, "seed": options.seed, **tokens}
        key = digest(tokens)
        if key not in features:
            features[key] = _features(settings, encoder, options.split)
        result = _evaluate(evaluation, data, options, *features[key])
        protocol = result.protocol | {
            "tokens": tokens, "data": info.fingerprint, "split": options.split
        }  # fmt: skip
        results[name] = {
            "metrics": metric_rows(evaluation, result.values),
            "chosen": result.chosen,
            "notes": result.notes,
            "protocol": protocol,
            "protocol_fingerprint": digest(protocol, 16),
        }
        predictions |= {f"{name}.{part}": array for part, array in result.predictions.items()}
        labels = features[key][1][f"{options.split}_y"]
    if options.predictions:
        from safetensors.numpy import save

        write_atomic(options.predictions, save(predictions | {"labels": labels.numpy()}))
    return {
        "weights": {"file": str(options.weights), "sha256": _checksum(options.weights)},
        "encoder": {
            name: getattr(encoder, name)
            for name in ("image_size", "patch_size", "in_chans", "dim", "depth", "heads")
        },
        "data": {"name": info.name, "fingerprint": info.fingerprint, "images": info.counts},
        "evaluations": results,
    }


def text(found: dict[str, Any]) -> str:
    """What `run` returns, for people."""
    encoder, data = found["encoder"], found["data"]
    size = "x".join(map(str, encoder["image_size"]))
    first = f"{found['weights']['file']}: ViT, dim {encoder['dim']}, depth {encoder['depth']}, "
    first += f"{encoder['heads']} heads, patch {encoder['patch_size']}, image {size}"
    images = ", ".join(f"{count:,} {split}" for split, count in data["images"].items())
    lines = [first, f"{data['name']}: {images}"]
    for name, result in found["evaluations"].items():
        lines.append(f"\n{name} (protocol {result['protocol_fingerprint']})")
        for metric in result["metrics"]:
            lines.append(f"  {metric['value']:8.2f} {metric['unit']:7} {metric['label']}")
        lines += [f"  note: {note}" for note in result["notes"]]
    return "\n".join(lines)


def _tree(options: Namespace) -> yamlfile.Map:
    """What `--pool`, `--block` and `--set` say, as a suite would under `evaluations`."""
    tree = yamlfile.Map("the command line")
    inner = yamlfile.merge(tree, *(parse_set(given) for given in options.sets))
    if options.block is not None:
        block = yamlfile.value(options.block, f"--block {short(options.block)}")
        if block != "all" and not isinstance(block, int | list):
            raise UserError("write a number from 0, [0, 2] or all", file=f"--block {options.block}")
        for name in options.evaluate.split(","):
            parent = yamlfile.Map("the command line")
            parent.put("block", block, f"--block {short(options.block)}", None)
            own = inner.get(name)
            if own is not None and not isinstance(own, yamlfile.Map):
                continue  # told of by its check
            inner.put(name, yamlfile.merge(parent, *([own] if own else [])), "--block", None)
    tree.put("evaluations", inner, "the command line", None)
    return tree


def _names(text: str, tree: yamlfile.Map) -> list[str]:
    """Evaluations asked for, each once."""
    names = [*dict.fromkeys(filter(None, (part.strip() for part in text.split(","))))]
    known = {*evals.names(), *tree["evaluations"]}
    for name in names:
        if name not in known:
            hint = suggestion(name, known)
            raise UserError(f"there is no evaluation '{short(name)}'{hint}", file="--evaluate")
    if not names:
        raise UserError(f"write one of {', '.join(evals.names())}", file="--evaluate")
    for name in tree["evaluations"]:
        if name not in names:
            message = f"'{short(name)}' is not evaluated{suggestion(name, names)}"
            raise UserError(message, file="--set")
    return names


def _encoder(options: Namespace) -> Encoder:
    from maect.weights import CheckpointError, load_encoder

    path = options.weights.expanduser()
    try:
        return load_encoder(path, image_size=options.image_size, heads=options.heads)
    except CheckpointError as error:
        raise UserError(str(error)) from None


def _data(given: str, image_size: int) -> DataSettings:
    """A catalogued set, or a folder of images or Parquet shards."""
    if given in CATALOG:
        return DataSettings.parse({"name": given, "image_size": image_size})
    path = Path(given).expanduser()
    if not path.is_dir():
        hint = suggestion(given, [*CATALOG])
        raise UserError(f"'{short(given)}' is neither a data set nor a folder{hint}", file="--data")
    name = "parquet" if next(path.rglob("*.parquet"), None) else "image_folder"
    return DataSettings.parse({"name": name, "path": str(path), "image_size": image_size})


def _check_blocks(chosen: dict[str, Evaluation], depth: int) -> None:
    for name, evaluation in chosen.items():
        blocks = evaluation.block if isinstance(evaluation.block, list) else [evaluation.block or 0]
        if max(blocks) >= depth:
            message = (
                f"block {max(blocks)} is none of the encoder's {depth}; write 0 to {depth - 1}"
            )
            raise UserError(message, file=name)


def _features(settings: dict[str, Any], encoder: Encoder, split: str) -> tuple[Any, Any]:
    """Images and features of one choice of tokens."""
    import torch

    from maect.stages.features import JobImages, extract
    from maect.stages.job import Job

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = settings["data"]["path"]
    job = Job(settings, {}, datasets.data_root(), path, device=device)
    job.prepare()
    images = JobImages(job, split, encoder)
    return images, extract(images)


def _evaluate(
    evaluation: Evaluation, data: DataSettings, options: Namespace, images: Any, tensors: Any
) -> evals.EvalResult:
    given = eval_input(tensors, options.split, datasets.low_shot(data), options.seed, images)
    try:
        return evaluation.evaluator.run(given, evaluation.settings, evals.ALL_ROWS)
    except ValueError as error:
        raise UserError(f"{evaluation.kind}: {error}") from None


def _checksum(path: Path) -> str | None:
    """Of a file; of a folder with weights, none."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
