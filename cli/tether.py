"""``python tether.py PID COMMAND...``: becomes COMMAND, which the kernel ends with process PID, its parent.

A program of its own because it has to be done in the child, and nothing may be done between fork and exec in a process
with other threads (gRPC's abort there).
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(1)  # it ended before the kernel was told
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
