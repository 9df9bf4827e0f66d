"""From a rejected configuration to one sentence: which key, where it came from, what to change."""

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any, TypeGuard, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from mxdist.config.schema import Config, Section

Origin = Callable[[tuple[str, ...]], str]  # where a key was set, such as "run.yaml line 3" or "the command line"

EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text (put it in quotes)",
    "path_type": "a path",
    "model_type": "a group of keys",
    "model_attributes_type": "a group of keys",
    "dict_type": "a group of keys",
    "list_type": "a list",
    "tuple_type": "a list",
    "none_required": "null",
}


def explain(error: ValidationError, values: dict[str, Any], origin: Origin) -> str:
    """One sentence about the first mistake; a misspelt key comes before what its absence caused."""
    details = sorted(error.errors(include_url=False), key=lambda detail: detail["type"] != "extra_forbidden")
    return _sentence(details[0], values, origin)


def default_tags() -> dict[tuple[str, str], str]:
    """(section, key) that chooses among variants of a section, with its default: ("data", "task") is "arithmetic"."""
    return {
        (name, str(field.discriminator)): getattr(field.default, str(field.discriminator))
        for name, field in Config.model_fields.items()
        if field.discriminator
    }


def _sentence(detail: ErrorDetails, values: dict[str, Any], origin: Origin) -> str:
    path = _key_path(detail["loc"], values)
    dotted, kind, given = ".".join(path), detail["type"], detail["input"]
    context: dict[str, Any] = detail.get("ctx", {})
    shown = f"{dotted}={_show(given)} ({origin(path)})"
    if kind == "extra_forbidden":
        return _unknown(path, values, origin)
    if kind == "missing":
        tag = _tag_of(path[0], values)
        asked = tuple(tag.partition("=")[0].split("."))
        return f"{dotted} is missing; {tag} ({origin(asked)}) needs it: {_description(path)}"
    if kind == "value_error":
        place = f"section {dotted} of {origin(path)}" if dotted else origin(path)
        return f"{context['error']} ({place})"
    if kind == "union_tag_invalid":
        key = (*path, context["discriminator"].strip("'"))
        return f"{'.'.join(key)}={context['tag']} ({origin(key)}) {_one_of(context['tag'], context['expected_tags'])}"
    if kind == "literal_error":
        return f"{shown} {_one_of(given, context['expected'])}"
    if kind in EXPECTED:
        chooser = next((key for section, key in default_tags() if section == dotted), None)
        return f"{shown} must be {EXPECTED[kind]}" + (f"; did you mean {dotted}.{chooser}={given}?" if chooser else "")
    return f"{shown} {detail['msg'].replace('Input should', 'must').replace('String should', 'must')}"


def _unknown(path: tuple[str, ...], values: dict[str, Any], origin: Origin) -> str:
    dotted, keys = ".".join(path), known_keys()
    variants = keys.get(dotted)
    if variants:  # known, but in another variant of its section
        tag_key = next(key for section, key in default_tags() if section == path[0])
        chosen = values[path[0]][tag_key]
        return (
            f"{dotted} ({origin(path)}) belongs to {path[0]}.{tag_key}={'/'.join(variants)}, not to {chosen}; "
            f"remove it or change {path[0]}.{tag_key}"
        )
    return f"unknown key {dotted} ({origin(path)}); {_suggestion(dotted, values)}"


def _suggestion(dotted: str, values: dict[str, Any]) -> str:
    """What a misspelt key may have meant, or what its section holds."""
    keys = [
        key
        for key, variants in known_keys().items()
        if not variants or _tag_of(key.partition(".")[0], values).rpartition("=")[2] in variants
    ]
    leaf = dotted.rpartition(".")[2]
    same_leaf = [key for key in keys if key.rpartition(".")[2] == leaf]
    same_depth = [key for key in keys if key.count(".") == dotted.count(".")]
    close = get_close_matches(dotted, same_depth, n=1, cutoff=0.75) or same_leaf[:1]
    if close:
        return f"did you mean {close[0]}?"
    section = dotted.rpartition(".")[0]
    siblings = [key.rpartition(".")[2] for key in keys if key.rpartition(".")[0] == section]
    if not siblings:
        section, siblings = "", list(Config.model_fields)
    return f"the keys {'of ' + section if section else 'there'} are {', '.join(siblings)}"


def known_keys() -> dict[str, list[str]]:
    """Every dotted key, sections included, with the variants of its section that have it (none: all do)."""
    keys: dict[str, list[str]] = {}
    for name, field in Config.model_fields.items():
        keys[name] = []
        for section in sections_of(field):
            for key in section.model_fields:
                variants = keys.setdefault(f"{name}.{key}", [])
                if field.discriminator:
                    variants.append(section.model_fields[str(field.discriminator)].default)
    return keys


def sections_of(field: FieldInfo) -> list[type[Section]]:
    """The section that a field of ``Config`` is, or its variants; none for a setting at the top level."""
    return [kind for kind in (field.annotation, *get_args(field.annotation)) if _is_section(kind)]


def no_such_key(dotted: str) -> str:
    """One sentence about a key, or a beginning of keys, that no configuration has."""
    return f"there is no setting {dotted}; {_suggestion(dotted, {})}"


def _is_section(kind: object) -> TypeGuard[type[Section]]:
    return isinstance(kind, type) and issubclass(kind, Section)


def _key_path(location: Iterable[int | str], values: dict[str, Any]) -> tuple[str, ...]:
    """Pydantic's location without the variant's name that it puts after the section's."""
    path = [str(part) for part in location]
    if len(path) > 1 and path[1] == _tag_of(path[0], values).rpartition("=")[2]:
        del path[1]
    return tuple(path)


def _tag_of(section: str, values: dict[str, Any]) -> str:
    for (name, key), default in default_tags().items():
        if name == section:
            return f"{name}.{key}={values.get(name, {}).get(key, default)}"
    return section


def _one_of(given: object, expected: str) -> str:
    choices = [choice.strip(" '") for choice in expected.replace(" or ", ", ").split(", ")]
    close = get_close_matches(str(given), choices, n=1)
    return f"must be one of {', '.join(choices)}" + (f"; did you mean {close[0]}?" if close else "")


def _description(path: tuple[str, ...]) -> str:
    for kind in get_args(Config.model_fields[path[0]].annotation):
        if _is_section(kind) and path[1] in kind.model_fields:
            return (kind.model_fields[path[1]].description or "").rstrip(".")
    return "set it"


def _show(value: object) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else f"{value}"
    return text if len(text) <= 60 else text[:57] + "..."
