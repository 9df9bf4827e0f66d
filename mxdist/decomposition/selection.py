"""Which tensors of a checkpoint a recipe would quantise, judged by name and shape; why the others are left.

As in training: every linear of the decoder layers but the router. Embeddings, output head, norms, biases and vectors
stay in high precision.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from mxdist.decomposition.source import StoredTensor
from mxdist.errors import UserError

FLOATS = ("F64", "F32", "F16", "BF16")
PACKED = "codes"  # of a linear as `mxdist export --form mxfp4` writes it

_LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.(.+)$")
_OTHER_TOWERS = re.compile(r"vision|visual|audio|(?:^|\.)encoder\.")
_SCALES = re.compile(r"(?:^|[._])(?:scales?|scale_inv|zeros|zero_points?)$|weight_scale")
_ROUTERS = ("gate", "router", "shared_expert_gate")
_WITHOUT_MEANING = {
    "self_attn", "self_attention", "attn", "attention", "mlp", "feed_forward", "block_sparse_moe", "weight",
}  # fmt: skip
_INPUT_FIRST = ("c_attn", "c_proj", "c_fc")  # GPT-2 stores these [in, out]
_KINDS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Linear:
    """A weight that recipes quantise. `axis` is the one that its GEMM contracts over, -1 or -2."""

    tensor: StoredTensor
    kind: str  # such as q_proj or experts.down_proj
    layer: int
    axis: int


@dataclass(frozen=True, slots=True)
class Left:
    """A tensor that stays as it is, and why."""

    tensor: StoredTensor
    reason: str


def select(
    tensors: Sequence[StoredTensor], only: Sequence[str] = (), skip: Sequence[str] = ()
) -> tuple[list[Linear], list[Left]]:
    """Divide the tensors. `only` and `skip` are globs over the names of those that would be quantised.

    Raises:
        UserError: nothing is left to measure, or a glob matches nothing.
    """
    reasons = [(tensor, reason_to_leave(tensor)) for tensor in tensors]
    linears = [tensor for tensor, reason in reasons if reason is None]
    if not linears:
        seen = f"{len(tensors)} tensors, such as {tensors[0].name}" if tensors else "no tensor at all"
        packed = any(tensor.name.endswith(f".{PACKED}") for tensor in tensors)
        advice = "its weights are packed MXFP4; give the run, or a BF16 export" if packed else "give another checkpoint"
        raise UserError(f"there is no linear of a decoder layer that a recipe would quantise among {seen}; {advice}")
    for glob in (*only, *skip):
        if not any(fnmatchcase(tensor.name, glob) for tensor in linears):
            raise UserError(
                f"the glob {glob!r} matches no tensor that a recipe would quantise; names are like {linears[0].name}"
            )
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    chosen: list[Linear] = []
    left: list[Left] = []
    for tensor, reason in reasons:
        if reason is None and only and not any(fnmatchcase(tensor.name, glob) for glob in only):
            reason = "not in --only"
        if reason is None and any(fnmatchcase(tensor.name, glob) for glob in skip):
            reason = "in --skip"
        if reason is None:
            layer, kind = place_of(tensor.name)
            chosen.append(Linear(tensor, kind, layer, contraction_axis(tensor, shapes)))
        else:
            left.append(Left(tensor, reason))
    if not chosen:
        raise UserError("--only and --skip leave no tensor to measure; widen the one or narrow the other")
    return chosen, left


def reason_to_leave(tensor: StoredTensor) -> str | None:
    """Return why recipes leave a tensor alone, as a short noun phrase; None for those they quantise."""
    name, parts = tensor.name, tensor.name.split(".")
    module = parts[-2] if parts[-1] == "weight" and len(parts) > 1 else parts[-1]
    in_layer = _LAYER.search(name) is not None and not _OTHER_TOWERS.search(name)
    checks = (
        ("empty", tensor.elements == 0),
        ("scales of quantised weights", _SCALES.search(name) is not None),
        ("8-bit float", tensor.dtype.startswith("F8")),
        ("complex", tensor.dtype.startswith("C")),
        ("integer", tensor.dtype not in FLOATS),
        ("bias", name.endswith("bias")),
        ("norm", "norm" in module or module.startswith("ln_")),
        ("embedding", "embed" in module or module in ("wte", "wpe")),
        ("output head", module in ("lm_head", "embed_out")),
        ("outside the decoder layers", not in_layer),
        ("router", module in _ROUTERS),
        ("adapter", "lora_" in name),
        ("convolution", "conv" in module),
        ("vector", len(tensor.shape) < 2),
    )
    return next((reason for reason, holds in checks if holds), None)


def place_of(name: str) -> tuple[int, str]:
    """Return the decoder layer and the kind of a linear: (0, "experts.up_proj") for layers.0.mlp.experts.7.up_proj."""
    match = _LAYER.search(name)
    assert match is not None
    parts = [part for part in match[2].split(".") if not part.isdigit() and part not in _WITHOUT_MEANING]
    return int(match[1]), ".".join(parts)


def kind_order(kind: str) -> tuple[str, int, str]:
    """A sort key for kinds: attention, dense feed-forward, then experts; in the order of the computation."""
    prefix, _, last = kind.rpartition(".")
    return prefix, _KINDS.index(last) if last in _KINDS else len(_KINDS), last


def contraction_axis(tensor: StoredTensor, shapes: dict[str, tuple[int, ...]]) -> int:
    """Return -1 for weights stored [..., out, in], -2 for [..., in, out]; `shapes` of the whole checkpoint, by name.

    Linears are [out, in], those of GPT-2 excepted. Stacked experts come either way. Where gate and up are fused, the
    shapes tell which: [experts, 2 width, hidden] with [experts, hidden, width], or both transposed. Where they are
    not, the hidden size tells, as the length of the layer's norm.
    """
    name = tensor.name.removesuffix(".weight")
    suffix = tensor.name[len(name) :]
    prefix, _, last = name.rpartition(".")
    if last in _INPUT_FIRST:
        return -2
    if len(tensor.shape) != 3 or last not in _KINDS:
        return -1
    down = shapes.get(f"{prefix}.down_proj{suffix}", (0, 0, 0))
    fused = shapes.get(f"{prefix}.gate_up_proj{suffix}")
    if fused is not None:
        return -2 if (fused[1], fused[2]) == (down[2], 2 * down[1]) else -1
    layer = tensor.name[: tensor.name.index(".mlp.")] if ".mlp." in tensor.name else prefix
    hidden = shapes.get(f"{layer}.input_layernorm.weight", (0,))[0]
    output, contracted = tensor.shape[-2:] if last != "down_proj" else tensor.shape[:-3:-1]
    return -2 if output == hidden != contracted else -1
