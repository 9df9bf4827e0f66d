"""YAML text to plain values, remembering the line of every key.

The scalars are those of YAML 1.2: ``1e-6`` is a number, ``off`` and ``2026-01-02`` are text, ``010`` is ten. (PyYAML by
itself follows 1.1, where each of these is something else.) A key that stands twice is an error.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import yaml

from mxdist.errors import UserError

KeyPath = tuple[str, ...]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012  (a class attribute of PyYAML's, filled below)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", None),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})\\Z"), _first or list("-+.0123456789")
    )


def _whole_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


@dataclass
class YamlText:
    """A mapping read from text, and the line (from 1) on which each of its keys stands."""

    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[KeyPath, int] = field(default_factory=dict)


def read_mapping(text: str, where: str) -> YamlText:
    """Read a mapping of mappings; an empty text is an empty one.

    Args:
        where: the file's name, for messages.
    Raises:
        UserError: not YAML, a key twice, or no mapping.
    """
    loader = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return YamlText()
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{where} holds no keys; write settings such as 'run: {{seed: 0}}'")
        lines: dict[KeyPath, int] = {}
        return YamlText(_mapping(loader, root, (), lines, where, open_nodes=[]), lines)
    except yaml.YAMLError as error:
        raise UserError(f"{where}{_place(error)}: not valid YAML ({_problem(error)}); mend that line") from None
    finally:
        if loader is not None:
            loader.dispose()


def read_value(text: str, where: str) -> Any:
    """Read one value, as it stands after the '=' of a ``key=value`` argument; nothing is null."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{where}: '{text}' is not a valid YAML value ({_problem(error)}); quote it") from None


def _mapping(
    loader: _Loader,
    node: yaml.MappingNode,
    path: KeyPath,
    lines: dict[KeyPath, int],
    where: str,
    open_nodes: list[yaml.Node],
) -> dict[str, Any]:
    _check_keys(node.value, path, where)
    if any(node is other for other in open_nodes):
        raise UserError(f"{where} line {node.start_mark.line + 1}: {'.'.join(path)} contains itself; remove the alias")
    loader.flatten_mapping(node)
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = (*path, str(key_node.value))
        lines[key] = key_node.start_mark.line + 1
        if isinstance(value_node, yaml.MappingNode):
            values[key[-1]] = _mapping(loader, value_node, key, lines, where, [*open_nodes, node])
        else:
            values[key[-1]] = loader.construct_object(value_node, deep=True)
    return values


def _check_keys(pairs: Iterable[tuple[yaml.Node, yaml.Node]], path: KeyPath, where: str) -> None:
    seen: dict[str, int] = {}
    for key_node, value_node in pairs:
        name, line = str(key_node.value), key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise UserError(f"{where} line {line}: a key is a name, not a list or a mapping; mend that line")
        if isinstance(value_node, yaml.MappingNode) and value_node.tag != "tag:yaml.org,2002:map":
            raise UserError(f"{where} line {line}: the tag {value_node.tag} means nothing here; remove it")
        if name in seen:
            dotted = ".".join((*path, name))
            raise UserError(f"{where} line {line}: {dotted} stands there and on line {seen[name]}; keep one of them")
        seen[name] = line


def _place(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    return f" line {mark.line + 1}" if mark else ""


def _problem(error: Exception) -> str:
    problem = getattr(error, "problem", None) or str(error)
    return " ".join(problem.split())
