"""Compile every kernel for sm_90a, and the FP4 GEMM for sm_100a, without a GPU; print what ptxas says, as JSON.

A program of its own, because a process that interprets kernels cannot compile them:
python -m tests.quant.kernels.compile_check
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mxdist.learner import scoring_kernel
from mxdist.model import rotary_kernel
from mxdist.quant.kernels import (
    checksum,
    decode,
    decode_halves,
    decode_tiles,
    dot_scaled,
    groups,
    packed,
    permute,
    quant_both,
    quant_experts,
    quant_halves,
    quant_lanes,
    quant_norm,
    quant_pairs,
    quant_residual,
    quant_rows,
    quant_terms,
    quant_tiles,
    quant_weight,
    swiglu,
    terms,
    unpack,
)
from mxdist.rollout import sampling_kernel

CEIL = 0x3FFFFF
POINTERS = {
    "x_pointer": "*bf16", "w": "*bf16", "flag": "*i32", "rounded": "*i32", "reference": "*i32",
    "data": "*fp8e4nv", "data_t": "*fp8e4nv",
    "scale": "*fp32", "scale_t": "*fp32", "x": "*bf16", "map": "*i32", "table": "*i32",
    "scale_words": "*i32", "shift_table": "*i32",
    "counts": "*i64", "units": "*fp32", "bias": "*bf16",
    "partial": "*fp32", "finished": "*i32",
    "listed": "*i32", "slots": "*i32", "values": "*bf16", "codes": "*u8", "scales": "*u8", "macro": "*u8",
    "residual_codes": "*u8", "residual_scales": "*u8", "a": "*u8", "b": "*u8", "a_factor": "*fp32", "b_factor": "*fp32",
    "c": "*bf16", "weight": "*bf16", "inverse": "*fp32", "out": "*fp32",
    "buffer": "*i16", "pieces": "*i64", "sums": "*i64",
    "h": "*bf16", "gradient": "*bf16", "filled": "*bf16", "cos": "*bf16", "sin": "*bf16", "logits": "*bf16",
    "places": "*i64", "tokens": "*i64", "shift": "*fp32",
    "temperatures": "*fp32", "seeds": "*i64", "positions": "*i64", "found": "*fp32", "best_tokens": "*i32",
    "drawn": "*i32", "logprobs": "*fp32",
}  # fmt: skip
NUMBERS = {
    "alpha": "fp32",
    "epsilon": "fp32",
    "threshold": "fp32",
    "seed": "i64",
    "seed_t": "i64",
    "temperature": "fp32",
}


Case = tuple[str, Any, dict[str, object], int]
"""Name, kernel, constants, warps."""
PLAIN: dict[str, object] = {"CARRY": CEIL, "SATURATE": False, "CHECK": False}


def cases() -> Iterator[Case]:
    """Of every kernel the forms that runs use."""
    yield from one_operand_cases()
    yield from two_operand_cases()
    yield from model_cases()
    yield from term_cases()
    yield from packed_cases()
    sums = {"BITS": 32, "UP": 16, "ROWS": True, "PIECE": checksum.PIECE, "BLOCK": checksum.BLOCK}
    yield "checksums of bfloat16", checksum._kernel, sums, checksum.WARPS


def one_operand_cases() -> Iterator[Case]:
    """Quantisers along rows or columns, and of weights."""
    tiles = PLAIN | {"MACRO_BITS": 0, "RANDOM": False, "HADAMARD": False, "ONE_SCALE": False, "BY_COLUMN": False}
    by_row = tiles | dict(zip(("ROWS", "COLS"), quant_tiles._ROWS_ONLY[:2], strict=True))
    yield "tiles by row", quant_tiles._quantise_tiles_kernel, by_row, quant_tiles._ROWS_ONLY[2]
    yield (
        "tiles by row, macro factors",
        quant_tiles._quantise_tiles_kernel,
        by_row | {"MACRO_BITS": 8},
        quant_tiles._ROWS_ONLY[2],
    )
    by_column = tiles | {"BY_COLUMN": True} | dict(zip(("ROWS", "COLS"), quant_tiles._COLUMNS_ONLY[:2], strict=True))
    yield "tiles by column", quant_tiles._quantise_tiles_kernel, by_column, quant_tiles._COLUMNS_ONLY[2]
    random = {"RANDOM": True, "HADAMARD": True}
    yield "tiles by column, rotated", quant_tiles._quantise_tiles_kernel, by_column | random | {"COLS": 32}, 4
    squares = tiles | {"BY_COLUMN": True, "ONE_SCALE": True}
    squares |= dict(zip(("ROWS", "COLS"), quant_tiles._SQUARES[:2], strict=True))
    yield "squares by column", quant_tiles._quantise_tiles_kernel, squares, quant_tiles._SQUARES[2]
    for k in (768, 2048, 11008, 22016):
        width, chunks, height, warps = quant_rows.launch_shape(k)
        rows = PLAIN | {"ROWS": height, "COLS": width, "CHUNKS": chunks, "HELD": True, "RANDOM": False}
        yield f"rows of {k}", quant_rows._quantise_rows_kernel, rows, warps
    yield "weight", quant_weight._quantise_weight_kernel, PLAIN | {"SQUARE": False, "WHOLE": False, "FOLDED": False}, 8
    yield (
        "weight, folded",
        quant_weight._quantise_weight_kernel,
        PLAIN | {"SQUARE": False, "WHOLE": False, "FOLDED": True},
        8,
    )
    rows, columns, warps = quant_norm.SHAPE
    normed = PLAIN | {"ROWS": rows, "COLS": columns, "RANDOM": False}
    yield "norm", quant_norm._quantise_norm_kernel, normed | {"MACRO_BITS": 0}, warps
    yield "norm, macro factors", quant_norm._quantise_norm_kernel, normed | {"MACRO_BITS": 8}, warps


def two_operand_cases() -> Iterator[Case]:
    """Quantisers along rows and columns at once, and those of experts."""
    both = {f"{key}_T": value for key, value in PLAIN.items() if key != "CHECK"} | PLAIN | {"SQUARES": True}
    both |= {"MACRO_BITS": 0, "RANDOM": False, "RANDOM_T": False}
    both |= dict(zip(("ROWS", "COLS"), quant_both.SHAPE[:2], strict=True))
    yield "both", quant_both._quantise_both_kernel, both | {"MACRO_BITS_T": 0}, quant_both.SHAPE[2]
    for squares in (True, False):
        pairs = {"PARTS": quant_pairs.PARTS, "SQUARES": squares, "CHECK": True, "CARRY": CEIL}
        yield f"both in pairs, squares: {squares}", quant_pairs._quantise_pairs_kernel, pairs, quant_pairs.WARPS
    pairs |= {"SQUARES": True}
    yield "experts in pairs, tokens", quant_experts._quantise_expert_pairs_kernel, pairs, quant_pairs.WARPS
    yield (
        "experts in pairs, rows",
        quant_experts._quantise_expert_pairs_kernel,
        pairs | {"map": None},
        quant_pairs.WARPS,
    )
    experts = both | {"BY_COLUMN": True, "HADAMARD_T": False}
    for name, source in (("tokens", quant_experts.TOKENS), ("swiglu", quant_experts.SWIGLU)):
        yield (
            f"experts, {name}",
            quant_experts._quantise_experts_kernel,
            experts | {"SOURCE": source},
            quant_both.SHAPE[2],
        )


def model_cases() -> Iterator[Case]:
    """What lies between quantisers and products."""
    yield "swiglu", swiglu._swiglu_kernel, {"COLS": 1024}, 4
    yield "swiglu, backward", swiglu._swiglu_backward_kernel, {"COLS": 1024}, 4
    yield "rotary", rotary_kernel._turn_kernel, {"HEADS": 16, "HALF": 64, "BACK": True}, 4
    scored = {"COLS": scoring_kernel._COLS}
    yield "scores", scoring_kernel._sums_kernel, scored, scoring_kernel._WARPS
    yield "scores, gradient", scoring_kernel._gradient_kernel, scored, scoring_kernel._WARPS
    yield "without filling", permute._without_filling_kernel, {"COLS": 2048}, 4


def term_cases() -> Iterator[Case]:
    """Macro factors, outlier fallback and packed bytes."""
    rows, warps = quant_terms.SHAPE
    one = PLAIN | {"ROWS": rows, "RANDOM": False, "THRESHOLD": False, "LISTED": False, "BITS": 8}
    one |= {"METHOD": terms.STATIC.value, "PACK": False, "FALLBACK": True}
    searched = {"METHOD": terms.SEARCHED.value, "BITS": 4}
    for name, changed in (
        ("values, macro and fallback", {}),
        ("values, flagged tiles", {"THRESHOLD": True}),
        ("values, stochastic", {"RANDOM": True, "METHOD": 0}),
        ("values, searched and fallback", searched),
        ("packed, plain", {"PACK": True, "METHOD": 0, "FALLBACK": False}),
        ("packed, searched and fallback", searched | {"PACK": True}),
    ):
        yield name, quant_terms._quantise_terms_kernel, one | changed, warps
    rows, warps = quant_residual.SHAPE
    one = PLAIN | {"ROWS": rows, "RANDOM": False, "LISTED": True, "BITS": 8, "METHOD": terms.STATIC.value}
    yield "listed tiles", quant_residual._quantise_residual_kernel, one, warps
    yield "listed tiles, stochastic", quant_residual._quantise_residual_kernel, one | {"RANDOM": True}, warps
    yield "tiles by row, searched", quant_residual._quantise_residual_kernel, one | searched | {"LISTED": False}, warps


def packed_cases() -> Iterator[Case]:
    """Kernels that read packed weights."""
    yield (
        "unpacked",
        unpack._unpack_kernel,
        {"METHOD": terms.STATIC.value, "ROWS": unpack._ROWS, "TILES": unpack._TILES},
        unpack._WARPS,
    )
    plain = {"BLOCK": 32, "METHOD": 0, "MACRO": 128, "FALLBACK": False}
    both = plain | {"METHOD": terms.SEARCHED.value, "FALLBACK": True}
    shape = {"BN": decode.WIDTH, "DEPTH": decode.DEPTH, "LENGTH": 2048, "table": None}
    yield "decode, 16 rows", decode._decode_values_kernel, plain | shape | {"BM": 16}, decode.WARPS
    for name, constants in (("plain", plain), ("macro and fallback", both)):
        yield f"decode, 64 rows, {name}", decode._decode_values_kernel, constants | shape | {"BM": 64}, decode.WARPS
    yield from halves_cases()
    yield from tiles_cases()
    yield "tiles of experts", groups._table_of_groups_kernel, {"HEIGHT": 16, "EXPERTS": 128, "TILES": groups._TILES}, 4
    yield "expand", packed._expand_kernel, both | {"ROWS": packed._ROWS, "DEPTH": packed._DEPTH}, packed._WARPS


def halves_cases() -> Iterator[Case]:
    """Products of 16-bit rows: of 8 and 32 rows, split and not, of experts, with all that weights may have."""
    absent = ("table", "macro", "residual_codes", "residual_scales", "bias", "partial", "finished")
    plain = dict.fromkeys(absent) | {"METHOD": 0, "MACRO": 128, "FALLBACK": False, "SPLIT": 1, "EVEN": True, "BM": 8}
    every = plain | {"METHOD": terms.SEARCHED.value, "FALLBACK": True, "SPLIT": 3, "EVEN": False, "BM": 32}
    every = {key: value for key, value in every.items() if key not in absent}
    for name, constants in (("plain", plain), ("all", every)):
        shape = _halves_shape(constants)
        cut = {"WIDTH": shape.width, "SHARES": shape.shares, "DEPTH": shape.depth, "STAGES": shape.stages}
        cut |= {"LENGTH": 1024, "THREADS": 32 * shape.warps, "UNIT": 8, "AHEAD": True}
        yield f"halves, {name}", decode_halves._product, constants | cut, shape.warps
    options = {"CARRY": CEIL, "SATURATE": False, "BITS": 8, "WIDTH": quant_halves._WIDTHS[1]}
    options |= {
        "READ": quant_halves._READ,
        "READS": 6,
        "QUANTISE": True,
        "EARLY": True,
        "METHOD": terms.STATIC.value,
        "FALLBACK": True,
    }
    yield "rows to halves", quant_halves._to_halves, options, quant_halves._WARPS[1]
    yield "sampling, pieces", sampling_kernel._look, {"PIECE": sampling_kernel.PIECE}, sampling_kernel.WARPS
    yield "sampling, rows", sampling_kernel._decide, {"PIECES": 128}, 1


def tiles_cases() -> Iterator[Case]:
    """Products in FP8: of 32 rows, plain and all that weights may have, and of 64."""
    absent = ("macro", "bias", "partial", "finished")
    plain = dict.fromkeys(absent) | {"METHOD": 0, "SPLIT": 1, "BM": 32, "WIDTH": 64, "GROUP": 2, "EARLY": True}
    plain |= {"STAGES": 3}
    yield "tiles, 32 rows", decode_tiles._product, plain, 4
    every = {key: value for key, value in plain.items() if key not in absent}
    yield "tiles, all", decode_tiles._product, every | {"METHOD": terms.SEARCHED.value, "SPLIT": 4}, 4
    yield "tiles, 64 rows", decode_tiles._product, plain | {"BM": 64}, 4
    yield "tiles, odd number", decode_tiles._product, plain | {"BM": 64, "GROUP": 1}, 4
    options = {"ROWS": quant_lanes._ROWS, "CARRY": CEIL, "SATURATE": False, "MACRO_BITS": 8, "EARLY": True}
    yield "rows to lanes", quant_lanes._to_lanes, options, quant_lanes._WARPS


def _halves_shape(constants: Any) -> decode_halves.Shape:
    return decode_halves.shape_of(constants["BM"], 22016, 2048, 1, 132, constants["FALLBACK"])


def blackwell_cases() -> Iterator[Case]:
    """As `cases`, for sm_100a."""
    shape = dict(zip(("BM", "BN", "BK"), dot_scaled.BLOCK, strict=True))
    for name, group in (("mxfp4", 32), ("nvfp4", 16)):
        yield name, dot_scaled._dot_scaled_kernel, shape | {"GROUP": group, "FACTORS": group == 16}, dot_scaled.WARPS


def compile_kernel(kernel: Any, constants: dict[str, object], warps: int, arch: int) -> dict[str, Any]:
    """Registers, spilt bytes, ptxas warnings and PTX of one kernel."""
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {name: (POINTERS | NUMBERS).get(name, "i32") for name in names}
    if kernel in (decode_halves._product, quant_halves._to_halves):
        signature["x" if kernel is decode_halves._product else "values"] = "*fp16"
    if kernel is decode_tiles._product:
        signature |= {"x": "*fp8e4nv", "x_scale": "*fp32"}
    if kernel is decode_halves._product:
        signature |= {name: "*i32" for name in ("scales", "residual_scales") if name in signature}  # words of four
    for name in ("a_scale", "b_scale"):
        if name in signature:
            signature[name] = "*u8" if constants["GROUP"] == 32 else "*fp8e4nv"
    signature |= dict.fromkeys(constants, "constexpr")
    sizes = {
        n
        for n in names
        if "stride" in n or n in ("columns", "half", "n", "k", "outputs", "words") or n.endswith("width")
    }
    multiples = sizes | {n for n in names if signature[n].startswith("*")}
    aligned = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in multiples}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()}, aligned)
    fused = "METHOD" not in constants or kernel in (decode_halves._product, decode_tiles._product)
    options = {"num_warps": warps, "enable_fp_fusion": fused}  # as launched
    if kernel is decode._decode_values_kernel:
        options["num_stages"] = decode.STAGES
    if kernel is decode_halves._product:
        options["num_stages"] = _halves_shape(constants).stages
    if kernel is decode_tiles._product:
        options["num_stages"] = constants["STAGES"]
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    suffix = "-blackwell" if arch >= 100 else ""
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / f"ptxas{suffix}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [str(ptxas), "-v", f"-arch=sm_{arch}a", str(path), "-o", str(path.with_suffix(".cubin"))]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "registers": int(re.findall(r"Used (\d+) registers", log)[0]),
        "spilt_bytes": sum(map(int, re.findall(r"(\d+) bytes spill stores", log))),
        "shared_bytes": compiled.metadata.shared,
        "warnings": [line for line in log.splitlines() if "warning" in line.lower()],
        "ptx": ptx,
    }


if __name__ == "__main__":
    results = {name: compile_kernel(kernel, constants, warps, 90) for name, kernel, constants, warps in cases()}
    for name, kernel, constants, warps in blackwell_cases():
        results[name] = compile_kernel(kernel, constants, warps, 100)
        found = re.findall(r"tcgen05\.mma\.\S*kind::\S+", results[name]["ptx"])
        results[name]["instructions"] = sorted(set(found))
    if "--ptx" not in sys.argv:
        for result in results.values():
            del result["ptx"]
    print(json.dumps(results, indent=1))
