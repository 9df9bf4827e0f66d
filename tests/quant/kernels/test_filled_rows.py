"""Products of row counts that cuBLASLt does not take: rows are added, and what they hold reaches no result."""

from __future__ import annotations

import pytest
import torch

from mxdist.quant.kernels.forms import Form, Fp8Matrix, empty_tiles, filled_up
from mxdist.quant.kernels.gemm import matmul


def filled(rows: int, form: Form, seed: int) -> Fp8Matrix:
    matrix, generator = empty_tiles(rows, 256, form, torch.device("cpu")), torch.Generator().manual_seed(seed)
    matrix.data.copy_(torch.randn(matrix.data.shape, generator=generator).to(torch.float8_e4m3fn))
    matrix.scale.copy_(torch.rand(matrix.scale.shape, generator=generator))
    return matrix


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 71])
def test_added_rows_stand_where_there_is_room_or_in_a_copy_and_change_no_product(rows: int) -> None:
    a, b = filled(rows, Form.TILE, 0), filled(128, Form.SQUARE, 1)
    copy = a._replace(data=a.data.clone(), scale=a.scale.t().clone().t())  # without room
    assert filled_up(a)[0].data_ptr() == a.data.data_ptr()
    assert filled_up(copy)[0].data_ptr() != copy.data.data_ptr()
    wanted = a.dequantise() @ b.dequantise().t()
    for each in (a, copy):
        data, scale = filled_up(each)
        assert (len(data), len(scale), scale.stride()) == (-(-rows // 4) * 4,) * 2 + ((1, -(-rows // 4) * 4),)
        torch.testing.assert_close(matmul(each, b, torch.float32), wanted, rtol=1e-5, atol=1e-4)
