"""YAML with positions: plain data, where each key and value of it stands, and all mistakes of a text at once."""

from __future__ import annotations

import re
from math import isfinite
from pathlib import PurePath
from typing import Any, NoReturn

import yaml

from compress.errors import CompressError

DEPTH, VALUES = 16, 10_000  # a recipe has four levels and some dozen values; aliases of aliases can make millions
CORE = "tag:yaml.org,2002:"
PLAIN = {  # YAML 1.2 without its riddles; "+0.5" stays text because a limit with a sign is a change, not a bound
    "null": (r"(?:~|null|Null|NULL|)\Z", ["~", "n", "N", ""], lambda text: None),
    "bool": (r"(?:true|True|TRUE|false|False|FALSE)\Z", list("tTfF"), lambda text: text.lower() == "true"),
    "int": (r"-?(?:0|[1-9][0-9]{0,17})\Z", list("-0123456789"), int),
    "float": (
        r"-?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?\Z",
        list("-.0123456789"),
        float,
    ),
}


class Reader(yaml.SafeLoader):
    """Reads `no`, `on`, `012` and dates as text and `1e-3` as a number."""

    yaml_implicit_resolvers = {}
    depth = 0

    def compose_node(self, parent, index):
        self.depth += 1
        if self.depth > DEPTH:
            raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class Writer(yaml.SafeDumper):
    """Quotes text that Reader would take for a number; what YAML has no word for gets a tag that Page refuses."""


def _quotes(text: str) -> str | None:
    """Double quotes for the rarer line breaks, which other styles would read back as spaces."""
    return '"' if re.search("[\x85\u2028\u2029]", text) else None


for kind, (pattern, first, _) in PLAIN.items():
    Reader.add_implicit_resolver(CORE + kind, re.compile(pattern), first)
    Writer.add_implicit_resolver(CORE + kind, re.compile(pattern), first)
Writer.add_representer(str, lambda writer, text: writer.represent_scalar(f"{CORE}str", text, _quotes(text)))
Writer.add_multi_representer(PurePath, lambda writer, path: writer.represent_str(str(path)))
Writer.add_multi_representer(object, lambda writer, thing: writer.represent_scalar(f"!{type(thing).__name__}", "..."))


def show(value: Any) -> str:
    """A value as a message names it: on one line, cut when long."""
    if isinstance(value, dict | list):
        kind = "mapping" if isinstance(value, dict) else "list"
        return f"a {kind}" if value else f"an empty {kind}"
    if value is None:
        return "empty"
    text = str(value).lower() if isinstance(value, bool) else ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def word(key: str) -> str:
    """A key as a message names it: bare when it is an ordinary word."""
    return key if re.fullmatch(r"[\w.<*-]{1,60}", key, re.ASCII) else show(key)


