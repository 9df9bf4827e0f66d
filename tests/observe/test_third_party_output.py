"""Other libraries' output."""

import subprocess
import sys

CODE = (
    "import os, sys, warnings\n"
    "os.environ['TRANSFORMERS_VERBOSITY'] = 'info'\n"
    "from mxdist.observe.third_party_output import quieten_third_party\n"
    "quieten_third_party()\n"
    "assert os.environ['TRANSFORMERS_VERBOSITY'] == 'info'\n"
    "assert os.environ['WANDB_SILENT'] == 'true'\n"
    "warnings.warn_explicit('theirs', FutureWarning, 'ray/x.py', 1, module='ray.x')\n"
    "warnings.warn_explicit('ours', UserWarning, 'mxdist/x.py', 1, module='mxdist.x')\n"
)


def test_their_warnings_are_dropped_ours_are_shown_and_the_users_environment_wins() -> None:
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert "theirs" not in run.stderr
    assert "ours" in run.stderr
