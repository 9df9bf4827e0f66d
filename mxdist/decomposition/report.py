"""What a survey found, grouped: per tensor, layer, kind and in total; written to JSON and read back."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxdist import __version__
from mxdist.decomposition.selection import Left, kind_order
from mxdist.decomposition.survey import Measured
from mxdist.errors import UserError
from mxdist.quant.moments import DELTA_BINS, DELTA_RANGE, Moments
from mxdist.quant.recipe import Recipe

FORMAT = 1
"""Version of the JSON; it changes when a reader of the old one would fail or misread."""


@dataclass(frozen=True, slots=True)
class Group:
    """Some tensors together. `sums` by recipe; None when one of the tensors holds NaN or Inf, for so do the sums."""

    name: str
    tensors: int
    elements: int
    sums: dict[str, Moments] | None

    def figures(self, recipe: str) -> dict[str, float]:
        """The figures of `Moments.report`; all NaN where there are no sums."""
        if self.sums is None:
            return dict.fromkeys(Moments().report(), math.nan)
        return self.sums[recipe].report()


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that `mxdist decompose` has to say about a checkpoint."""

    path: str
    command: str
    recipes: tuple[Recipe, ...]
    total: Group
    kinds: tuple[Group, ...]
    layers: tuple[Group, ...]
    tensors: tuple[Group, ...]
    left: tuple[dict[str, Any], ...]  # name, shape, dtype, reason
    nonfinite: tuple[dict[str, Any], ...]  # name, position, value
    version: str = __version__

    @classmethod
    def build(
        cls, path: str, command: str, recipes: Sequence[Recipe], measured: Sequence[Measured], left: Sequence[Left]
    ) -> Report:
        """Group what was measured, which is at least one tensor."""
        kinds = _grouped(measured, lambda item: item.linear.kind)
        layers = _grouped(measured, lambda item: str(item.linear.layer))
        return cls(
            path=path,
            command=command,
            recipes=tuple(recipes),
            total=_group("total", measured),
            kinds=tuple(sorted(kinds, key=lambda group: kind_order(group.name))),
            layers=tuple(sorted(layers, key=lambda group: int(group.name))),
            tensors=tuple(_group(item.linear.tensor.name, [item]) for item in measured),
            left=tuple(
                {"name": one.tensor.name, "shape": list(one.tensor.shape), "dtype": one.tensor.dtype}
                | {"reason": one.reason}
                for one in left
            ),
            nonfinite=tuple(
                {"name": item.linear.tensor.name, "position": list(item.nonfinite.position)}
                | {"value": item.nonfinite.value}
                for item in measured
                if item.nonfinite is not None
            ),
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Of the recipes, in the order asked for."""
        return tuple(recipe.name for recipe in self.recipes)

    def to_dict(self) -> dict[str, Any]:
        """Return what the JSON file holds; figures that do not exist are null, tensors have no histogram."""
        return {
            "format": FORMAT,
            "mxdist_version": self.version,
            "command": self.command,
            "path": self.path,
            "recipes": {recipe.name: recipe.to_dict() for recipe in self.recipes},
            "delta_histogram": {"range": list(DELTA_RANGE), "bins": DELTA_BINS},
            "total": self._group_dict(self.total),
            "kinds": [self._group_dict(group) for group in self.kinds],
            "layers": [self._group_dict(group) for group in self.layers],
            "tensors": [self._group_dict(group, histogram=False) for group in self.tensors],
            "left": list(self.left),
            "nonfinite": list(self.nonfinite),
        }

    def _group_dict(self, group: Group, histogram: bool = True) -> dict[str, Any]:
        by_recipe = {}
        for name in self.names:
            figures = {key: value if math.isfinite(value) else None for key, value in group.figures(name).items()}
            sums = None if group.sums is None else group.sums[name].to_dict()
            if sums is not None and not histogram:
                del sums["histogram"]
            by_recipe[name] = {"figures": figures, "sums": sums}
        return {"name": group.name, "tensors": group.tensors, "elements": group.elements, "recipes": by_recipe}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """Inverse of `to_dict`, except for the histograms of single tensors, which are not kept.

        Raises:
            ValueError: `data` has another format.
        """
        if data.get("format") != FORMAT:
            raise ValueError(f"this is format {data.get('format')!r} of a decomposition, not {FORMAT}.")
        return cls(
            path=data["path"],
            command=data["command"],
            recipes=tuple(Recipe.from_dict(recipe) for recipe in data["recipes"].values()),
            total=_group_from(data["total"]),
            kinds=tuple(map(_group_from, data["kinds"])),
            layers=tuple(map(_group_from, data["layers"])),
            tensors=tuple(map(_group_from, data["tensors"])),
            left=tuple(data["left"]),
            nonfinite=tuple(data["nonfinite"]),
            version=data["mxdist_version"],
        )


def write_new(file: Path, content: str) -> None:
    """Write a file that must not exist; it appears whole or not at all.

    Raises:
        UserError: it exists, or cannot be written.
    """
    refuse_existing(file)
    partial = file.with_name(f"{file.name}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}; choose another --out") from None


def refuse_existing(file: Path) -> None:
    """UserError when the file exists."""
    if file.exists():
        raise UserError(f"{file} exists already; choose another --out, or remove it")


def json_text(report: Report) -> str:
    """The content of the JSON file."""
    return json.dumps(report.to_dict(), allow_nan=False, separators=(",", ":")) + "\n"


def _grouped(measured: Iterable[Measured], key: Callable[[Measured], str]) -> list[Group]:
    members: dict[str, list[Measured]] = {}
    for item in measured:
        members.setdefault(key(item), []).append(item)
    return [_group(name, items) for name, items in members.items()]


def _group(name: str, items: Sequence[Measured]) -> Group:
    sums: dict[str, Moments] | None = None
    if all(item.nonfinite is None for item in items):
        names = items[0].moments
        sums = {recipe: sum((item.moments[recipe] for item in items), start=Moments()) for recipe in names}
    return Group(name, len(items), sum(item.linear.tensor.elements for item in items), sums)


def _group_from(data: dict[str, Any]) -> Group:
    sums = {name: entry["sums"] for name, entry in data["recipes"].items()}
    if any(entry is None for entry in sums.values()):
        return Group(data["name"], data["tensors"], data["elements"], None)
    moments = {name: Moments(**entry) for name, entry in sums.items()}
    return Group(data["name"], data["tensors"], data["elements"], moments)
