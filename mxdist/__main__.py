"""``python -m mxdist`` is the ``mxdist`` command."""

from mxdist.cli import main

main()
