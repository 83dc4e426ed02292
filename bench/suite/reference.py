"""What a suite file may say, for people and for editors, both made from the settings themselves.

`markdown` is `docs/suite.md`, `schema_text` is `docs/suite.schema.json`; a test makes both anew.
What a key is for stands in the source, in the comment `#:` before its field.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel

from bench.suite.evaluations import DeclaredSettings, declarable
from bench.suite.load import OWN
from bench.suite.schema import (
    ROW,
    ComparisonSettings,
    DeviceSettings,
    SearchSettings,
    SuiteSettings,
    TableSettings,
    VariantSettings,
)
from maect import evals, methods
from maect.settings import (
    AugmentSettings,
    DataSettings,
    HeadStageSettings,
    ModelSettings,
    NumericsSettings,
    ScheduleSettings,
    Settings,
    ViewSettings,
)

#: a part of a suite: where it stands, its type, and which keys of stages change with it
SECTIONS: tuple[tuple[str, type[BaseModel], str], ...] = (
    ("", SuiteSettings, "None of it is in a key, but for the number of each seed in its stages'."),
    ("variants.NAME", VariantSettings, "The name is in no key: equal stages of rows are one."),
    ("tables[]", TableSettings, "In no key."),
    ("primary, secondary[]", ComparisonSettings, "In no key."),
    ("search", SearchSettings, "In no key; what a cell sets is in those of its stages."),
    ("devices", DeviceSettings, "In no key."),
    ("profiles.NAME", ROW, "In the keys that the parts below name."),
    ("profiles.NAME.data", DataSettings, "In the key of every stage, as are the images."),
    ("profiles.NAME.model", ModelSettings, "In the key of every stage of a row with an encoder."),
    ("profiles.NAME.numerics", NumericsSettings, "In the key of every stage."),
    ("profiles.NAME.mae and all other training stages", ScheduleSettings,
     "In the key of that training stage, and so of all that is built on it; told there in steps."),
    ("profiles.NAME.METHOD_head", HeadStageSettings, "As above."),
    *((f"profiles.NAME.{name}", methods.get(name).settings, "As above.")
      for name in methods.names() if methods.get(name).settings is not HeadStageSettings),
    ("profiles.NAME.augment.NAME", AugmentSettings, "In the keys of stages that see the views."),
    ("profiles.NAME.augment.NAME.view0", ViewSettings, "As above."),
    ("profiles.NAME.evaluations.NAME", DeclaredSettings,
     "In the key of that evaluation and, where it reads other tokens or images, of its features."),
)  # fmt: skip
#: keys of these parts that are in no stage's key nevertheless
_IN_NO_KEY = {
    DataSettings: ("path", "stage", "train_images", "classes"),
    NumericsSettings: ("checkpoint_activations",),
    ROW: ("about",),
    DeclaredSettings: ("rows", "seeds"),
}
_INTRODUCTION = """\
# Suite files

<!-- made by `python -m bench validate --reference` from the comments in the settings' source -->

`python -m bench init` writes a first one, with comments; `suites/` has more. `bench validate FILE`
names every fault at once. Editors (VS Code with the YAML extension, and others that speak to its
server) complete and check a file that begins with
`# yaml-language-server: $schema=suite.schema.json`; the schema is
[suite.schema.json](suite.schema.json), or `bench validate --schema`.

A profile's settings hold for all rows. Over them are laid, in this order, the profile's `variants`
entry of a row, the variant's own `set`, a cell of the search, and `--set PATH=VALUE`. Mappings
merge, all else replaces. `mae.steps: 9` stands for `mae: {steps: 9}`. Numbers, words and lists are
those of YAML 1.2: `1e-4` is a number, `on` a word.

**Keys**: what a stage's key holds decides when it runs again. Each part says whether its settings
are in keys; settings in *italics* are not, where the others of the part are.
"""


@cache
def told(kind: type[BaseModel]) -> dict[str, str]:
    """Return what the comments before a type's fields say of them, by field."""
    found, lines = dict[str, str](), list[str]()
    if kind is ROW:
        found = {name: _first(methods.get(name).settings) for name in methods.names()}
    for base in reversed(kind.__mro__):
        module = vars(sys.modules[base.__module__])
        if not issubclass(base, Settings) or module.get(base.__name__) is not base:
            continue  # made by `declarable`, it has fields of its bases only
        for line in inspect.getsource(base).splitlines():
            if field := re.match(r"    (\w+): ", line):
                found |= {field[1]: " ".join(lines)} if lines else {}
                lines = []
            elif line.startswith("    #:"):
                lines.append(line.strip()[3:])
    return {name: found.get(name, "") for name in kind.model_fields}


# ------------------------------------------------------------------------------------ for editors


