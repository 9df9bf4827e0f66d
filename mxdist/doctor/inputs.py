"""What a configuration points at: checkpoint, data, run directory, port and cluster."""

import socket
from pathlib import Path

from mxdist.config.schema import Config, Gsm8kData
from mxdist.doctor.findings import Finding, failure, ok
from mxdist.errors import UserError
from mxdist.model.checkpoint_contents import open_checkpoint
from mxdist.model.shape import ModelShape
from mxdist.tasks.question_files import find_file

CONNECT_SECONDS = 5.0
HUB = ("huggingface.co", 443)


def check_checkpoint(config: Config) -> Finding | None:
    """Names, shapes and types of a local checkpoint, from the headers of its files. None without ``model.path``."""
    path = config.model.path
    if path is None or config.model.vocab_size is None:
        return None
    directory = Path(path).expanduser()
    if not directory.is_dir():
        return ok("model.path", f"{path}, fetched from the Hugging Face hub when the run starts")
    try:
        files = open_checkpoint(directory, ModelShape(config.model, config.model.vocab_size, 0, (0,), 0))
    except UserError as error:
        return _failure("model.path", error)
    return ok("model.path", f"{len(files.tensors)} tensors as config.json says")


def check_data(config: Config, hub: tuple[str, int] = HUB) -> Finding:
    """Files are there; what is no file is a name on the hub, which has to answer."""
    if not isinstance(config.data, Gsm8kData):
        return ok("data", f"{config.data.task}, made by the task")
    for key in ("train", "eval"):
        source = getattr(config.data, key)
        try:
            file = find_file(source, f"data.{key}")
        except UserError as error:
            return _failure("data", error)
        if file is None and not _answers(*hub):
            return failure(
                f"data.{key}",
                f"{source} is no file here, and {hub[0]} does not answer",
                "give the path of a JSON-lines file",
            )
    return ok("data", f"{config.data.train}, {config.data.eval}")


def check_run_directory(config: Config) -> Finding | None:
    """A new run needs a folder of its own. None for the default, which is always new."""
    folder = config.run.dir
    if folder is None or not folder.exists():
        return None
    if not folder.is_dir() or any(folder.iterdir()):
        return failure("run.dir", f"{folder} is there and not empty", "choose another, or 'mxdist resume' it")
    return ok("run.dir", f"{folder} is empty")


def check_port(port: int) -> Finding | None:
    """The rendezvous of the learner ranks. None where any free port will do."""
    if port == 0:
        return None
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            reason = error.strerror or str(error)
            return failure(
                "learner.port", f"{port} cannot be used here ({reason})", "choose another, or 0 for any free"
            )
    return ok("learner.port", f"{port} is free")


def check_cluster(address: str | None) -> Finding | None:
    """A Ray cluster at host:port has to accept connections. None for one of the run's own, and for "auto"."""
    host, _, port = (address or "").rpartition(":")
    if not host or not port.isdigit():
        return None
    if not _answers(host, int(port)):
        return failure("cluster.address", f"no Ray cluster answers at {address}", "start one with 'ray start --head'")
    return ok("cluster.address", f"{address} answers")


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def _failure(subject: str, error: UserError) -> Finding:
    text, _, fix = str(error).rpartition("; ")
    return failure(subject, text or str(error), fix if text else "mend it")