class Page:
    """A text as plain `data`, the places of its keys and values by path, and the mistakes found so far."""

    def __init__(self, text: str, name: str, lines: bool = True):
        self.name = name
        self.lines = lines  # False: places are key paths, for a recipe that was made in Python
        self.keys: dict[tuple, tuple[int, int]] = {}
        self.values: dict[tuple, tuple[int, int]] = {}
        self.unread: set[tuple] = set()
        self.mistakes: list[tuple[tuple[int, int], str]] = []
        root = self._compose(text)
        self.data = None if root is None else self._build(root, ())

    def where(self, path: tuple, place: tuple[int, int] | None = None) -> str:
        """A place as a message names it, the value's at `path` unless given: `file:line:column`, or the key path."""
        named = (place or self._place(path)) if self.lines else [".".join(map(str, path))] if path else []
        return ":".join([self.name, *map(str, named)])

    def refuse(self, path: tuple, message: str, place: tuple[int, int] | None = None) -> None:
        """Note a mistake in the value at `path`; what could not be read at all is not reported twice."""
        if path not in self.unread:
            line = f"{self.where(path, place)}: {message}".replace("\n", " ")  # a method's own words may have two
            self.mistakes.append((place or self._place(path), line))

    def finish(self) -> None:
        """Raise all mistakes as one error, a line each, in the order of the text."""
        if self.mistakes:
            raise CompressError("\n".join(line for _, line in sorted(self.mistakes)))

    def _place(self, path: tuple) -> tuple[int, int]:
        while path and path not in self.values:
            path = path[:-1]
        return self.values.get(path, (1, 1))

    def _fail(self, line: int, column: int, problem: str) -> NoReturn:
        raise CompressError(f"{self.name}:{line}:{column}: YAML: {problem}") from None

    def _compose(self, text: str) -> yaml.Node | None:
        try:
            reader = Reader(text)
        except yaml.reader.ReaderError as error:
            before = text[: error.position].split("\n")
            self._fail(len(before), len(before[-1]) + 1, f"character {error.character:#x} is no text, it must go")
        try:
            return reader.get_single_node()
        except (yaml.MarkedYAMLError, ValueError, OverflowError) as error:  # the last two: "\UFFFFFFFF" and the like
            mark = getattr(error, "problem_mark", None) or reader.get_mark()
            self._fail(mark.line + 1, mark.column + 1, _problem(error))

    def _build(self, node: yaml.Node, path: tuple) -> Any:
        self.values[path] = _place(node)
        if len(path) > DEPTH or len(self.values) > VALUES:
            self._fail(*_place(node), "too many values, it must have a few levels and some dozen values")
        if isinstance(node, yaml.MappingNode) and node.tag == CORE + "map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == CORE + "seq":
            return [self._build(item, (*path, index)) for index, item in enumerate(node.value)]
        if (
            isinstance(node, yaml.ScalarNode)
            and node.tag == CORE + "str"
            and not re.search("[\ud800-\udfff]", node.value)
        ):
            return node.value
        pattern, _, read = PLAIN.get(node.tag.removeprefix(CORE), (None, None, None))
        if isinstance(node, yaml.ScalarNode) and pattern and re.match(pattern, node.value):
            value = read(node.value)
            if not isinstance(value, float) or isfinite(value):
                return value
        self.refuse(path, f"YAML: {_unread(node)}, it must be plain text, a number, a list or a mapping")
        self.unread.add(path)
        return None

    def _mapping(self, node: yaml.MappingNode, path: tuple) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.refuse(path, "YAML: a key is a list or a mapping, it must be a word", _place(key))
            elif key.tag != CORE + "str":
                self.refuse(path, f"YAML: the key {show(key.value)} is no text, it must be a word", _place(key))
            elif key.value in data:
                first = self.keys[*path, key.value][0]
                message = f"YAML: {word(key.value)} stands twice, first in line {first}; it must stand once"
                self.refuse((*path, key.value), message, _place(key))
            else:
                self.keys[*path, key.value] = _place(key)
                data[key.value] = self._build(value, (*path, key.value))
        return data


def _place(node: yaml.Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1


def _unread(node: yaml.Node) -> str:
    tag = node.tag.replace(CORE, "!!")
    value = f" {show(node.value)}" if isinstance(node, yaml.ScalarNode) else ""
    return f"{tag}{value} cannot be read"


def _problem(error: Exception) -> str:
    """PyYAML's complaint in one line, in our words where its own mislead."""
    problem, context = getattr(error, "problem", None) or "", getattr(error, "context", None) or ""
    if not isinstance(error, yaml.MarkedYAMLError):
        return "a number or an escape is too large, it must be smaller"
    if "found character '\\t'" in problem:
        return "a tab stands where only spaces may, it must be spaces"
    if context.startswith("expected a single document"):
        return "a second document starts here, it must be one"
    opened = error.context_mark
    since = f" (since line {opened.line + 1}, column {opened.column + 1})" if opened and problem else ""
    return " ".join(", ".join(filter(None, [context + since, problem])).split())
