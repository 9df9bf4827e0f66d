"""From YAML files and ``key=value`` arguments to a checked configuration, and back to YAML."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mxdist.config.explain import default_tags, explain
from mxdist.config.hf_config import model_settings
from mxdist.config.schema import Config, Gsm8kData, ModelConfig, Section
from mxdist.config.yaml_text import KeyPath, YamlText, read_mapping, read_value
from mxdist.errors import UserError

COMMAND_LINE = "the command line"


@dataclass(frozen=True)
class Place:
    """Where a key was set: a line of a file, or an argument."""

    source: str  # a file's name, or COMMAND_LINE
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source} line {self.line}"


@dataclass
class Origins:
    """Where each key was set, for messages."""

    file: str
    places: dict[KeyPath, Place]

    def set(self, path: KeyPath, places: Mapping[KeyPath, Place]) -> None:
        """``path`` and all below it now come from ``places``."""
        self.places = {key: place for key, place in self.places.items() if key[: len(path)] != path}
        self.places.update(places)

    def of(self, path: KeyPath) -> str:
        """The place of a key, or of the nearest section around it; of a section, also who else set keys of it."""
        around = [path[:length] for length in range(len(path), 0, -1) if path[:length] in self.places]
        own = self.places[around[0]] if around else Place(self.file)
        inside = [place.source for key, place in self.places.items() if key[: len(path)] == path]
        others = [source for source in dict.fromkeys(inside) if source != own.source]
        if path and others and own.source not in inside:
            return " and ".join(others)
        return " and ".join([str(own), *others])


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file, and over it, in their order, further files and ``key=value`` arguments.

    Relative paths of data are made absolute, so that a run can be resumed from another directory.

    Args:
        overrides: names of YAML files, whose keys replace those of the same name, and settings such as ``run.seed=1``.
    Raises:
        UserError: one sentence about the first thing that is wrong, with the key and where it came from.
    """
    document = _read(Path(path))
    origins = Origins(str(path), _places(document, path))
    for override in overrides:
        if "=" not in override and override.endswith((".yaml", ".yml")):
            overlay = _read(Path(override))
            _lay_over(document.values, overlay.values, _places(overlay, override), origins)
        else:
            _set(document.values, override, origins)
    _choose_default_variants(document.values)
    _take_shape_of_checkpoint(document.values, origins)
    try:
        # Through JSON because its strict mode takes text for paths and nothing else for anything else.
        config = Config.model_validate_json(json.dumps(document.values, default=str), strict=True)
    except ValidationError as error:
        raise UserError(explain(error, document.values, origins.of)) from None
    return _with_absolute_paths(config)


def dump_config(config: Config) -> str:
    """Every setting as YAML that ``load_config`` reads back to an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read(path: Path) -> YamlText:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"the configuration file {path} does not exist; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a directory, not a configuration file; name the .yaml file") from None
    except UnicodeDecodeError:
        raise UserError(f"the configuration file {path} is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"the configuration file {path} cannot be read: {error.strerror}") from None
    document = read_mapping(text, str(path))
    for name, field in Config.model_fields.items():
        if isinstance(field.default, Section) and name in document.values and document.values[name] is None:
            document.values[name] = {}  # a section with nothing under it means its defaults
    return document


def _places(document: YamlText, file: Path | str) -> dict[KeyPath, Place]:
    return {key: Place(str(file), line) for key, line in document.lines.items()}


def _lay_over(
    values: dict[str, Any],
    overlay: dict[str, Any],
    places: Mapping[KeyPath, Place],
    origins: Origins,
    path: KeyPath = (),
) -> None:
    """Put the keys of ``overlay`` into ``values``: sections are merged, anything else is replaced."""
    for key, value in overlay.items():
        here = (*path, key)
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _lay_over(values[key], value, places, origins, here)
        else:
            values[key] = value
            origins.set(here, {name: place for name, place in places.items() if name[: len(here)] == here})


def _set(values: dict[str, Any], override: str, origins: Origins) -> None:
    """Set one ``key=value`` in place and note where it came from."""
    name, equals, text = override.partition("=")
    path = tuple(part.strip() for part in name.strip().split("."))
    if not equals or not all(path):
        raise UserError(f"{COMMAND_LINE}: '{override}' is no key=value; write for example run.seed=1")
    target = values
    for depth, part in enumerate(path[:-1], start=1):
        inner = target.setdefault(part, {})
        if not isinstance(inner, dict):
            dotted, parent = ".".join(path), ".".join(path[:depth])
            raise UserError(f"unknown key {dotted} ({COMMAND_LINE}): {parent} has no keys")
        target = inner
    target[path[-1]] = read_value(text, f"{COMMAND_LINE}, {name}")
    origins.set(path, {path: Place(COMMAND_LINE)})


def _choose_default_variants(values: dict[str, Any]) -> None:
    """Settings of a section that has variants belong to the default one unless it names another."""
    for (section, key), default in default_tags().items():
        if isinstance(values.get(section), dict):
            values[section] = {key: default} | values[section]


def _take_shape_of_checkpoint(values: dict[str, Any], origins: Origins) -> None:
    """With ``model.path``, fill in what its config.json says; a key that says otherwise is refused.

    A run's own configuration has every key already: its checkpoint need not be there any more.
    """
    model = values.get("model")
    if not isinstance(model, dict) or not isinstance(path := model.get("path"), str):
        return
    if Path(path).expanduser().is_dir():
        path = model["path"] = str(Path(path).expanduser().absolute())
    elif model.keys() >= ModelConfig.model_fields.keys():
        return
    for key, value in model_settings(path).items():
        if model.setdefault(key, value) not in (value, None):
            raise UserError(
                f"model.{key}={model[key]} ({origins.of(('model', key))}) is not what {path}/config.json says "
                f"({value}); leave it out"
            )
        model[key] = value


def _with_absolute_paths(config: Config) -> Config:
    if not isinstance(config.data, Gsm8kData):
        return config
    paths = {key: Path(getattr(config.data, key)).expanduser() for key in ("train", "eval")}
    found = {key: str(path.absolute()) for key, path in paths.items() if path.is_file()}
    return config.model_copy(update={"data": config.data.model_copy(update=found)})
