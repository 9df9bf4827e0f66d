"""What a learner backend cannot do is refused before anything starts."""

from typing import Any

import pytest
from pydantic import ValidationError

from mxdist.config.schema import Config

DENSE = {"num_experts": 0}
ZERO = {"backend": "deepspeed", "expert_parallel": 1}


def config(**sections: Any) -> Config:
    return Config.model_validate({"model": DENSE, "learner": ZERO} | sections)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_dense_model_may_have_every_zero_stage(stage: int) -> None:
    assert config(learner=ZERO | {"zero_stage": stage}).data_parallel == 2


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"num_experts": 8}}, "learner.backend=deepspeed trains dense models, and model.num_experts=8"),
        ({"learner": ZERO | {"tensor_parallel": 2}}, "learner.tensor_parallel=2; set it to 1"),
        ({"learner": ZERO | {"pipeline_parallel": 2}}, "learner.pipeline_parallel=2; set it to 1"),
        ({"learner": ZERO | {"expert_parallel": 2}}, "learner.expert_parallel=2; set it to 1"),
        ({"learner": ZERO | {"zero_offload": "weights"}}, "learner.zero_offload=weights needs learner.zero_stage=3"),
        (
            {"learner": ZERO | {"zero_offload": "optimizer"}, "guards": {"not_finite": "skip"}},
            "guards.not_finite=skip does not go with learner.zero_offload=optimizer",
        ),
        ({"learner": {"expert_parallel": 1, "zero_stage": 3}}, "learner.zero_stage=3 is for learner.backend=deepspeed"),
        ({"learner": {"expert_parallel": 1, "zero_offload": "optimizer"}}, "is for learner.backend=deepspeed alone"),
    ],
)
def test_what_a_backend_has_no_use_for_is_refused_in_one_sentence(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as refused:
        config(**sections)
    (error,) = refused.value.errors()
    assert message in error["msg"]
    assert "\n" not in error["msg"]
