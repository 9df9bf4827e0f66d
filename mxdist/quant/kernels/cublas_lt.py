"""Blockwise FP8 products by cuBLASLt itself, the library that torch's operator for them calls as well.

torch's operator makes descriptors and asks for an algorithm in every call: 35 us of the host's time in a loop of
nothing else and up to 90 in a model, which is longer than many of these products take. Here both are kept by shape, and
a call takes 20. Products are the same, bit for bit where the algorithm is; they can also be added to what `out` holds.

Row-major operands are column-major ones transposed, so out^T [N, M] = b^T a^T is computed: cuBLASLt's A is b.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from ctypes import POINTER, byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# Of cublasLt.h and library_types.h.
_COMPUTE_32F, _OP_T = 68, 1
_E4M3, _BF16, _F32 = 28, 14, 0
_TRANSA, _A_SCALE, _B_SCALE, _A_SCALE_MODE, _B_SCALE_MODE = 3, 17, 18, 31, 32
_TILES, _SQUARES = 4, 5  # CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F and _BLK128x128_32F
_MAX_WORKSPACE, _ALIGNMENTS = 1, (5, 6, 7, 8)

_WORKSPACE = 32 << 20
"""Bytes, as much as cuBLAS takes for itself on this generation."""
_LOCK = threading.Lock()  # descriptors hold the scales' addresses from call to call


class _Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", c_uint64 * 8),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


class _Known:
    """What a shape needs, made once: the descriptor of the product, the layouts of A, B and D, and the algorithm."""

    def __init__(
        self,
        library: ctypes.CDLL,
        descriptor: c_void_p,
        layouts: tuple[c_void_p, ...],
        algorithm: _Heuristic | None,
    ) -> None:
        self.descriptor, self.layouts, self.algorithm = descriptor, layouts, algorithm
        weakref.finalize(self, _destroy, library, descriptor, layouts).atexit = False


def _destroy(library: ctypes.CDLL, descriptor: c_void_p, layouts: tuple[c_void_p, ...]) -> None:
    library.cublasLtMatmulDescDestroy(descriptor)
    for layout in layouts:
        library.cublasLtMatrixLayoutDestroy(layout)


_ONE, _ZERO = c_float(1.0), c_float(0.0)


@lru_cache
def _library() -> ctypes.CDLL | None:
    """The one that torch has loaded, or None."""
    version = (torch.version.cuda or "").split(".")[0]
    try:
        library = ctypes.CDLL(f"libcublasLt.so.{version}")
    except OSError:
        return None
    library.cublasLtMatmul.argtypes = (
        c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p,
        c_void_p, c_void_p, c_void_p, c_size_t, c_void_p,
    )  # fmt: skip
    library.cublasLtMatmulDescSetAttribute.argtypes = (c_void_p, c_int, c_void_p, c_size_t)
    library.cublasLtMatrixLayoutCreate.argtypes = (POINTER(c_void_p), c_int, c_uint64, c_uint64, c_int64)
    library.cublasLtMatmulAlgoGetHeuristic.argtypes = (*(c_void_p,) * 7, c_int, c_void_p, POINTER(c_int))
    library.cublasLtMatmulPreferenceSetAttribute.argtypes = (c_void_p, c_int, c_void_p, c_size_t)
    return library


@lru_cache
def _handle(device: int) -> c_void_p:
    library, handle = _library(), c_void_p()
    assert library is not None
    with torch.cuda.device(device):
        _check(library.cublasLtCreate(byref(handle)), "cublasLtCreate")
    return handle


@lru_cache
# One for each stream, whose work is in order.
def _workspace(device: int, stream: int) -> Tensor:  # noqa: ARG001
    return torch.empty(_WORKSPACE, dtype=torch.uint8, device=f"cuda:{device}")


def loaded() -> bool:
    """Whether `multiply` can be called at all."""
    return _library() is not None


def multiply(
    a: Tensor, a_scale: Tensor, a_squares: bool, b: Tensor, b_scale: Tensor, b_squares: bool, out: Tensor,
    accumulate: bool = False,
) -> bool:  # fmt: skip
    """Write a b to `out` or, with `accumulate`, add it to what is there. False when there is no algorithm for it.

    a        E4M3 [M, K], rows contiguous
    b        E4M3 [K, N], columns contiguous
    scales   float32, of 1x128 tiles [M, K tiles] (for b [N, K tiles]) with rows contiguous and a multiple of 4, or of
             squares with the tiles of K contiguous and filled up to a multiple of 4
    out      [M, N], bfloat16 or float32, rows contiguous
    """
    library = _library()
    assert library is not None
    (rows, k), columns, device = a.shape, b.shape[1], out.get_device()
    addresses = (b.data_ptr(), a.data_ptr(), out.data_ptr())
    together = addresses[0] | addresses[1] | addresses[2]
    if together & 15:
        return False
    aligned = not together & 255
    known = _known(
        device, rows, columns, k, b.stride(1), a.stride(0), out.stride(0), b_squares, a_squares,
        out.dtype == torch.float32, aligned,
    )  # fmt: skip
    if known.algorithm is None:
        return False
    stream = torch.cuda.current_stream(device).cuda_stream
    workspace = _workspace(device, stream)
    beta, layouts = _ONE if accumulate else _ZERO, known.layouts
    with _LOCK:
        _set(library, known.descriptor, _A_SCALE, c_void_p(b_scale.data_ptr()))
        _set(library, known.descriptor, _B_SCALE, c_void_p(a_scale.data_ptr()))
        status = library.cublasLtMatmul(
            _handle(device), known.descriptor, byref(_ONE), addresses[0], layouts[0], addresses[1], layouts[1],
            byref(beta), addresses[2], layouts[2], addresses[2], layouts[2], byref(known.algorithm),
            workspace.data_ptr(), _WORKSPACE, stream,
        )  # fmt: skip
    _check(status, "cublasLtMatmul")
    return True


@lru_cache(maxsize=4096)
def _known(
    device: int, rows: int, columns: int, k: int, b_stride: int, a_stride: int, out_stride: int, b_squares: bool,
    a_squares: bool, wide: bool, aligned: bool,
) -> _Known:  # fmt: skip
    library = _library()
    assert library is not None
    descriptor, kind = c_void_p(), _F32 if wide else _BF16
    _check(library.cublasLtMatmulDescCreate(byref(descriptor), _COMPUTE_32F, _F32), "cublasLtMatmulDescCreate")
    _set(library, descriptor, _TRANSA, c_int32(_OP_T))
    for which, squares in ((_A_SCALE_MODE, b_squares), (_B_SCALE_MODE, a_squares)):
        _set(library, descriptor, which, c_int32(_SQUARES if squares else _TILES))
    for which in (_A_SCALE, _B_SCALE):  # heuristics look whether there are any
        _set(library, descriptor, which, c_void_p(256))
    layouts = (
        _layout(library, _E4M3, k, columns, b_stride),
        _layout(library, _E4M3, k, rows, a_stride),
        _layout(library, kind, columns, rows, out_stride),
    )
    return _Known(library, descriptor, layouts, _best(library, device, descriptor, layouts, 256 if aligned else 16))


def _best(
    library: ctypes.CDLL, device: int, descriptor: c_void_p, layouts: tuple[c_void_p, ...], alignment: int
) -> _Heuristic | None:
    preference, found, count = c_void_p(), _Heuristic(), c_int(0)
    _check(library.cublasLtMatmulPreferenceCreate(byref(preference)), "cublasLtMatmulPreferenceCreate")
    settings: list[tuple[int, Any]] = [(_MAX_WORKSPACE, c_size_t(_WORKSPACE))]
    settings += [(which, c_uint32(alignment)) for which in _ALIGNMENTS]
    for which, value in settings:
        status = library.cublasLtMatmulPreferenceSetAttribute(preference, which, byref(value), ctypes.sizeof(value))
        _check(status, "cublasLtMatmulPreferenceSetAttribute")
    a, b, d = layouts
    with torch.cuda.device(device):
        status = library.cublasLtMatmulAlgoGetHeuristic(
            _handle(device), descriptor, a, b, d, d, preference, 1, byref(found), byref(count)
        )
    library.cublasLtMatmulPreferenceDestroy(preference)
    return found if status == 0 and count.value and found.state == 0 else None


def _layout(library: ctypes.CDLL, kind: int, rows: int, columns: int, stride: int) -> c_void_p:
    layout = c_void_p()
    status = library.cublasLtMatrixLayoutCreate(byref(layout), kind, rows, columns, stride)
    _check(status, "cublasLtMatrixLayoutCreate")
    return layout


def _set(library: ctypes.CDLL, descriptor: c_void_p, which: int, value: Any) -> None:
    status = library.cublasLtMatmulDescSetAttribute(descriptor, which, byref(value), ctypes.sizeof(value))
    if status:
        _check(status, "cublasLtMatmulDescSetAttribute")


def _check(status: int, call: str) -> None:
    if status:
        raise RuntimeError(f"{call} failed with status {status}")
