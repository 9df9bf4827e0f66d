"""All processes of a run: who is there, how to be rid of one, and what each is doing when one keeps others waiting."""

import faulthandler
import re
import time
from pathlib import Path

from mxdist.control import stacks
from mxdist.control.placement import Where
from mxdist.control.processes import Process
from mxdist.errors import DeadlineExceeded

FOLDER = "stacks"  # of a run directory


class Roster:
    """Starts processes and knows the living ones."""

    def __init__(self, run_path: Path) -> None:
        self._folder = run_path / FOLDER
        self._processes: dict[str, Process] = {}

    def start(self, name: str, cpus: float, gpus: float, where: Where = "DEFAULT", aside: bool = False) -> Process:
        """A process that Ray is asked to start, as ``Process``. Its name may have been another's that was dismissed."""
        if name in self._processes:
            raise ValueError(f"{name} is there already")
        file = self._folder / f"{re.sub(r'[^a-z0-9]+', '_', name)}.txt"
        process = Process(name, cpus, gpus, file, where, aside)
        self._processes[name] = process
        return process

    def named(self, beginning: str) -> list[Process]:
        """The processes whose names begin with these words."""
        return [process for name, process in self._processes.items() if name.startswith(beginning)]

    def dismiss(self, process: Process) -> None:
        """End it at once, whatever state it is in."""
        process.kill()
        self._processes.pop(process.name, None)

    def report(self, late: DeadlineExceeded) -> Path:
        """Write who waits for whom and the Python stacks of all processes, the controller's included."""
        found = stacks.collect([process.stacks for process in self._processes.values()])
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"report_{time.strftime('%Y%m%d-%H%M%S')}.txt"
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(f"The controller waited for {', '.join(late.processes)}: {late}\n")
            for name, process in self._processes.items():
                mark = " (it is waited for)" if name in late.processes else ""
                stream.write(f"\n=== {name}{mark}\n{found[process.stacks].strip()}\n")
            stream.write("\n=== controller\n")
            stream.flush()
            faulthandler.dump_traceback(stream, all_threads=True)
        return path
