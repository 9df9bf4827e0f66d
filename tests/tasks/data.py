"""Where the tests find GSM8K as published; the project ships none of it."""

import json
import os
from pathlib import Path

import pytest

from mxdist.config import Config
from mxdist.config.schema import Gsm8kData, ModelConfig, RolloutConfig


def gsm8k_folder() -> Path:
    """The folder of train.jsonl and test.jsonl: ``MXDIST_GSM8K``, or shared/data/gsm8k beside the checkout."""
    folder = Path(os.environ.get("MXDIST_GSM8K", Path(__file__).parents[3] / "shared/data/gsm8k"))
    if not (folder / "train.jsonl").is_file():
        pytest.skip(f"GSM8K is not at {folder}; set MXDIST_GSM8K to the folder of train.jsonl and test.jsonl")
    return folder


def write_questions(path: Path, *rows: dict[str, object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows(count: int) -> list[dict[str, object]]:
    """Questions in the form of GSM8K."""
    return [
        {"question": f"Ann has {n} pens and buys {n} more. How many?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}"}
        for n in range(1, count + 1)
    ]


def gsm8k_config(train: str, evaluation: str, context: int = 512, max_new_tokens: int = 64) -> Config:
    return Config(
        data=Gsm8kData(train=train, eval=evaluation),
        model=ModelConfig(max_position_embeddings=context),
        rollout=RolloutConfig(max_new_tokens=max_new_tokens),
    )
