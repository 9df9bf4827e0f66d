"""One weight matrix as the engine computes with it: packed MXFP4 bytes, and the values a GEMM reads. No vLLM here.

The bytes are what the learner sent and what parity compares; ``values`` is their dequantised form, refreshed from
the bytes and never from anywhere else. Buffers are allocated once and only ever copied into.
"""

import torch
from torch import Tensor, nn

from mxdist.quant.recipe import Operand
from mxdist.quant.tensor import MXTensor, part_shapes


class LiveWeight(nn.Module):
    """A matrix [rows, columns] of which tensors of the learner are row ranges.

    Args:
        operand: how its rows are quantised; None keeps plain values.
        dtype: of the values, the model's.
    """

    values: Tensor  # [rows, columns]

    def __init__(self, rows: int, columns: int, operand: Operand | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.operand = operand
        # Not persistent: the engine's dummy loader fills persistent buffers with random numbers.
        self.register_buffer("values", torch.zeros(rows, columns, dtype=dtype), persistent=False)
        for part, shape in (part_shapes((rows, columns), operand) if operand else {}).items():
            self.register_buffer(part, torch.zeros(shape, dtype=torch.uint8), persistent=False)

    def parts(self) -> dict[str, Tensor]:
        """What a payload carries of this weight: the packed bytes, or the plain values. Live, not copies."""
        if self.operand is None:
            return {"values": self.values}
        return {part: self.get_buffer(part) for part in part_shapes(self.values.shape, self.operand)}

    def refresh(self) -> None:
        """Recompute ``values`` from the bytes; call after any byte was written."""
        if self.operand is not None:
            packed = MXTensor.from_parts(self.parts(), self.values.shape, self.operand)
            self.values.copy_(packed.dequantise(self.values.dtype))
