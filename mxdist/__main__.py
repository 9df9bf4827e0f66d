"""The ``mxdist`` command, and ``python -m mxdist``."""

from mxdist.interrupts import ending_at_once

with ending_at_once():
    from mxdist.cli import main

if __name__ == "__main__":
    main()
