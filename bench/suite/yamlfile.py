"""Reading YAML strictly, with the line of every value kept for error messages.

Scalars follow YAML 1.2's core schema, so `1e-4` is a number and `on`, `yes`, `10:30` are strings.
Duplicate keys and tags are errors, and aliases may not blow a small file up.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from bench.errors import UserError, nearest_file, reason, several, short

MAX_BYTES = 1_000_000
MAX_NODES = 20_000
MAX_DEPTH = 40
#: whole numbers beyond this change when read as JSON; no setting comes near it
MAX_INT = 2**53
MAX_FLOAT = 1e100

_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **{s + w: float(f"{s}inf") for s in ("", "+", "-") for w in (".inf", ".Inf", ".INF")},
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}

#: a file and a line of it; an argument of the command line has no lines
Place = tuple[str, int | None]

#: part of PyYAML's complaint -> what to do about it
_CURES = {
    "'\\t'": "indent with spaces, not tabs",
    "mapping values are not allowed": "a value that holds ': ' needs quotes",
    "alias": "an alias (*name) needs its anchor (&name) before it",
    "single document": "take the line '---' out, one file holds one suite",
    "quoted scalar": "a quote is not closed",
    "expected ':'": "after a key comes ': ' and its value",
    "',' or": "a bracket is not closed, or a comma is missing",
    "block end": "keys of one mapping stand at one indentation",
}


class Map(dict[str, Any]):
    """A mapping that knows where it stands, file and line, and each of its keys."""

    def __init__(self, file: str, line: int | None = None) -> None:
        super().__init__()
        self.place = (file, line)
        self.places: dict[str, Place] = {}

    def put(self, key: str, value: Any, file: str, line: int | None) -> None:
        """Set a key that stands on a line of a file."""
        self[key] = value
        self.places[key] = (file, line)


class Seq(list[Any]):
    """A list that knows where it stands, file and line, and each of its items."""

    def __init__(self, file: str, line: int | None = None) -> None:
        super().__init__()
        self.place = (file, line)
        self.places: list[Place] = []


def load(path: Path) -> Map:
    """Return the mapping a YAML file holds. Raises `UserError` naming file and line."""
    value = _parse(_text(path), str(path), lines=True)
    if not isinstance(value, Map):
        raise UserError("should be a mapping that starts with 'suite: NAME'", file=path)
    return value


def number(text: str) -> int | float | None:
    """Return the number that a text is under YAML 1.2's core schema, or None."""
    if _INT.fullmatch(text):
        # a text of thousands of digits is too long for int()
        return int(text) if len(text) < 20 else float("inf")
    return float(text) if _FLOAT.fullmatch(text) else None


def value(text: str, origin: str) -> Any:
    """Return the value of one YAML text, as of an argument; `origin` stands for its file.

    Raises `UserError`.
    """
    return _parse(text, origin, lines=False)


