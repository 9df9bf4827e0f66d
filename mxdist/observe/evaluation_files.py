"""Every answer of an evaluation, to be read by people and programs: eval/step_N-RECIPE.jsonl."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from mxdist.messages import Group
from mxdist.tasks.base import RewardResult
from mxdist.tasks.tokenizer import TaskTokenizer

FOLDER = "eval"


class Answered(Protocol):
    """A group with the reward of each of its samples and what that is made of."""

    @property
    def group(self) -> Group: ...

    @property
    def results(self) -> Sequence[RewardResult]: ...


def write_answers(
    run_dir: Path,
    step: int,
    recipe: str,
    temperature: float,
    scored: Sequence[Answered],
    tokenizer: TaskTokenizer,
) -> Path:
    """Write one JSON object a problem and return the file's path.

    Nothing is overwritten: a second evaluation of the same step and recipe goes to step_N-RECIPE.2.jsonl, and so on.
    """
    folder = run_dir / FOLDER
    folder.mkdir(exist_ok=True)
    stem, number = f"step_{step}-{recipe}", 1
    while True:
        path = folder / (f"{stem}.jsonl" if number == 1 else f"{stem}.{number}.jsonl")
        try:
            with open(path, "x", encoding="utf-8") as stream:
                for group in scored:
                    line = {"step": step, "recipe": recipe, "temperature": temperature, **_row(group, tokenizer)}
                    stream.write(json.dumps(line, ensure_ascii=False) + "\n")
            return path
        except FileExistsError:
            number += 1


def _row(scored: Answered, tokenizer: TaskTokenizer) -> dict[str, object]:
    prompt, samples = scored.group.prompt, scored.group.samples
    return {
        "key": prompt.key,
        "prompt": tokenizer.decode_prompt(prompt.tokens),
        "reference": prompt.reference,
        "answers": [tokenizer.decode(sample.tokens) for sample in samples],
        "extracted": [result.final for result in scored.results],
        "right": [result.parts["accuracy"] == 1 for result in scored.results],
        "tokens": [len(sample.tokens) for sample in samples],
        "finished": [sample.finished for sample in samples],
    }
