"""One weight matrix as the engine holds it: packed MXFP4 bytes, or plain values. No vLLM here.

The bytes are what the learner sent and what parity compares. On a GPU they are all that is kept of a quantised weight
(at most 0.54 of a byte an element without fallback), and products read them. On a CPU, which has no kernel for that,
their dequantised form is kept beside them, refreshed from the bytes and never from anywhere else. Buffers are allocated
once and only ever copied into.
"""

import torch
from torch import Tensor, nn

from mxdist.quant.recipe import Operand
from mxdist.quant.tensor import MXTensor, part_shapes
from mxdist.sync.payload import VALUES


def keeps_values(device: torch.device) -> bool:
    """Whether quantised weights on ``device`` have their values beside them: the one place that decides it.

    Without, a CPU would dequantise every weight for every token, which takes longer than the products themselves.
    """
    return device.type == "cpu"


class LiveWeight(nn.Module):
    """A matrix [rows, columns] of which tensors of the learner are row ranges.

    Args:
        operand: how its rows are quantised; None keeps plain values.
        dtype: of the values, the model's.
    """

    values: Tensor | None  # [rows, columns]; None where only bytes are kept

    def __init__(self, rows: int, columns: int, operand: Operand | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.operand, self.dtype = (rows, columns), operand, dtype
        # Not persistent: the engine's dummy loader fills persistent buffers with random numbers.
        for part, shape in (part_shapes(self.shape, operand) if operand else {}).items():
            self.register_buffer(part, torch.zeros(shape, dtype=torch.uint8), persistent=False)
        kept = operand is None or keeps_values(self.get_buffer("codes").device)
        self.register_buffer(VALUES, torch.zeros(self.shape, dtype=dtype) if kept else None, persistent=False)
        self._packed: MXTensor | None = None

    def parts(self) -> dict[str, Tensor]:
        """What a payload carries of this weight: the packed bytes, or the plain values. Live, not copies."""
        if self.operand is None:
            return {VALUES: self.get_buffer(VALUES)}
        return {part: self.get_buffer(part) for part in part_shapes(self.shape, self.operand)}

    def packed(self) -> MXTensor:
        """The bytes of a quantised weight, live."""
        assert self.operand is not None
        if self._packed is None:
            self._packed = MXTensor.from_parts(self.parts(), self.shape, self.operand)
        return self._packed

    def drop_values(self) -> None:
        """Go on with the bytes of a quantised weight alone."""
        if self.operand is not None:
            self.values = None

    def refresh(self) -> None:
        """Recompute ``values`` from the bytes, where they are kept; call after any byte was written."""
        if self.operand is not None and self.values is not None:
            self.values.copy_(self.packed().dequantise(self.dtype))