def _text(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():
            raise UserError("is no file; give the path of a suite's .yaml file", file=path)
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise UserError(f"is larger than {MAX_BYTES} bytes, so no suite file", file=path)
        return data.decode("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        folders = Path("suites"), path.parent / "suites", Path(__file__).parents[2] / "suites"
        near = nearest_file(path, *folders, pattern="*.y*ml")
        raise UserError(f"there is no suite file '{short(str(path), 240)}'{near}") from None
    except OSError as error:
        raise UserError(f"cannot be read: {reason(error)}; check the path", file=path) from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError("is not UTF-8 text; save it as UTF-8", file=path, line=line) from None


def _parse(text: str, file: str, *, lines: bool) -> Any:
    line = None
    try:
        reader = _Reader(text, file, lines)
        root = reader.get_single_node()
        return None if root is None else reader.build(root, 0)
    except yaml.MarkedYAMLError as error:
        message, line = _complaint(error)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        message = f"not valid YAML: the character U+{error.character:04X} is not allowed"
        message += "; take it out"
    except RecursionError:
        message = "nested too deeply; write it flatter"
    except (ValueError, OverflowError):  # an escape such as "\U00110000"
        message = "not valid YAML: an escape (\\x.., \\u..) in quotes names no character"
    raise UserError(message, file=file, line=line if lines else None)


def _complaint(error: yaml.MarkedYAMLError) -> tuple[str, int | None]:
    """Return what PyYAML says with what to do about it, and the line of the mistake.

    The line is that of the beginning where something is not closed.
    """
    problem = str(error.problem or error.context)
    begin, end = error.context_mark, error.problem_mark
    line = end.line + 1 if end else begin.line + 1 if begin else None
    whole = f"{error.context} {problem}"
    cure = next((cure for part, cure in _CURES.items() if part in whole), None)
    cure = cure or "check the indentation, quotes and brackets around it"
    if begin and "not closed" in cure:
        line = begin.line + 1
    return f"not valid YAML: {problem}; {cure}", line


class _Reader(yaml.SafeLoader):
    """Turns YAML text into values that know their places. Raises `UserError` past the limits."""

    def __init__(self, text: str, file: str, numbered: bool) -> None:
        super().__init__(text)
        self.file, self.numbered = file, numbered
        self.count = self.size = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise self.fail(f"the tag '{short(tag)}' is not allowed; write plain values", event)
        node: yaml.Node | None = super().compose_node(parent, index)
        return node

    def place(self, node: yaml.Node) -> Place:
        return self.file, node.start_mark.line + 1 if self.numbered else None

    def fail(self, message: str, node: yaml.Node) -> UserError:
        return UserError(message, file=self.file, line=self.place(node)[1])

    def build(self, node: yaml.Node, depth: int) -> Any:
        self.count += 1
        if self.count > MAX_NODES or self.size > MAX_BYTES or depth > MAX_DEPTH:
            raise self.fail("expands to too many values; write fewer aliases (*name)", node)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if isinstance(node, yaml.SequenceNode):
            items = Seq(*self.place(node))
            for child in node.value:
                items.append(self.build(child, depth + 1))
                items.places.append(self.place(child))
            return items
        assert isinstance(node, yaml.MappingNode)
        return self._mapping(node, depth)

    def _text(self, node: yaml.ScalarNode) -> str:
        text = str(node.value)
        self.size += len(text)
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise self.fail("half a surrogate pair is no character; take it out", node)
        return text

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        text = self._text(node)
        if node.style is not None:  # quoted, or a block
            return text
        found = _WORDS[text] if text in _WORDS else number(text)
        if isinstance(found, int | float):
            limit = MAX_INT if isinstance(found, int) else MAX_FLOAT
            if not abs(found) <= limit:
                message = f"{short(text)} is no usable number; write a finite, smaller one"
                raise self.fail(message, node)
        return text if found is None and text not in _WORDS else found

    def _mapping(self, node: yaml.MappingNode, depth: int) -> Map:
        result = Map(*self.place(node))
        with several() as each:
            for key_node, value_node in node.value:
                with each():
                    self._pair(result, key_node, value_node, depth)
        return result

    def _pair(self, result: Map, key_node: yaml.Node, value_node: yaml.Node, depth: int) -> None:
        """Put a key and its value into `result`."""
        if not isinstance(key_node, yaml.ScalarNode):
            raise self.fail("a key must be a plain word; write 'name: value'", key_node)
        key = self._text(key_node)
        if key == "<<":
            raise self.fail("merge keys (<<) are not supported; write the values out", key_node)
        if key in result:
            first = f" (first on line {result.places[key][1]})" if self.numbered else ""
            raise self.fail(f"'{short(key)}' stands twice{first}; keep one", key_node)
        result.put(key, self.build(value_node, depth + 1), *self.place(key_node))


def locate(tree: Map | Seq, path: tuple[Any, ...]) -> Place:
    """Return the file and line of the deepest part of `path` that stands in `tree`."""
    place, inner = tree.place, tree
    for step in path:
        try:
            place, inner = inner.places[step], inner[step]
        except (AttributeError, KeyError, IndexError, TypeError):
            break
    return place


def overlay(path: str, new: Any, place: Place) -> Map:
    """Return the mapping that sets one dotted path, every part of it at `place`.

    Raises `UserError` where the path has a part without a name, or too many.
    """
    steps = path.split(".")
    if not all(steps) or len(steps) > MAX_DEPTH:
        what = "too many parts" if all(steps) else "a part without a name"
        message = f"'{short(path)}' has {what}; write a setting's path, e.g. mae.steps"
        raise UserError(message, file=place[0], line=place[1])
    for step in reversed(steps):
        tree = Map(*place)
        tree.put(step, new, *place)
        new = tree
    return tree


def undotted(tree: Map) -> Map:
    """Return settings in which `mae.steps: 9` stands for `mae: {steps: 9}`, at any depth.

    Raises `UserError` where one stands twice.
    """
    result = Map(*tree.place)
    for key, given in tree.items():
        place = tree.places[key]
        whole = overlay(key, undotted(given) if isinstance(given, Map) else given, place)
        if _clash(result, whole):
            message = f"'{short(key)}' stands twice; keep one"
            raise UserError(message, file=place[0], line=place[1])
        result = merge(result, whole)
    return result


def _clash(one: Any, other: Any) -> bool:
    """Return whether two values set something in common."""
    if not (isinstance(one, Map) and isinstance(other, Map)):
        return True
    return any(_clash(one[key], other[key]) for key in one.keys() & other.keys())


def merge(*trees: Map) -> Map:
    """Return a copy of the first mapping with the others laid over it.

    Mappings merge, all else replaces. A value keeps its place; a mapping that several trees make
    up has the place of the first.
    """
    result = Map(*trees[0].place)
    for tree in trees:
        for key, new in tree.items():
            place, old = tree.places[key], result.get(key)
            if isinstance(new, Map) and isinstance(old, Map):
                new, place = merge(old, new), result.places[key]
            elif isinstance(new, Map):
                new = merge(new)
            result.put(key, new, *place)
    return result
