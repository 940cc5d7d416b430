"""A real Slurm of two nodes on this machine: munged, slurmctld and two slurmd, with everything of theirs in one directory.

Nothing of a site's Slurm is read or touched, and systemd and cgroups are not needed.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from guard import guarded, processes_with

DAEMONS_PATH = "/usr/sbin:/sbin"  # not on everybody's PATH
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")

CONFIGURATION = """\
ClusterName=hvdlocal
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it starts again; 5 s is the least there is, two minutes are usual.
AuthInfo=socket={base}/munge.socket,cred_expire=5
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool-%n
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd-%n.pid
# What slurmstepd says goes nowhere else.
SlurmdLogFile={base}/steps-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
JobRequeue=1
KillWait=5
ReturnToService=2
# The nodes have the CPUs and GPUs written here and in gres.conf, whatever the machine has.
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 Gres=gpu:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 Gres=gpu:2
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


class SlurmError(AssertionError):
    """The cluster did not do what was asked of it; the message holds what its programs said."""


def missing_programs() -> list[str]:
    """What this machine lacks for a cluster."""
    path = f"{os.environ['PATH']}:{DAEMONS_PATH}"
    return [program for program in PROGRAMS if shutil.which(program, path=path) is None]


def wait_until(condition: Callable[[], bool], seconds: float, otherwise: Callable[[], str]) -> None:
    """Looks five times a second; fails with what `otherwise` says when the condition does not hold within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SlurmError(f"waited {seconds} s in vain: {otherwise()}")
        time.sleep(0.2)


@dataclass(frozen=True)
class Cluster:
    """Two nodes, n1 and n2, that are both this machine."""

    directory: Path
    environment: dict[str, str]

    def command(self, *arguments: str, seconds: float = 30) -> str:
        """Runs a command of Slurm; returns what it printed."""
        done = subprocess.run(
            arguments, env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds
        )
        if done.returncode:
            raise SlurmError(f"{' '.join(arguments)}: {done.stderr}{done.stdout}")
        return done.stdout

    def processes(self, **variables: str) -> dict[int, str]:
        """Command lines, by process id, of what this cluster started and what has these variables in its environment."""
        return processes_with(SLURM_CONF=self.environment["SLURM_CONF"], **variables)

    def logs(self) -> str:
        """The end of every daemon's log."""
        ends = {log.name: log.read_text(errors="replace")[-2000:] for log in sorted(self.directory.glob("*.log"))}
        return "\n".join(f"-- {name}\n{end}" for name, end in ends.items())


@contextmanager
def running_cluster(environment: dict[str, str]) -> Iterator[Cluster]:
    """A cluster that takes jobs. Nothing of it is left afterwards, nor when it does not start.

    Args:
        environment: of the daemons, and so of the jobs.
    """
    with ExitStack() as stack:
        # Not in pytest's directory: the path of a socket has 107 characters at most.
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hvdlocal-slurm-")))
        configuration = directory / "slurm.conf"
        path = f"{environment['PATH']}:{DAEMONS_PATH}"
        cluster = Cluster(directory, {**environment, "PATH": path, "SLURM_CONF": str(configuration)})
        stack.enter_context(guarded(configuration))

        host, ports = socket.gethostname().partition(".")[0], _free_ports(3)
        settings = {"base": directory, "host": host, "ports": ports, "user": os.getuid()}
        configuration.write_text(CONFIGURATION.format(**settings))
        (directory / "gres.conf").write_text("NodeName=n[1-2] Name=gpu File=/dev/null,/dev/zero\n")
        # Older ones do not know the setting, nor look for cgroups when no plugin uses them.
        if _version(cluster) >= (24, 5):
            (directory / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        for name in ("state", "spool-n1", "spool-n2"):
            (directory / name).mkdir()

        stack.enter_context(_munged(cluster))
        stack.enter_context(_daemon(cluster, "slurmctld", "slurmctld", "-D"))
        for node in ("n1", "n2"):
            stack.enter_context(_daemon(cluster, f"slurmd-{node}", "slurmd", "-D", "-N", node))
        wait_until(lambda: _idle_nodes(cluster) == 2, 30, lambda: f"no two idle nodes\n{cluster.logs()}")
        stack.callback(_cancel_all, cluster)
        yield cluster


@contextmanager
def _munged(cluster: Cluster) -> Iterator[None]:
    directory = cluster.directory
    key = directory / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    options = [f"--{name}-file={directory}/munge.{name}" for name in ("pid", "seed")]
    options += [f"--socket={directory}/munge.socket", f"--log-file={directory}/munge.log"]
    with _daemon(cluster, "munged", "munged", "--foreground", "--force", f"--key-file={key}", *options):
        wait_until((directory / "munge.socket").exists, 20, lambda: f"munged made no socket\n{cluster.logs()}")
        yield


@contextmanager
def _daemon(cluster: Cluster, name: str, *command: str) -> Iterator[None]:
    """In the foreground, and our child."""
    with (cluster.directory / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=cluster.directory,
            env=cluster.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _version(cluster: Cluster) -> tuple[int, ...]:
    return tuple(int(part) for part in cluster.command("slurmd", "-V").split()[-1].split(".")[:2])


def _idle_nodes(cluster: Cluster) -> int:
    try:
        return cluster.command("sinfo", "--noheader", "--Node", "--format=%t").split().count("idle")
    except SlurmError:  # slurmctld does not answer yet
        return 0


def _cancel_all(cluster: Cluster) -> None:
    cluster.command("scancel", f"--user={os.getuid()}")
    jobs = ("squeue", "--noheader")
    wait_until(lambda: not cluster.command(*jobs), 30, lambda: f"jobs that do not end\n{cluster.command(*jobs)}")


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
