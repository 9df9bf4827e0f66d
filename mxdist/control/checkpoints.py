"""Checkpoints of a run: written under a temporary name, then renamed; the newest complete one wins."""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from mxdist.errors import UserError

STATE_FILE = "controller.json"
LEARNER_FOLDER = "learner"


@dataclass(frozen=True)
class ControllerState:
    """What the controller needs to go on after ``step`` updates; the learner's part lies beside it."""

    step: int
    cursor: dict[str, int]  # where new prompts are drawn from
    ahead: list[dict[str, int]]  # where those of the batches sampled ahead were drawn from, to be sampled again
    aqn: dict[str, float | int]
    aqn_steps: int  # the steps that the noise schedule was made for
    recipe: str
    mxdist_version: str


class CheckpointStore:
    """``checkpoints/step_N`` of one run directory."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / "checkpoints"

    def write(self, state: ControllerState, save_learner: Callable[[Path], None]) -> Path:
        """Write one checkpoint. A kill at any moment leaves the earlier ones as they were."""
        final = self._folder / f"step_{state.step}"
        partial = self._folder / f"step_{state.step}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        (partial / LEARNER_FOLDER).mkdir(parents=True)
        save_learner(partial / LEARNER_FOLDER)
        with open(partial / STATE_FILE, "w") as stream:
            json.dump(asdict(state), stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        os.rename(partial, final)
        return final

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        names = (re.fullmatch(r"step_(\d+)", path.name) for path in self._folder.glob("step_*"))
        return sorted(int(name[1]) for name in names if name)

    def newest(self) -> tuple[ControllerState, Path]:
        """State and learner folder of the newest complete checkpoint.

        Raises:
            UserError: there is none.
        """
        steps = self.steps()
        if not steps:
            raise UserError(
                f"{self._folder} holds no complete checkpoint; start again with 'mxdist train' and another run.dir"
            )
        folder = self._folder / f"step_{max(steps)}"
        state = ControllerState(**json.loads((folder / STATE_FILE).read_text()))
        return state, folder / LEARNER_FOLDER
