"""A real Slurm on this machine, to try launch/slurm.sbatch: munge, controller and one node. Needs root.

    python -m tools.slurm          # submits a run, ends it by 'scancel --signal=TERM', and sees it requeued and resumed

Debian's packages slurm-wlm and munge. Keys, sockets, state and logs lie in a scratch folder, ports are free ones, and
everything is ended with the last line, however the script ends.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "setpriv")
CPUS = 4  # claimed of the node, whatever it has

CONFIGURATION = """
ClusterName=scratch
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={controller_port}
SlurmdPort={node_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
AuthType=auth/munge
CredType=cred/munge
# A requeued job starts again when its credential has expired: two minutes by default.
AuthInfo=socket={folder}/munge/socket,cred_expire=20
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=120
SlurmdTimeout=300
KillWait=15
MailProg=/bin/true
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Slurm:
    """A running Slurm; its commands by name."""

    folder: Path

    def __call__(self, *command: str, timeout: float = 60) -> str:
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=timeout, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    @property
    def environment(self) -> dict[str, str]:
        python = str(Path(sys.executable).parent)
        return os.environ | {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": f"{python}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
        }

    def state(self, job: str) -> str:
        """Such as PENDING, RUNNING, COMPLETED, FAILED."""
        found = re.search(r"JobState=(\w+)", self("scontrol", "show", "job", job))
        assert found, f"Slurm knows no job {job}"
        return found[1]


def why_not() -> str | None:
    """Why no Slurm can be started here, or None."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"no {', '.join(missing)} (Debian: slurm-wlm, munge, util-linux)"
    return "Slurm's daemons need root" if os.geteuid() != 0 else None


@contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """Start it in the empty ``folder``; everything is ended at the end, jobs included."""
    made = Slurm(folder)
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir()
    folder.chmod(0o755)  # munge refuses a socket that others cannot reach
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    host = socket.gethostname().split(".")[0]
    ports = {name: _free_port() for name in ("controller_port", "node_port")}
    (folder / "slurm.conf").write_text(CONFIGURATION.format(host=host, folder=folder, cpus=CPUS, **ports))
    munge = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge/socket"]
    munge += [f"--pid-file={folder}/munge/pid", f"--log-file={folder}/munge/log", f"--seed-file={folder}/munge/seed"]
    with ExitStack() as stack:
        _daemon(stack, made, munge)
        _wait_until((folder / "munge" / "socket").exists, "munged", folder)
        _daemon(stack, made, ["slurmctld", "-D"])
        _daemon(stack, made, ["slurmd", "-D", "-N", host])
        stack.callback(_end_jobs, made)
        _wait_until(lambda: "idle" in made("sinfo", "--noheader", "--format=%T"), "the node", folder)
        yield made


def _daemon(stack: ExitStack, made: Slurm, command: list[str]) -> None:
    bound = ["setpriv", "--pdeathsig", "KILL", *command]  # to this process: it ends with it at the latest
    with open(made.folder / f"{command[0]}.log", "w") as log:
        process = subprocess.Popen(bound, env=made.environment, stdout=log, stderr=log)

    def end() -> None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()

    stack.callback(end)


def _end_jobs(made: Slurm) -> None:
    """Cancel all jobs, and end what they left behind: without cgroups Slurm loses sight of daemons."""
    made("scancel", "--user=root")
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            ours = process.environ().get("SLURM_CONF") == made.environment["SLURM_CONF"]
            if ours and not process.name().startswith("slurm"):
                process.kill()


def _wait_until(condition: Callable[[], bool], what: str, folder: Path, seconds: float = 60) -> None:
    expiry = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except RuntimeError:  # the controller is not up yet
            pass
        if time.monotonic() > expiry:
            logs = "\n".join(path.read_text()[-2000:] for path in folder.glob("*.log"))
            raise TimeoutError(f"waited {seconds:g} s for {what}; the logs end with:\n{logs}")
        time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


SETTINGS = (
    *("learner.ranks=2", "warm_start.steps=2", "algorithm.prompts_per_step=8", "algorithm.samples_per_prompt=4"),
    *("run.steps=6", "run.checkpoint_every=1", "data.eval_problems=16"),
)


def submit(made: Slurm, run_dir: Path, log: Path) -> str:
    """launch/slurm.sbatch for one node without GPUs. Returns the job's number."""
    options = ["--nodes=1", "--gpus-per-node=0", f"--output={log}", f"--export=ALL,GPUS=0,CPUS={CPUS}"]
    out = made(
        "sbatch", "--parsable", *options, "launch/slurm.sbatch", "configs/quickstart.yaml", str(run_dir), *SETTINGS
    )
    return out.strip()


def follow(made: Slurm, job: str, log: Path, terminate_after: str, seconds: float = 900) -> Iterator[str]:
    """The job's log, line by line, until it has ended for good; 'scancel --signal=TERM' once a line begins so."""
    shown, expiry = 0, time.monotonic() + seconds
    while time.monotonic() < expiry:
        state = made.state(job)
        lines = log.read_text().split("\n")[:-1] if log.exists() else []
        for line in lines[shown:]:
            yield line
            if terminate_after and line.startswith(terminate_after):
                yield f"--- scancel --signal=TERM {job}"
                made("scancel", "--signal=TERM", job)
                terminate_after = ""
        shown = len(lines)
        if state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"):
            yield f"job {state}"
            return
        time.sleep(0.5)
    raise TimeoutError(f"job {job} is still {made.state(job)} after {seconds:g} s")


def main() -> int:
    if reason := why_not():
        print(f"slurm: {reason}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, slurm(Path(folder)) as made:
        (Path(folder) / "out").mkdir()
        log = Path(folder) / "out" / "log"
        job = submit(made, Path(folder) / "out" / "run", log)
        for line in follow(made, job, log, terminate_after="step 2/"):
            print(line, flush=True)
    return 0 if line == "job COMPLETED" else 1


if __name__ == "__main__":
    sys.exit(main())
