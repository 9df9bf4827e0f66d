"""The parity gate: learner and engine must have quantised the same modules to the same bytes.

Pure comparison of what both sides say of themselves; a difference raises `ParityError`, which stops the run.
"""

from collections.abc import Iterable, Mapping

from mxdist.errors import ParityError

Checksums = Mapping[str, dict[str, int]]
"""Hugging Face tensor name -> part -> checksum."""


def compare_modules(learner: Iterable[str], engine: Iterable[str], quantises: bool) -> None:
    """Compare the names of the quantised modules of both sides, at the start of a run.

    Args:
        learner, engine: Hugging Face module names; the learner's of all ranks together.
        quantises: whether the recipe quantises at all (bf16 does not, and then both lists must be empty).

    Raises:
        ParityError: the lists differ, or one is empty although the recipe quantises, or one is not although it
            does not.
    """
    sides = {"learner": set(learner), "engine": set(engine)}
    for side, modules in sides.items():
        if quantises and not modules:
            raise ParityError(f"the recipe quantises, but the {side} has no quantised module")
        if modules and not quantises:
            raise ParityError(
                f"the recipe quantises nothing, but the {side} has {len(modules)} quantised modules, "
                f"the first {min(modules)}"
            )
    only = sorted(sides["learner"] ^ sides["engine"])
    if only:
        has, lacks = ("learner", "engine") if only[0] in sides["learner"] else ("engine", "learner")
        raise ParityError(
            f"{only[0]} is quantised in the {has} but not in the {lacks}; the lists of "
            f"{len(sides['learner'])} and {len(sides['engine'])} modules differ in {len(only)}"
        )


def compare_checksums(learner: Checksums, engine: Checksums) -> None:
    """Compare what the learner computes with and what the engine computes with, after a weight sync.

    Raises:
        ParityError: names the first differing tensor and part in alphabetical order, both checksums, and how many
            tensors differ; also when a tensor or part exists on one side only, or there is nothing to compare.
    """
    if not learner or not engine:
        raise ParityError(f"nothing to compare: the learner reports {len(learner)} tensors, the engine {len(engine)}")
    if learner == engine:
        return
    differing = [name for name in sorted(learner.keys() | engine.keys()) if learner.get(name) != engine.get(name)]
    if not differing:
        return
    first = differing[0]
    ours, theirs = learner.get(first, {}), engine.get(first, {})
    part = next(part for part in [*ours, *theirs] if ours.get(part) != theirs.get(part))
    raise ParityError(
        f"learner and engine disagree about {first}, part {part}: {_shown(ours.get(part))} in the "
        f"learner, {_shown(theirs.get(part))} in the engine; {len(differing)} of "
        f"{len(learner.keys() | engine.keys())} tensors differ"
    )


def _shown(value: int | None) -> str:
    return "missing" if value is None else f"{value:#018x}"
