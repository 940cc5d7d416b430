"""Jobs of the cluster: submit, look, wait, signal, cancel."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster import Cluster, SlurmError, wait_until

FINAL_STATES = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}


@dataclass(frozen=True)
class Job:
    """One submitted job; `output` has what its script and ranks say, restarts included."""

    cluster: Cluster
    id: str
    output: Path

    def fact(self, name: str) -> str:
        """A field of `scontrol show job`; one without spaces."""
        told = self.cluster.command("scontrol", "--oneliner", "show", "job", self.id)
        return dict(field.split("=", 1) for field in told.split() if "=" in field)[name]

    @property
    def state(self) -> str:
        return self.fact("JobState")

    @property
    def restarts(self) -> int:
        """How often the job was requeued."""
        return int(self.fact("Restarts"))

    def text(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def wait_for(self, what: str, condition: Callable[[], bool], seconds: float) -> None:
        """Fails when it does not come true in time, and at once when the job ends without it."""

        def looked() -> bool:
            ended = self.state in FINAL_STATES
            if condition():
                return True
            if ended:
                raise SlurmError(f"ended without {what}\n{self.report()}")
            return False

        wait_until(looked, seconds, lambda: f"no {what}\n{self.report()}")

    def wait_for_state(self, state: str, seconds: float) -> None:
        self.wait_for(f"state {state}", lambda: self.state == state, seconds)

    def wait_for_text(self, text: str, seconds: float) -> None:
        self.wait_for(f"{text!r} in the output", lambda: text in self.text(), seconds)

    def wait_for_end(self, seconds: float) -> None:
        """Until the job ended, no matter how, and nothing of it runs any more."""

        def over() -> bool:
            return self.state in FINAL_STATES and not self.processes()

        wait_until(over, seconds, lambda: f"no end; still there: {self.processes()}\n{self.report()}")

    def signal(self, name: str) -> None:
        """To the batch script alone, as `--signal=B:` has it."""
        self.cluster.command("scancel", f"--signal={name}", "--batch", self.id)

    def cancel(self) -> None:
        self.cluster.command("scancel", self.id)

    def processes(self, **variables: str) -> dict[int, str]:
        """Of the job on all nodes, or those with these variables: its script, its steps and all that they started."""
        return self.cluster.processes(SLURM_JOB_ID=self.id, **variables)

    def ranks(self, **variables: str) -> dict[int, str]:
        """Of the job on all nodes, or those with these variables: the processes that train."""
        return {
            process: command
            for process, command in self.processes(**variables).items()
            if re.match(r"\S*python\S* -m hvdlocal train ", command)
        }

    def launcher(self) -> int:
        """The mpirun of the job; Open MPI 5 calls it prterun."""
        return min(pid for pid, command in self.processes().items() if re.match(r"\S*(mpirun|prterun) ", command))

    def open_mpi_files(self) -> list[Path]:
        """What the job's Open MPI keeps outside of the run, that of killed starts included."""
        places = (Path("/dev/shm"), Path(tempfile.gettempdir()))
        return [path for place in places for path in place.glob(f"hvdlocal-mpi-{self.id}-*/*")]

    def report(self) -> str:
        """All there is to say about it when something went wrong."""
        facts = ", ".join(f"{name}={self.fact(name)}" for name in ("JobState", "Reason", "ExitCode", "Restarts"))
        return f"job {self.id}: {facts}\n-- its output\n{self.text()[-6000:]}\n{self.cluster.logs()}"


def submit(cluster: Cluster, output: Path, *arguments: str) -> Job:
    """`sbatch` with these arguments (options, script, its arguments)."""
    appending = [f"--output={output}", "--open-mode=append"]
    said = cluster.command("sbatch", "--parsable", "--requeue", *appending, *arguments)
    return Job(cluster, said.strip(), output)
