"""The command that starts ranks on this machine, and the reason in its output if it fails.

install/mpirun and slurm/common.sh apply the same rules in shell: the first is what `make` and CI call before any Python, the
second runs as the batch script itself and adds what a cluster needs (ranks per node, variables for other nodes).
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence

_REMOVE_LEFTOVERS = 'rm -rf "${PRTE_MCA_prte_tmpdir_base:-${TMPDIR:-/tmp}}/ompi.$$"; exec "$@"'

REFUSES_ROOT = "Open MPI refuses to start ranks as root"
ALLOW_ROOT = "use another account, or export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"


def launcher_words(words: str | None = None) -> list[str]:
    """Returns the words of a launch command that come before the number of ranks.

    Args:
        words: the user's choice, such as "srun --mpi=pmix -n"; None for the mpirun on PATH, with options for one machine: ranks
            may outnumber the cores (Open MPI asks for that to be said) and are not bound to a core, which a rank would share
            with Horovod's thread.

    Raises:
        ValueError: there is no such command.
    """
    if words is not None:
        split = shlex.split(words)
        if not split or shutil.which(split[0]) is None:
            raise ValueError(f"launcher {words!r}: no such command on PATH")
        return split
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        raise ValueError("no mpirun on PATH: load the site's MPI module")
    return [mpirun, *(["--oversubscribe", "--bind-to", "none"] if is_open_mpi(mpirun) else ["-bind-to", "none"]), "-np"]


def is_open_mpi(mpirun: str) -> bool:
    """Returns whether this mpirun is Open MPI's, which calls itself by several names; MPICH, Intel MPI and Cray use Hydra."""
    answer = subprocess.run(
        [mpirun, "--version"], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    first_lines = (answer.stdout + answer.stderr).splitlines()[:2]
    return any(name in line for line in first_lines for name in ("Open MPI", "OpenRTE", "PRTE"))


def without_leftovers(command: Sequence[str]) -> list[str]:
    """Returns a command that first removes the directory of an earlier, killed mpirun that had the same process id.

    Open MPI 5 would otherwise fail with "The PMIx server's listener thread failed to start". The shell that removes it becomes
    the command, so that signals to the new process reach the launcher.
    """
    return ["sh", "-c", _REMOVE_LEFTOVERS, "sh", *command]


def refused_root(output: str) -> bool:
    """Returns whether a launcher's output ends with Open MPI's refusal to start ranks as root."""
    return any("run as root" in line or "as root is" in line for line in _lines(output)[-12:])


def last_words(output: str, telling: Callable[[str], bool]) -> str:
    """Returns the line of a program's output that most probably says why the program failed.

    Args:
        output: of the program.
        telling: selects preferred lines; if there are none, the last line is taken.
    """
    lines = _lines(output)
    return ([line for line in lines if telling(line)] or lines or ["no output"])[-1][:400]


def _lines(output: str) -> list[str]:
    return [line.strip() for line in output.splitlines() if line.strip(" -")]
