"""The linears of the two models that the project trains, as (name, outputs, inputs) with fused projections."""

LINEARS = {
    "Qwen2.5-3B": (("qkv", 2560, 2048), ("o", 2048, 2048), ("gate_up", 22016, 2048), ("down", 2048, 11008)),
    "Qwen3-30B-A3B attention": (("qkv", 5120, 2048), ("o", 2048, 4096)),
}
EXPERTS = {"Qwen3-30B-A3B experts": (("gate_up", 1536, 2048), ("down", 2048, 768))}
TOKENS = 16384
EXPERT_COUNT, EXPERT_ROWS = 16, 262_144
