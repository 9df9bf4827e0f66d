"""Trains for a while on this machine, kills something every minute or so, and checks that nothing was lost or repeated.

    python -m tools.soak RUN_DIR                       # 30 minutes, a fault about every 60 s
    python -m tools.soak RUN_DIR --minutes 8 --seed 3

The faults, each once in a random order and then again: kill -9 of a rollout worker, of a learner rank, of a reward
worker, of the controller with everything it started (which a scheduler would start again with 'mxdist resume', as
happens here), and an engine that stops answering. When the time is over the run is asked to stop (SIGTERM), resumed for
a few steps more, and ended undisturbed. Then the ledger has to add up. Prints a line for each fault and a table at the
end, which soak.json in RUN_DIR has too; exits with 1 when something does not hold.
"""

import argparse
import contextlib
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from mxdist.control import stacks
from mxdist.control.roster import FOLDER
from mxdist.observe.ledger import check_ledger

ROOT = Path(__file__).parents[1]
MAX_LAG = 1
LAST_STEPS = 5  # after the faults
ENDLESS = 10**6
SETTINGS = [
    "algorithm.prompts_per_step=8",
    "algorithm.samples_per_prompt=4",
    "warm_start.steps=20",
    "run.checkpoint_every=5",
    "run.restarts=10",
    f"rollout.max_lag={MAX_LAG}",
    "rollout.workers=2",
    "data.eval_problems=16",
    *(f"deadlines.{wait}=60" for wait in ("rollout", "reward", "update", "sync", "checkpoint", "evaluate")),
    "deadlines.start=150",
]
FAULTS = {
    "rollout worker killed": ("rollout_worker_*", signal.SIGKILL),
    "learner rank killed": ("learner_rank_*", signal.SIGKILL),
    "reward worker killed": ("reward_worker_*", signal.SIGKILL),
    "engine stopped": ("rollout_worker_*", signal.SIGSTOP),
    "controller killed": ("", signal.SIGKILL),
}
PREEMPTED = 75
SUMMARY = "soak.json"


@dataclass(frozen=True)
class Fault:
    """One that happened."""

    at: float  # seconds since the beginning
    name: str
    victim: str  # such as "rollout_worker_1"
    step: int  # that the run had done


