"""Dataclasses of plain values and numpy arrays in two files, JSON and safetensors: nothing that is loaded can run."""

import dataclasses
import json
import types
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
from safetensors.numpy import load_file, save_file

ARRAY = "array"  # {"array": name}: look in the other file
Record = TypeVar("Record")


def write_records(path: Path, records: list[Any]) -> None:
    """Write ``path``.json and ``path``.safetensors."""
    arrays: dict[str, np.ndarray] = {}
    text = json.dumps([_pack(record, arrays) for record in records])
    path.with_suffix(".json").write_text(text, encoding="utf-8")
    save_file(arrays, path.with_suffix(".safetensors"))


def read_records(path: Path, kind: type[Record]) -> list[Record]:
    """What ``write_records`` wrote.

    Raises:
        KeyError, TypeError: the records are not of this kind.
    """
    arrays = load_file(path.with_suffix(".safetensors"))
    return [_unpack(kind, value, arrays) for value in json.loads(path.with_suffix(".json").read_text("utf-8"))]


def _pack(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, np.ndarray):
        name = str(len(arrays))
        arrays[name] = np.ascontiguousarray(value)
        return {ARRAY: name}
    if dataclasses.is_dataclass(value):
        return {field.name: _pack(getattr(value, field.name), arrays) for field in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [_pack(item, arrays) for item in value]
    if isinstance(value, dict):
        return {key: _pack(item, arrays) for key, item in value.items()}
    return value


def _unpack(kind: Any, value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """``value`` as what the annotation ``kind`` says it was."""
    if get_origin(kind) in (Union, types.UnionType):
        if value is None:
            return None
        [kind] = [choice for choice in get_args(kind) if choice is not type(None)]
    if kind is np.ndarray:
        return arrays[value[ARRAY]]
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = get_type_hints(kind)
        return kind(**{name: _unpack(hints[name], item, arrays) for name, item in value.items()})
    if get_origin(kind) in (tuple, list):
        inner = get_args(kind)[0]
        return get_origin(kind)(_unpack(inner, item, arrays) for item in value)
    if get_origin(kind) is dict:
        inner = get_args(kind)[1]
        return {key: _unpack(inner, item, arrays) for key, item in value.items()}
    return value
