"""RecipePolicy: which module gets which recipe."""

import json
import subprocess
import sys

import pytest

from mxdist.quant.policy import RecipePolicy


def name_of(policy: RecipePolicy, module: str, layer: int | None = None, layers: int | None = None) -> str:
    return policy.resolve(module, layer, layers).name


def test_the_first_matching_glob_decides_and_the_default_answers_for_the_rest() -> None:
    policy = RecipePolicy("mxfp4", (("*.experts.*", "mxfp4_mbs_of"), ("*.mlp.*", "bf16")))
    assert name_of(policy, "layers.3.mlp.experts.5.fc1") == "mxfp4_mbs_of"
    assert name_of(policy, "layers.3.mlp.shared.fc1") == "bf16"
    assert name_of(policy, "layers.3.self_attention.linear_qkv") == "mxfp4"


def test_layers_at_both_ends_stay_in_bf16_whatever_the_globs_say() -> None:
    policy = RecipePolicy("mxfp4", (("*", "mxfp4_mbs"),), first=1, last=2)
    names = [name_of(policy, f"layers.{i}.mlp", i, 6) for i in range(6)]
    assert names == ["bf16", "mxfp4_mbs", "mxfp4_mbs", "mxfp4_mbs", "bf16", "bf16"]
    assert name_of(policy, "mtp.linear") == "mxfp4_mbs"
    with pytest.raises(ValueError, match=r"needs the number of layers to place layers\.0"):
        policy.resolve("layers.0", 3)


def test_policies_survive_json_and_reading_them_is_strict() -> None:
    policy = RecipePolicy("bf16", (("*.experts.*", "mxfp4"),), first=2)
    assert RecipePolicy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy
    with pytest.raises(ValueError, match="unknown recipepolicy key 'frist'"):
        RecipePolicy.from_dict(policy.to_dict() | {"frist": 1})


def test_unknown_recipes_and_negative_counts_are_refused_when_the_policy_is_made() -> None:
    with pytest.raises(ValueError, match="unknown recipe 'mxfp5'"):
        RecipePolicy("mxfp5")
    with pytest.raises(ValueError, match="unknown recipe 'nvfp4'"):
        RecipePolicy("mxfp4", (("*", "nvfp4"),))
    with pytest.raises(ValueError, match="not negative"):
        RecipePolicy("mxfp4", last=-1)


def test_policies_can_be_read_without_torch() -> None:
    code = "import sys, mxdist.quant.policy; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
