"""Slices of a divided tensor put together are the tensor."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mxdist.model.division import Division


@given(st.integers(0, 1), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))
def test_the_slices_of_all_ranks_make_up_the_whole_tensor(dimension: int, count: int, rows: int, columns: int) -> None:
    divisions = [Division(dimension, index, count) for index in range(count)]
    whole = np.arange(count * rows * columns).reshape(divisions[0].whole((rows, columns)))
    parts = [whole[division.region((rows, columns))] for division in divisions]
    assert all(part.shape == (rows, columns) for part in parts)
    np.testing.assert_array_equal(np.concatenate(parts, dimension), whole)


def test_a_vector_is_divided_along_its_only_axis_and_an_undivided_tensor_is_its_only_slice() -> None:
    assert Division(0, 1, 2).region((3,)) == (slice(3, 6),)
    assert Division().whole((3, 4)) == (3, 4)
    assert Division().region((3, 4)) == (slice(0, 3), slice(0, 4))
