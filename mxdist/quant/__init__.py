"""MXFP4 numbers: the one quantiser that learner, rollout engine, weight sync and analysis all call.

    recipe     which operand is quantised how; presets; no torch import
    format     E2M1 and E8M0: values, ties, bits, packing
    layout     rows and blocks; input checks
    scaling    block scales and macro factors
    rounding   to the E2M1 grid, in plain steps and fast
    reference  quantise, fake_quantise: the definition of every mode
    tensor     MXTensor, the packed form
    checksum   64-bit checksums that add over shards
    linear     mx_linear: forward, straight-through backward

Import from the submodules: this file imports nothing, so that configuration can be read without torch.
"""
