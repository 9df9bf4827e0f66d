"""The packages of mxdist import each other in one direction, as the README's map says."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "mxdist"
LAYERS = (  # each imports only of its own layer and of those after it
    {"__main__"},
    {"cli"},
    {"control", "doctor", "decomposition"},
    {"learner", "rollout", "sync", "aqn", "tasks", "observe"},
    {"model", "quant"},
    {"config"},
    {"messages", "seeds", "errors", "packages", "interrupts"},
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}


def imports() -> Iterator[tuple[Path, str, str]]:
    """File, its part of the package, and a part that it imports."""
    for file in PACKAGE.rglob("*.py"):
        own = file.relative_to(PACKAGE).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                modules = [f"{node.module}.{alias.name}" for alias in node.names]
            parts = [module.split(".") for module in modules if module.startswith("mxdist.")]
            yield from ((file, own, part[1]) for part in parts if part[1] not in (own, "__version__"))


def test_no_import_points_against_the_layers() -> None:
    found = list(imports())
    assert len(found) > 100
    assert [f"{file}: {own} -> {other}" for file, own, other in found if LAYER[own] > LAYER[other]] == []


def test_quant_knows_its_recipes_alone_and_none_of_what_trains_or_samples() -> None:
    assert {other for _, own, other in imports() if own == "quant"} <= {"errors"}
    strangers = ("ray", "megatron", "vllm", "transformers", "deepspeed")
    text = "".join(file.read_text(encoding="utf-8") for file in (PACKAGE / "quant").rglob("*.py"))
    assert not [name for name in strangers if f"import {name}" in text or f"from {name}" in text]
