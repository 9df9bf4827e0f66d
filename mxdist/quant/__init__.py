"""MXFP4 numbers: the one quantiser that learner, rollout engine, weight sync and analysis all call.

    recipe     which operand is quantised how; presets; no torch import
    policy     which linear gets which recipe; no torch import
    format     E2M1 and E8M0: values, ties, bits, packing
    layout     rows and blocks; input checks
    scaling    block scales and macro factors
    rounding   to the E2M1 grid, in plain steps and fast
    hadamard   the 32-point transform; transform: that and mean removal, before and after
    philox     random bits that belong to elements, for stochastic rounding and signs
    fallback   which tiles get a residual
    reference  quantise, fake_quantise: the definition of every mode; scratch: their work space
    tensor     MXTensor, the packed form
    e4m3       that as E4M3 bytes, which Hopper multiplies
    checksum   64-bit checksums that add over shards
    linear     mx_linear: forward, straight-through backward
    backend    which code quantises on a device, and which GEMMs a quantised weight is made for
    kernels    the same in Triton, for GPUs
    transfer   small tensors from the host to a device
    decompose  the error of a quantised tensor in its parts; moments: sums of these that add over tensors and ranks
    telemetry  other figures that training watches

Import from the submodules: this file imports nothing, so that configuration can be read without torch.
"""
