"""An encoder of a suite as files that timm and transformers load, with a model card."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from bench.errors import UserError, reason, suggestion, writing
from bench.plan.planner import encoder_stage
from bench.plan.stage import Plan, Row, Stage
from bench.store.store import Store
from reports.formats.card import model_card
from reports.frames import SuiteView
from reports.tables.build import build_tables


def write_checkpoint(
    folder: Path, row: Row, stage: Stage, store: Store, view: SuiteView, license: str
) -> None:
    """Write the encoder of a row, which a stage left, into a new folder.

    Raises `UserError` where it is damaged, the folder is not new or cannot be written.
    """
    from maect.weights import load_encoder, save_encoder

    record = stage.record
    assert record is not None
    if store.left_out(record):
        raise UserError(f"{store.name} is a bundle, which has no weights; name a folder: --store")
    try:
        encoder = load_encoder(store.fetch(stage.key))
        faults = [*store.damages(record)]
    except ValueError as error:
        faults = [reason(error)]
    if faults:
        raise UserError(f"{stage.title} is damaged: {faults[0]}; run the suite again")
    pool = row.variant.row.model.pool
    told: dict[str, Any] = encoder.stated | {
        "pool": pool,
        "sizes": f"patch {encoder.patch_size}, dim {encoder.dim}, depth {encoder.depth}, "
        f"{encoder.heads} heads",
        "image_size": "×".join(map(str, encoder.image_size)),
        "key": stage.key,
        "code": record.code.hash,
        "chain": [f"{one.title}: {one.steps:,} steps" for one in row.chain],
    }
    card = model_card(view, build_tables(view), row.variant.name, row.seed, told, license)
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    with writing(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError("is there already; name a new folder: --to PATH", file=folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_encoder(encoder, beside, pool=pool)
            (beside / "README.md").write_text(card, encoding="utf-8")
            beside.rename(folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def require_token() -> None:
    """Raise `UserError` where there is no token of the Hugging Face Hub."""
    from huggingface_hub import get_token

    if get_token() is None:
        told = "there is no token of the Hub; call `hf auth login`, or set HF_TOKEN"
        raise UserError(told, file="--push-to-hub")


def push_to_hub(folder: Path, name: str) -> str:
    """Upload a folder to the repository OWNER/NAME of the Hugging Face Hub, made where it is not
    there, and return its address. Raises `UserError` where the Hub refuses.
    """
    from huggingface_hub import HfApi

    try:
        repository = HfApi().create_repo(name, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=repository.repo_id, folder_path=folder)
    except (OSError, ValueError) as error:  # as the Hub's errors are
        told = f"the Hub did not take it: {reason(error)}. {folder} is written"
        raise UserError(told, file="--push-to-hub") from None
    return str(repository)


def encoder_of(plan: Plan, name: str, seed: int | None) -> tuple[Row, Stage]:
    """Return the row of a seed, by default the first, and the stage that left its encoder.

    Raises `UserError` where there is none.
    """
    names = [row.variant.name for row in plan.rows]
    if name not in names:
        raise UserError(f"there is no row '{name}'{suggestion(name, names)}", file="--checkpoint")
    rows = {row.seed: row for row in plan.rows if row.variant.name == name}
    seed = min(rows, key=plan.suite.seeds.index) if seed is None else seed
    if seed not in rows:
        known = ", ".join(map(str, rows))
        raise UserError(f"there is no seed {seed}; the suite has {known}", file="--seed")
    chain = rows[seed].chain
    if not chain:
        init = rows[seed].variant.init
        told = "has no encoder" if init == "pixels" else f"trains nothing: its encoder is {init}"
        raise UserError(f"row '{name}' {told}; name one that trains", file="--checkpoint")
    stage = encoder_stage(chain)
    if stage.record is None or stage.status != "cached":
        why = f" ({stage.reason})" if stage.reason else ""
        raise UserError(f"{stage.title} is {stage.status}{why}; run the suite first")
    return rows[seed], stage
