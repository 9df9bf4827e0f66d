"""Some of what was sampled, step by step, to be read by people: rollouts/step_N.jsonl."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from mxdist.messages import Group
from mxdist.tasks.tokenizer import TaskTokenizer

FOLDER = "rollouts"


class Scored(Protocol):
    """A group with the rewards of its samples."""

    @property
    def group(self) -> Group: ...

    @property
    def rewards(self) -> Sequence[float]: ...


class RolloutFiles:
    """Writes the first ``groups`` groups of every step, one JSON object a sampled answer."""

    def __init__(self, run_dir: Path, groups: int, tokenizer: TaskTokenizer) -> None:
        self._folder = run_dir / FOLDER
        self._groups = groups
        self._tokenizer = tokenizer

    def write(self, step: int, scored: Sequence[Scored]) -> None:
        """Write the file of a step; a resumed run replaces those of the steps it takes again."""
        if not self._groups:
            return
        self._folder.mkdir(exist_ok=True)
        lines = [line for group in scored[: self._groups] for line in self._lines(group)]
        (self._folder / f"step_{step}.jsonl").write_text("".join(lines), encoding="utf-8")

    def _lines(self, scored: Scored) -> list[str]:
        group = scored.group
        prompt = self._tokenizer.decode_prompt(group.prompt.tokens)
        return [
            json.dumps(
                {
                    "prompt": prompt,
                    "answer": self._tokenizer.decode(sample.tokens),
                    "reference": group.prompt.reference,
                    "reward": reward,
                    "finished": sample.finished,
                    "policy_version": group.policy_version,
                    "drawn_by": sample.drawn_by,
                },
                ensure_ascii=False,
            )
            + "\n"
            for sample, reward in zip(group.samples, scored.rewards, strict=True)
        ]
