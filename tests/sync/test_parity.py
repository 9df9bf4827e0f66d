"""The parity gate says which module or tensor differs, and never lets an empty side pass."""

import pytest

from mxdist.errors import ParityError
from mxdist.sync.parity import compare_checksums, compare_modules

MODULES = ["model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj"]
SUMS = {"a.weight": {"codes": 1, "scales": 2, "values": 3}, "b.weight": {"values": 4}}


def test_equal_sides_pass() -> None:
    compare_modules(MODULES, MODULES[::-1], quantises=True)
    compare_modules([], [], quantises=False)
    compare_checksums(SUMS, {name: dict(parts) for name, parts in SUMS.items()})


@pytest.mark.parametrize(
    ("learner", "engine", "quantises", "complaint"),
    [
        ([], MODULES, True, "the learner has no quantised module"),
        (MODULES, [], True, "the engine has no quantised module"),
        ([], [], True, "no quantised module"),
        (MODULES, MODULES, False, "quantises nothing, but the learner has 2"),
        (MODULES[:1], MODULES, True, r"q_proj is quantised in the engine but not in the learner; .* 1 and 2 .* in 1"),
        (MODULES, MODULES[1:], True, r"down_proj is quantised in the learner but not in the engine"),
    ],
)
def test_module_lists_that_differ_or_are_empty_stop_the_run(
    learner: list[str], engine: list[str], quantises: bool, complaint: str
) -> None:
    with pytest.raises(ParityError, match=complaint):
        compare_modules(learner, engine, quantises)


@pytest.mark.parametrize(
    ("engine", "complaint"),
    [
        ({}, "nothing to compare"),
        (
            SUMS | {"b.weight": {"values": 5}},
            r"b.weight, part values: 0x0000000000000004 in the learner, 0x0000000000000005 in the engine; 1 of 2",
        ),
        (SUMS | {"a.weight": {"codes": 1, "scales": 9, "values": 8}}, "a.weight, part scales: .*; 1 of 2"),
        (SUMS | {"a.weight": {"codes": 1, "values": 3}}, "a.weight, part scales: 0x0000000000000002 .*, missing in"),
        (SUMS | {"a.weight": {**SUMS["a.weight"], "macro": 7}}, "a.weight, part macro: missing in the learner"),
        ({"b.weight": {"values": 5}}, "a.weight, part codes: .* missing in the engine; 2 of 2"),
        (SUMS | {"c.weight": {"values": 5}}, "c.weight, part values: missing in the learner, .*; 1 of 3"),
    ],
)
def test_a_difference_names_tensor_part_both_sides_and_the_number_of_tensors(
    engine: dict[str, dict[str, int]], complaint: str
) -> None:
    with pytest.raises(ParityError, match=complaint):
        compare_checksums(SUMS, engine)


def test_an_empty_learner_does_not_pass() -> None:
    with pytest.raises(ParityError, match="nothing to compare"):
        compare_checksums({}, SUMS)
