"""Errors that are the user's to mend. Everything else is a bug and keeps its traceback."""


class UserError(Exception):
    """One sentence: what is wrong, where, and what to change. The command line prints it and exits with 2."""

    exit_code = 2


class RunStopped(Exception):
    """A run that its own guards ended (parity, deadline, quantisation check). Exit code 1, one sentence."""

    exit_code = 1


class ParityError(RunStopped):
    """Learner and engine disagree about quantised modules or about the bytes of a weight."""


class OutOfMemory(RunStopped):
    """A GPU has no memory left for a process of the run."""


class CheckpointFailed(RunStopped):
    """A checkpoint could not be written. Training goes on, and the earlier one stays."""


class NotFinite(RunStopped):
    """A gradient is NaN or infinite. The weights are those from before the update."""


class RollBack(RunStopped):
    """Training went wrong in a way that is mended by going back to the newest checkpoint, and on with other prompts."""


class Preempted(RunStopped):
    """Someone asked the run to end (SIGTERM), and it can be resumed. EX_TEMPFAIL: a scheduler may queue it again."""

    exit_code = 75


class ProcessFailure(RunStopped):
    """Processes of the run died or stopped answering. The supervisor replaces what it can, within
    ``run.restarts``."""

    def __init__(self, message: str, processes: tuple[str, ...]) -> None:
        super().__init__(message)
        self.processes = processes  # their names, such as "learner rank 1"

    def __reduce__(self) -> tuple[object, ...]:  # a worker may notice it of another
        return type(self), (str(self), self.processes)


class ProcessDied(ProcessFailure):
    """A process of the run, or the node it was on, is gone."""


class SyncInterrupted(ProcessFailure):
    """Weights did not come whole to an engine, which goes on as soon as it is given them again."""

    def __init__(self, message: str, generation: int = -1, processes: tuple[str, ...] = ()) -> None:
        super().__init__(message, processes)
        self.generation = generation  # see ``sync.broadcast``

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.generation, self.processes)


class DeadlineExceeded(ProcessFailure):
    """A named wait between processes took longer than its deadline."""
