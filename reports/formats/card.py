"""The model card of an encoder: its row of the tables, protocol, data, cost, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from reports.display import fixed
from reports.formats.exports import markdown_escaped
from reports.formats.templates import environment
from reports.frames import SuiteView, flatten
from reports.tables.model import Cell, Column, Table, cell_text, full_label


def model_card(
    view: SuiteView,
    tables: Sequence[Table],
    variant: str,
    seed: int,
    encoder: dict[str, Any],
    license: str,
) -> str:
    """Return the card as Markdown, with the head that the Hugging Face Hub reads.

    `encoder` tells of the encoder `sizes`, `pool`, `mean`, `std`, `image_size`, of its stage `key`
    and `code`, and of its `chain` a sentence a stage.
    """
    cells = [*_cells(tables, variant)]
    figures, results = [], []
    for column, cell in cells:
        label, own = full_label(column), cell.by_seed.get(seed)
        unit = f" ({column.unit})" if column.unit else ""
        text = "–" if own is None else fixed(own, column.digits)
        figures.append((label + unit, text, cell_text(cell, column), cell.n, cell.protocol or "–"))
        if own is not None and column.kind == "metric":
            results.append({"type": column.id, "name": label, "value": own})
    values = (value for _, cell in cells for value in cell.values if seed in value.seeds)
    keys = {key for value in values for key in value.keys}
    records = (record for key, record in view.records.items() if key in keys)
    protocols = {r["kind"]: _sentence(r["protocol"]) for r in records if r["protocol"]}
    data, env = view.provenance["data"], view.provenance["environment"]
    told = {
        "library_name": "timm",
        "license": license,
        "tags": ["image-feature-extraction", "timm", "transformers", "mae-ct"],
        "model-index": [
            {
                "name": f"{variant}, seed {seed}",
                "results": [
                    {
                        "task": {"type": "image-classification"},
                        "dataset": {"name": data["name"], "type": data["name"]},
                        "metrics": results,
                    }
                ],
            }
        ],
    }
    head = "\n".join(f"{name}: {json.dumps(value)}" for name, value in told.items())
    body = environment(markdown_escaped, keep_trailing_newline=True).get_template("card.md").render(
        view=view, variant=variant, seed=seed, encoder=encoder, figures=figures, data=data,
        license=license, protocols=sorted(protocols.items()),
        environment=[(name, env[name]) for name in ("torch", "timm", "device") if env.get(name)],
    )  # fmt: skip
    return f"---\n{head}\n---\n{body}"


def _cells(tables: Sequence[Table], variant: str) -> Iterator[tuple[Column, Cell]]:
    """Yield the cells of a row, each column once."""
    seen = set[str]()
    for table in tables:
        for column in table.columns:
            if (variant, column.id) in table.cells and column.id not in seen:
                seen.add(column.id)
                yield column, table.cells[variant, column.id]


def _sentence(protocol: dict[str, Any]) -> str:
    return "; ".join(f"{name} {value}" for name, value in flatten(protocol).items())
