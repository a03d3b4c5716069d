"""What a started engine runs in first: it becomes the engine, and ends with the process that started it.

Run as a file, by itself. Linux is asked to send this process SIGTERM when its parent is gone, however that went; the
wish outlives the change into the engine's own program.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(parent: int, command: list[str]) -> None:
    """Become `command`, to be ended when the process `parent` is."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit("the server that started this engine is gone")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
