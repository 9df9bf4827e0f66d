"""The shape of a model, and shapes that cannot be trained."""

import pytest
from pydantic import ValidationError

from mxdist.config.schema import ModelConfig


def test_one_expert_a_token_is_refused_because_its_router_could_not_learn() -> None:
    with pytest.raises(ValidationError, match=r"num_experts_per_tok=1 .* use at least 2"):
        ModelConfig(num_experts=8, num_experts_per_tok=1)
    assert ModelConfig(num_experts=0, num_experts_per_tok=1).num_experts == 0
