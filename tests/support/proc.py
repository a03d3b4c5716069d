"""What the system tells of a process: those that it started, and the memory they hold."""

from pathlib import Path


def children(pid: int) -> list[int]:
    """The processes that a process has started and that run."""
    return [int(one) for file in Path(f"/proc/{pid}/task").glob("*/children") for one in file.read_text().split()]


def resident(pid: int) -> int:
    """Bytes of memory that a process and those that it started hold now."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS:")]
    return (int(line.split()[1]) << 10) + sum(resident(one) for one in children(pid))
