"""Every setting as text: its key, its default, what it may be and what it means. For ``mxdist settings``."""

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from mxdist.config.explain import no_such_key, sections_of
from mxdist.config.schema import Config, Section
from mxdist.errors import UserError

_NAMES = {int: "whole number", float: "number", bool: "true or false", str: "text", Path: "path"}
_BOUNDS = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))  # of annotated_types, as pydantic keeps them
_INDENT = "      "


@dataclass(frozen=True)
class Setting:
    """One key of the configuration."""

    key: str
    default: str  # as YAML has it; empty where it has to be given
    kind: str
    meaning: str


def listing(prefix: str, width: int) -> list[str]:
    """Lines of at most ``width`` columns about every key that begins with ``prefix``, by section.

    Raises:
        UserError: there is none.
    """
    lines: list[str] = []
    for heading, settings in _sections():
        chosen = [setting for setting in settings if setting.key.startswith(prefix)]
        if chosen:
            lines += [*([""] if lines else []), *textwrap.wrap(heading, width)]
            lines += [line for setting in chosen for line in _lines(setting, width)]
    if not lines:
        raise UserError(no_such_key(prefix))
    return lines


def _sections() -> Iterator[tuple[str, list[Setting]]]:
    """What a section is about, with its settings; the variants of a section follow the key that chooses among them."""
    top = [_setting(name, field) for name, field in Config.model_fields.items() if not sections_of(field)]
    yield "At the top level:", top
    for name, field in Config.model_fields.items():
        variants = sections_of(field)
        if not field.discriminator:
            for section in variants:
                yield f"{name}: {_about(section)}", _settings(name, section)
            continue
        tag = str(field.discriminator)
        choices = [section.model_fields[tag].default for section in variants]
        chooser = Setting(f"{name}.{tag}", _shown(getattr(field.default, tag)), ", ".join(choices), "")
        yield f"{name}: which of the following it is.", [chooser]
        for choice, section in zip(choices, variants, strict=True):
            settings = [setting for setting in _settings(name, section) if setting.key != chooser.key]
            yield f"{name}, with {chooser.key}={choice}: {_about(section)}", settings


def _settings(name: str, section: type[Section]) -> list[Setting]:
    return [_setting(f"{name}.{key}", field) for key, field in section.model_fields.items()]


def _about(section: type[Section]) -> str:
    return " ".join((section.__doc__ or "").partition("\n\n")[0].replace("``", "").split())


def _setting(key: str, field: FieldInfo) -> Setting:
    default = "" if field.is_required() else _shown(field.default)
    return Setting(key, default, _kind(field.annotation, field.metadata), field.description or "")


def _shown(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "[]" if value == () else f"{value:g}" if isinstance(value, float) else str(value)


def _kind(annotation: Any, metadata: list[Any]) -> str:
    """In words, with its bounds."""
    if get_origin(annotation) in (Union, UnionType):
        kinds = [part for part in get_args(annotation) if part is not NoneType]
        words = " or ".join(dict.fromkeys(_kind(part, metadata) for part in kinds))
        return words + (" or null" if NoneType in get_args(annotation) else "")
    if get_origin(annotation) is Literal:
        return ", ".join(map(str, get_args(annotation)))
    if hasattr(annotation, "__metadata__"):
        return _kind(get_args(annotation)[0], [*metadata, *annotation.__metadata__])
    bounds = [f"{sign} {getattr(item, name):g}" for item in metadata for name, sign in _BOUNDS if hasattr(item, name)]
    if get_origin(annotation) is tuple:
        return "list of {modules, recipe}"
    return " ".join([_NAMES.get(annotation, "group of keys"), *bounds])


def _lines(setting: Setting, width: int) -> list[str]:
    given = f"= {setting.default}" if setting.default else "has to be given"
    text = f"[{setting.kind}] {setting.meaning}".rstrip()
    return [
        *textwrap.wrap(f"  {setting.key} {given}", width, subsequent_indent=_INDENT, break_long_words=False),
        *textwrap.wrap(text, width, initial_indent=_INDENT, subsequent_indent=_INDENT, break_long_words=False),
    ]
