"""A SLURM of two nodes on this machine: real munged, slurmctld and slurmd, on loopback, in a folder of their own."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
INSTALL = "apt-get install -y --no-install-recommends slurm-wlm munge"


def why_not() -> str | None:
    """Why no SLURM can be started here, with the remedy; None if one can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if absent:
        return f"no real SLURM was tested: {', '.join(absent)} not installed; as root: {INSTALL}"
    if os.geteuid() != 0:
        return "no real SLURM was tested: its daemons are started as root"
    return None


@dataclass(frozen=True)
class Slurm:
    """A running SLURM; `environment` is what its clients need to find it."""

    folder: Path
    environment: dict[str, str]

    def ask(self, *words: str) -> str:
        """Run one of its commands; return what it prints."""
        made = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        assert made.returncode == 0, f"{words}: {made.stderr}\n{self.logs()}"
        return made.stdout

    def job(self, number: str) -> dict[str, str]:
        """What SLURM says of a job, by key, as `JobState`."""
        words = self.ask("scontrol", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, states: set[str], seconds: float) -> dict[str, str]:
        """Wait until the job is in one of the states."""
        end = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < end, f"job {number} is {job['JobState']} ({job.get('Reason')})\n{self.logs()}"
            time.sleep(0.2)
        return job

    def logs(self) -> str:
        """The ends of all daemons' logs."""
        return "\n".join(f"{p.name}:\n{p.read_text(errors='replace')[-1500:]}" for p in self.folder.glob("*.log"))


@contextmanager
def two_nodes(folder: Path) -> Iterator[Slurm]:
    """Start a SLURM whose nodes `node1` and `node2` are this machine, with as many CPUs each as it has.

    Jobs of partition `urgent` take the nodes from those of `main`, which are told so by their own signal and have a
    minute. A job that is queued again waits for the lifetime of a credential, here five seconds.
    """
    ports = _free_ports(3)
    (folder / "munge.key").write_bytes(os.urandom(128))
    for secret in (folder, folder / "munge.key"):
        secret.chmod(secret.stat().st_mode & 0o700)
    (folder / "slurm.conf").write_text(_settings(folder, ports))
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
    munged = ["munged", "--foreground", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket"]
    munged += [f"--pid-file={folder}/munge.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed"]
    commands = [munged, ["slurmctld", "-D", "-i"], ["slurmd", "-D", "-N", "node1"], ["slurmd", "-D", "-N", "node2"]]
    started: list[subprocess.Popen[bytes]] = []
    slurm = Slurm(folder, environment)
    try:
        for command in commands:
            with (folder / "said.log").open("ab") as said:
                started.append(subprocess.Popen(command, env=environment, stdout=said, stderr=said))
            if command is munged:
                _until(lambda: (folder / "munge.socket").exists(), slurm)
        _until(
            lambda: subprocess.run(["scontrol", "ping"], env=environment, capture_output=True).returncode == 0, slurm
        )
        _until(lambda: slurm.ask("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2", slurm)
        assert all(process.poll() is None for process in started), slurm.logs()
        yield slurm
    finally:
        subprocess.run(["scancel", "--signal=KILL", "--user=root"], env=environment, capture_output=True, check=False)
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
        for process in reversed(started):
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _until(what: object, slurm: Slurm, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not what():  # type: ignore[operator]
        assert time.monotonic() < end, slurm.logs()
        time.sleep(0.1)


def _settings(folder: Path, ports: list[int]) -> str:
    cpus = os.cpu_count() or 1
    nodes = "".join(
        f"NodeName=node{i} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[i]} CPUs={cpus}\n" for i in (1, 2)
    )
    return f"""\
ClusterName=loopback
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=sched_interval=2
{nodes}PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=60 State=UP
PartitionName=urgent Nodes=ALL PriorityTier=9 PreemptMode=OFF State=UP
"""


def _free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    try:
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in held]
    finally:
        for one in held:
            one.close()


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
