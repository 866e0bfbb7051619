"""memedit as an ingestion's pod runs it: that another run is at work is no failure.

`python -m workflows.render_entry ingest --config FILE`. Exit code 4, another run holds the lock of
the registry, becomes 0, so that nobody is woken: the next run of the schedule makes up for it. All
other exit codes are memedit's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from memedit.errors import LockError
from workflows.cli import run


def main(arguments: Sequence[str]) -> int:
    """Run the command line; gives the exit code."""
    code = run(arguments)
    return 0 if code == LockError.exit_code else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
