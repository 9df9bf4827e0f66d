"""Runs the steps of a Dockerfile without a container engine: in a fresh folder that is /opt/mxdist to them. Needs root.

    python -m tools.container_steps docker/Dockerfile.cpu        downloads about 3 GB

COPY respects .dockerignore as far as it is used here (all but what is named); RUN is run, except for apt-get and
useradd, which would change this machine; at the end health check and CMD run as the image's user would, without rights.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PLACE = "/opt/mxdist"
SYSTEM_PATH = "/usr/bin:/bin:/usr/sbin:/sbin"  # as in the base image: its own Python, which any user can read
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """(instruction, arguments) in order, continued lines joined."""
    text = re.sub(r"\\\n", " ", dockerfile.read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(None, 1)[0], line.split(None, 1)[1].strip()) for line in lines]


def context_files() -> list[str]:
    """The files of the build context: tracked ones that .dockerignore lets through."""
    allowed = [line[1:].strip() for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in tracked.splitlines() if any(f"{name}/".startswith(f"{top}/") for top in allowed)]


def copy(sources: list[str], target: str, place: Path) -> None:
    """COPY of the context's files below each source; a folder's content goes into the target, as in Docker."""
    for source in sources:
        for name in context_files():
            if source == ".":
                to = place / target / name
            elif name == source:
                to = place / target / Path(name).name if target.endswith("/") else place / target
            elif name.startswith(f"{source}/"):
                to = place / target / Path(name).relative_to(source)
            else:
                continue
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to)


def run_inside(place: Path, command: list[str], cwd: str = PLACE) -> None:
    """Run a command that sees the folder as /opt/mxdist; raises when it fails."""
    mount = 'mount --bind "$0" /opt/mxdist && cd "$1" && shift && exec "$@"'
    wrapped = ["unshare", "--mount", "bash", "-c", mount, str(place), cwd, *command]
    print(f"+ {shlex.join(command)}", flush=True)
    index = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}  # where packages come from
    environment = index | {"PATH": f"{PLACE}/.venv/bin:{SYSTEM_PATH}", "PIP_NO_CACHE_DIR": "1", "HOME": "/tmp"}
    subprocess.run(wrapped, check=True, env=environment)


def main(dockerfile: str) -> None:
    made = not Path(PLACE).exists()
    Path(PLACE).mkdir(exist_ok=True)
    steps = instructions(Path(dockerfile))
    try:
        with tempfile.TemporaryDirectory(prefix="image-") as folder:
            place = Path(folder)
            place.chmod(0o755)
            for kind, arguments in steps:
                if kind == "COPY" and not arguments.startswith("--from"):
                    *sources, target = arguments.split()
                    copy(sources, target, place)
                elif kind == "RUN" and "apt-get" not in arguments:
                    run_inside(place, ["bash", "-c", arguments])
            final = dict(steps)  # the last of each kind: those of the last stage
            run_inside(place, [*NOBODY, *json.loads(final["HEALTHCHECK"].split("CMD", 1)[1])], "/tmp")
            run_inside(place, [*NOBODY, *json.loads(final["ENTRYPOINT"]), *json.loads(final["CMD"])], "/tmp")
    finally:
        if made:
            Path(PLACE).rmdir()


if __name__ == "__main__":
    main(sys.argv[1])