@cache
def schema() -> dict[str, Any]:
    """Return the JSON schema of a suite file. It allows what `validate` may refuse for what values
    mean together."""
    kinds = {e: declarable(e) for e in evals.names()}
    models: list[type[BaseModel]] = [SuiteSettings, ROW, *kinds.values()]
    definitions: dict[str, Any] = {}
    for model in models:
        made = model.model_json_schema(ref_template="#/$defs/{model}")
        definitions |= made.pop("$defs", {})
        definitions[model.__name__] = made
    described = {m.__name__: m for model in models for m in _models(model)}
    for name, one in definitions.items():
        for key, field in one["properties"].items():
            if text := told(described[name])[key]:
                field["description"] = text
    suite, row = definitions.pop("SuiteSettings"), definitions.pop("RowSettings")
    for one in (row, *definitions.values()):  # of an overlay, which may hold a part
        if one is not definitions["ComparisonSettings"]:
            one.pop("required", None)
    # `mae.steps: 9`, of which nothing is said
    dotted: dict[str, Any] = {"patternProperties": {r"^[^.]+(\.[^.]+)+$": {}}}
    closed = dotted | {"additionalProperties": False}
    named = {name: {"$ref": f"#/$defs/{kind.__name__}"} for name, kind in kinds.items()}
    others = [
        {"if": {"properties": {"evaluation": {"const": name}}, "required": ["evaluation"]},
         "then": one}
        for name, one in named.items()
    ]  # fmt: skip
    any_evaluation = {"type": "object", "allOf": others}
    row["properties"]["augment"] |= dotted
    row["properties"]["evaluations"] |= {
        "properties": named, "additionalProperties": any_evaluation, **dotted
    }  # fmt: skip
    overlay = row | closed
    profile = {name: suite["properties"][name] for name in (*OWN, "search")}
    # of which a profile may give a part
    profile["search"] = {"type": "object", "description": profile["search"]["description"]}
    rows = {"anyOf": [{"$ref": "#/$defs/Row"}, {"type": "null"}]}
    profile["variants"] = {"type": "object", "additionalProperties": rows}
    definitions |= {"Row": overlay}
    definitions["Profile"] = {
        "type": "object", "properties": row["properties"] | profile, **closed
    }  # fmt: skip
    definitions["VariantSettings"]["properties"]["set"] |= {"$ref": "#/$defs/Row"}
    suite["properties"]["profiles"]["additionalProperties"] = {"$ref": "#/$defs/Profile"}
    for name in ("patternProperties", "propertyNames"):
        suite["properties"]["profiles"].pop(name, None)
    suite |= {"$schema": "https://json-schema.org/draft/2020-12/schema", "$defs": definitions}
    suite["required"].remove("profiles")  # they may all be another file's
    return dict(_plain(suite, {"title": "A suite of maect-bench"}))


def schema_text() -> str:
    """Return the schema as it is written into a file."""
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


def _models(kind: Any) -> Iterator[type[BaseModel]]:
    """Yield the types of settings in an annotation, and in their fields."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
        for field in kind.model_fields.values():
            yield from _models(field.annotation)
    for inner in get_args(kind):
        yield from _models(inner)


def _plain(value: Any, top: dict[str, Any] | None = None) -> Any:
    """Return a schema without the titles and docstrings of Python's types."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if not isinstance(value, dict):
        return value
    noise = {"title"} if isinstance(value.get("title"), str) else set()
    noise |= {"description"} if "properties" in value and "description" in value else set()
    return (top or {}) | {k: _plain(v) for k, v in value.items() if k not in noise}


# ------------------------------------------------------------------------------------- for people


def markdown() -> str:
    """Return the reference of all keys of a suite file."""
    parts = [_INTRODUCTION]
    for place, kind, keys in SECTIONS:
        own = {*kind.model_fields}
        if issubclass(kind, ScheduleSettings) and kind is not ScheduleSettings:  # told there
            own -= ScheduleSettings.model_fields.keys() - kind.__annotations__.keys()
        heading = f"`{place}`" if place else "The file"
        rows = _rows(kind, kind.model_json_schema(), own, _IN_NO_KEY.get(kind, ()))
        parts.append(f"## {heading}\n\n{_first(kind)} {keys}\n\n{rows}")
    for name in evals.names():
        evaluator = evals.get(name)
        own = {*evaluator.settings.model_fields} - {*DeclaredSettings.model_fields}
        rows = _rows(declarable(name), declarable(name).model_json_schema(), own, ())
        parts.append(
            f"### `{name}`: {evaluator.label}\n\n{rows if own else 'No settings of its own.'}\n"
        )
    return "\n".join(parts)


def _first(kind: type[BaseModel]) -> str:
    """Return the first paragraph of a type's docstring."""
    return " ".join((inspect.getdoc(kind) or "").partition("\n\n")[0].split())


def _rows(kind: type[BaseModel], schema: dict[str, Any], own: set[str], keyless: Any) -> str:
    lines = ["| key | value | default | |", "| --- | --- | --- | --- |"]
    for name, field in schema["properties"].items():
        if name in own:
            key = f"*`{name}`*" if name in keyless else f"`{name}`"
            default = "required" if name in schema.get("required", ()) else _default(field)
            text = told(kind)[name].replace("|", "\\|")
            lines.append(f"| {key} | {_type(field)} | {default} | {text[:1].upper() + text[1:]} |")
    return "\n".join(lines) + "\n"


def _default(field: dict[str, Any]) -> str:
    if "default" not in field or isinstance(field["default"], dict):
        return ""
    return f"`{json.dumps(field['default'], ensure_ascii=False)}`"


def _type(field: dict[str, Any]) -> str:
    """Return in words what a schema allows."""
    if "anyOf" in field:
        return ", or ".join(dict.fromkeys(_type(one) for one in field["anyOf"]))
    if "enum" in field or "const" in field:
        return ", ".join(f"`{one}`" for one in field.get("enum", [field.get("const")]))
    if "$ref" in field:
        return "a mapping"
    match field.get("type"):
        case "array":
            inner: dict[str, Any] = field.get("items") or {}
            return "a range [low, high]" if "prefixItems" in field else f"a list of: {_type(inner)}"
        case "integer" | "number" as kind:
            words = "whole number" if kind == "integer" else "number"
            limits = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to",
                      "exclusiveMaximum": "below"}  # fmt: skip
            within = [f"{word} {field[name]:g}" for name, word in limits.items() if name in field]
            return " ".join([words, *within])
        case "null":
            return "`null`"
        case "string":
            return "text"
        case "boolean":
            return "`true`, `false`"
    return "a mapping" if field.get("type") == "object" else "anything"
