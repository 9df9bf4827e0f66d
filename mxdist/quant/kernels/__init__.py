"""MXFP4 on Hopper's FP8 tensor cores: the quantiser of `mxdist.quant.reference` as Triton kernels, and exact GEMMs.

    options       which operands the kernels can do, as compile-time constants; no Triton import
    forms         E4M3 bytes with float32 scales: the three layouts that FP8 GEMMs read
    device        building blocks of the kernels: scales, rounding, random bits
    piece, runs   what the tile quantisers do with a piece of a matrix, along its rows and along its columns
    quant_rows    one scale per row
    quant_tiles   one scale per 1 x 128 tile, along rows, along columns, or both
    quant_both    both from one read of device memory
    quant_norm    RMSNorm with the quantiser of its result
    quant_weight  weights: one rounding, W and W^T
    terms         both terms of an operand with outlier fallback, every macro method
    quant_terms   those as values, and as packed bytes: nibbles, E8M0 codes, macro bytes
    quant_residual  tiles with every macro method; residuals of listed tiles appended along K
    unpack        packed bytes as E4M3
    packed        packed weights read: to registers, to values
    decode        products of few rows with packed weights, dense and of experts: by decode_halves, in 16-bit
                  arithmetic, by decode_tiles, in FP8, each after a quantiser of its own (quant_halves, quant_lanes)
    parts, groups  what those share: sums over parts of the contraction, rows by expert
    dequantise    E4M3 back to bfloat16
    plan          which GEMM for which product, and why; no Triton import
    gemm          dense FP8 GEMMs
    cublas_lt     those with block scales, by the vendor's library itself
    dot_scaled    GEMMs on packed FP4, for Blackwell; emulated elsewhere
    segments      where the rows of experts lie, every expert's in whole tiles
    quant_experts the quantisers of experts, fused with filling up tiles and with SwiGLU
    swiglu        SwiGLU alone, forward and backward
    permute       rows of experts without what fills up tiles
    experts       a MoE layer's experts: sorted rows in, rows out
    prepared      a quantised weight as the operands of its GEMMs
    linear        mx_linear on these kernels

Every quantiser writes the values of `reference.quantise` bit for bit. Import from the submodules; those with kernels
import Triton.
"""
