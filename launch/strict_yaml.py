"""Reads YAML that somebody else may have written: bounded in size, depth and expansion, and without repeated keys."""

from __future__ import annotations

import re
import reprlib
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, SequenceNode

#: bytes of a file, nested collections, and values after every alias has been replaced by what it stands for
MAX_BYTES, MAX_DEPTH, MAX_VALUES = 1 << 20, 32, 100_000
#: digits of a whole number; Python refuses to print one of some thousands
MAX_DIGITS = 400


class _Loader(yaml.SafeLoader):
    """Takes 10:13 for text, as YAML 1.2 does, and not for a number of base 60."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, re.compile(r"(?!.*:)" + form.pattern, form.flags) if tag.endswith((":int", ":float")) else form)
        for tag, form in resolvers
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Refused(ValueError):
    def __init__(self, problem: str, line: int) -> None:
        super().__init__(f"line {line}: {problem}")


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file, or raise a one-line ValueError that says what is wrong with it, and where.

    Raises OSError if the file cannot be read.
    """
    with open(path, "rb") as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise ValueError(f"is larger than {MAX_BYTES >> 20} MiB; give a YAML file with the settings of a run")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8 text; give a YAML file") from None
    try:
        _check_depth(text)
        node = yaml.compose(text, Loader=_Loader)
        if node is None:
            return None
        _check_values(node)
        return yaml.SafeLoader("").construct_document(node)
    except _Refused:
        raise
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError, TypeError, AttributeError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}not YAML: {' '.join(str(problem).split())}") from None


def _check_depth(text: str) -> None:
    """Refuse deep nesting before anything recurses into it."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise _Refused(f"is nested more than {MAX_DEPTH} deep; flatten it", _line(event))
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _check_values(root: Node) -> None:
    """Refuse repeated keys, and aliases that contain themselves or stand for more values than a run can have."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: Node) -> int:
        line = _line(node)
        if id(node) in open_nodes:
            raise _Refused("an alias contains itself; write the values out", line)
        if id(node) not in sizes:
            open_nodes.add(id(node))
            children: list[Node] = []
            if isinstance(node, MappingNode):
                _check_keys(node)
                children = [part for pair in node.value for part in pair]
            elif isinstance(node, SequenceNode):
                children = node.value
            elif node.tag.endswith(":int") and len(node.value) > MAX_DIGITS:
                raise _Refused(f"a number of more than {MAX_DIGITS} digits; give a smaller one", line)
            total = 1
            for child in children:
                total += size(child)
                if total > MAX_VALUES:
                    raise _Refused(f"aliases expand to more than {MAX_VALUES} values; write the values out", line)
            sizes[id(node)] = total
            open_nodes.remove(id(node))
        return sizes[id(node)]

    size(root)


def _check_keys(node: MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        name, line = str(key.value).replace("-", "_"), _line(key)
        if name in lines:
            problem = f"{reprlib.repr(key.value)} is given twice, first in line {lines[name]}; keep one of them"
            raise _Refused(problem, line)
        lines[name] = line


def _line(place: Node | yaml.Event) -> int:
    return 0 if place.start_mark is None else place.start_mark.line + 1
