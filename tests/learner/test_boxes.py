"""A range of a flattened tensor is covered by boxes, in order, and by few."""

import itertools

import numpy as np
import pytest

from mxdist.learner.boxes import boxes


@pytest.mark.parametrize("shape", [(), (7,), (5, 4), (3, 1), (1, 6), (3, 4, 5), (2, 3, 2, 2)])
def test_boxes_make_up_the_range_in_its_order(shape: tuple[int, ...]) -> None:
    tensor = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    for begin, end in itertools.combinations_with_replacement(range(tensor.size + 1), 2):
        found = list(boxes(begin, end, shape))
        cut = [tensor[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))].reshape(-1) for box in found]
        assert np.array_equal(np.concatenate([[], *cut]), np.arange(begin, end))
        assert len(found) <= max(2 * len(shape) - 1, 1)
    assert list(boxes(0, tensor.size, shape)) == [((0,) * len(shape), shape)]


def test_an_empty_or_inverted_range_has_none() -> None:
    assert list(boxes(3, 3, (4, 4))) == list(boxes(5, 2, (4, 4))) == []