class Soak:
    """One run under fire."""

    def __init__(self, run_dir: Path, seed: int) -> None:
        self.run_dir = run_dir
        self._random = random.Random(seed)
        self._process: subprocess.Popen[bytes] | None = None
        self._began = time.monotonic()
        self._to_come: list[str] = []
        self.faults: list[Fault] = []
        self.exits: Counter[int] = Counter()

    def start(self, *settings: str) -> None:
        """Start the run, or resume it."""
        known = (self.run_dir / "config.yaml").exists()
        begin = ["resume", str(self.run_dir)] if known else ["train", str(ROOT / "configs" / "quickstart.yaml")]
        command = [sys.executable, "-m", "mxdist", *begin, *([] if known else [f"run.dir={self.run_dir}", *SETTINGS])]
        self._process = subprocess.Popen([*command, *settings], cwd=ROOT, stdout=subprocess.DEVNULL)

    def fault(self) -> None:
        """Let one fault happen, drawn at random; none when the process it would strike is not up.

        Each kind comes once before any comes again.
        """
        assert self._process is not None
        self._to_come = self._to_come or self._random.sample(sorted(FAULTS), len(FAULTS))
        name = self._to_come.pop()
        pattern, number = FAULTS[name]
        if not pattern:
            victim = "all processes"
            controller = psutil.Process(self._process.pid)
            for member in [controller, *controller.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            self._process.wait()
        else:
            files = (self.run_dir / FOLDER).glob(f"{pattern}.txt")
            up = {path.stem: process for path in sorted(files) if (process := _process_of(path))}
            if not up:
                return
            victim = self._random.choice(sorted(up))
            with contextlib.suppress(psutil.NoSuchProcess):
                up[victim].send_signal(number)
        fault = Fault(round(time.monotonic() - self._began, 1), name, victim, self.step())
        self.faults.append(fault)
        print(f"{fault.at:7.1f} s  fault {len(self.faults)}: {name} ({victim}) after step {fault.step}", flush=True)

    def step(self) -> int:
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def watch(self, until: Callable[[], bool]) -> None:
        """Wait; a run that has ended is resumed, as a scheduler would."""
        assert self._process is not None
        while not until():
            if self._process.poll() is not None:
                self.exits[self._process.returncode] += 1
                self.start(f"run.steps={ENDLESS}")
            time.sleep(0.5)

    def stop(self) -> int:
        """Ask it to stop, as a scheduler does; the exit code."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(600)

    def finish(self) -> int:
        """Resume it for a few steps more and let it end; the exit code."""
        self.start(f"run.steps={self.step() + LAST_STEPS}")
        assert self._process is not None
        return self._process.wait(1200)


def _process_of(path: Path) -> psutil.Process | None:
    """The living process that shows its stacks in this file."""
    place = stacks.place(path)
    with contextlib.suppress(psutil.NoSuchProcess):
        if place and (process := psutil.Process(place.pid)).create_time() == place.born:
            return process
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--every", type=float, default=60, help="mean seconds between faults")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    waits = random.Random(options.seed)
    soak = Soak(options.run_dir.absolute(), options.seed)
    end = time.monotonic() + 60 * options.minutes
    soak.start(f"run.steps={ENDLESS}")
    while time.monotonic() < end:
        due = time.monotonic() + options.every * waits.uniform(0.5, 1.5)
        soak.watch(lambda due=due: time.monotonic() > min(due, end))  # type: ignore[misc]
        if time.monotonic() < end:
            soak.fault()
    before = soak.step()
    soak.watch(lambda: soak.step() > before)  # so that it is in training when it is asked to stop
    stopped = soak.stop()
    wanted = soak.step() + LAST_STEPS
    finished = soak.finish()
    return _report(soak, stopped, finished, wanted)


def _report(soak: Soak, stopped: int, finished: int, wanted: int) -> int:
    """Print and save what came of it; the exit code."""
    try:
        account, complaint = check_ledger(soak.run_dir, MAX_LAG), ""
    except ValueError as error:
        account, complaint = None, str(error)
    good = account is not None and stopped == PREEMPTED and finished == 0 and soak.step() == account.steps == wanted
    table = {
        **dict(sorted(Counter(fault.name for fault in soak.faults).items())),
        "faults survived": len(soak.faults) if good else "not all",
        "resumed": sum(soak.exits.values()),
        "steps": soak.step(),
        "steps expected": wanted,
        "steps taken again": _repeated((soak.run_dir / "log.txt").read_text()),
        "groups trained on, once each": account.trained if account else "?",
        "groups lost or repeated": complaint or 0,
        "groups given up": account.dropped if account else "?",
        "deadline reports": len(list((soak.run_dir / FOLDER).glob("report_*"))),
        "exit when asked to stop": stopped,
        "exit at the end": finished,
    }
    summary = {"good": good, **table, "exits": dict(soak.exits), "faults": [asdict(fault) for fault in soak.faults]}
    (soak.run_dir / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
    width = max(map(len, table))
    for name, value in table.items():
        print(f"{name:{width}}  {value}")
    print("all holds" if good else "something does not hold")
    return 0 if good else 1


def _repeated(log: str) -> int:
    """How many steps a run's log shows to have been taken again."""
    steps, repeated = 0, 0
    for line in log.splitlines():
        if done := re.search(r" step +(\d+)/", line):
            steps = int(done[1])
        elif resumed := re.search(r"resumed from step (\d+)", line):
            repeated += max(steps - int(resumed[1]), 0)
            steps = int(resumed[1])
    return repeated


if __name__ == "__main__":
    sys.exit(main())
