"""`hvdlocal COMMAND …`: runs a command, and turns its errors into one sentence and an exit code."""

from __future__ import annotations

import importlib
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hvdlocal import terminal
from hvdlocal.communicator.errors import CommunicationError, DisagreementError, LaunchError, SetupError
from hvdlocal.communicator.launched import launched_rank
from hvdlocal.communicator.losses import TooFewRanksError
from hvdlocal.exit_codes import ExitCode
from hvdlocal.import_path import OwnCodeError
from hvdlocal.training import interruption
from hvdlocal.training.errors import CallbackError, DamageError, DivergedError, LostRankError
from hvdlocal.version import __version__

if TYPE_CHECKING:
    from hvdlocal.communicator import Communicator

COMMANDS = {
    "prepare": "write a data set as shards: hvdlocal prepare DATA_SET --output DIR",
    "train": "train a model: mpirun -np N hvdlocal train CONFIG.yaml",
    "plan": "show what a run will do and cost: hvdlocal plan CONFIG.yaml --workers K",
    "advise": "measure whether local steps pay here, and with which H: mpirun -np N hvdlocal advise CONFIG.yaml",
    "export": "write the model of an unfinished run, from its newest checkpoint",
    "finished": "say whether the run of a configuration is finished: hvdlocal finished CONFIG.yaml",
    "doctor": "check this installation",
    "report": "write an HTML page about runs: hvdlocal report RUN…",
    "figures": "draw the figures of Balles et al. that follow from their formulas and tables",
    "reproduce": "run the experiments of Balles et al. and of Gu et al. (QSR) again",
    "slurm": "make a batch script for Slurm, or submit one",
}

LASTING = ("prepare", "train", "advise", "reproduce")
"""Commands that continue when their output can no longer be written; the output of the others is their purpose."""

REPORTING_SECONDS = 1.0
"""How long a rank with an error waits before it exits: mpirun ends all ranks as soon as one of them exits with an error, and each
rank should be able to report its own."""

NOTICING_SECONDS = 10.0
"""The same while the other ranks are training: they reach a collective within a few seconds, and notice its failure a little
later."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        An `ExitCode`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    with terminal.guarded(lasting=_lasts(arguments)):
        try:
            try:
                return _run(arguments)
            finally:
                sys.stdout.flush()  # after --print_config too, which leaves by SystemExit
        except terminal.OutputError as error:
            if isinstance(error.__cause__, BrokenPipeError):
                return ExitCode.UNREAD
            _complain(str(error))
            return ExitCode.FAILED


def _lasts(arguments: Sequence[str]) -> bool:
    """Returns whether the command continues when it cannot print; with an option that asks for output, no command does."""
    prints = any(word in ("-h", "--help") or word.startswith("--print_config") for word in arguments)
    return bool(arguments) and arguments[0] in LASTING and not prints


def _run(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["--version"]:
        print(f"hvdlocal {__version__}")
        return ExitCode.FINISHED
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return ExitCode.FINISHED
    command, *rest = arguments
    if command not in COMMANDS:
        _complain(f"no command {command!r}: choose one of {', '.join(COMMANDS)}")
        return ExitCode.MISTAKE
    if (
        command == "train"
    ):  # before the import of torch, which may take minutes and during which a signal would end the process
        interruption.install_handlers()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a closed terminal must not end the run
    try:
        return importlib.import_module(f"hvdlocal.cli.{command}").run(rest)
    except terminal.OutputError:
        raise
    except KeyboardInterrupt:
        return ExitCode.STOPPED
    except Exception as error:
        return _explain(error)


def _explain(error: Exception) -> int:
    """Prints what went wrong.

    Returns:
        The exit code.
    """
    if isinstance(error, DamageError):
        _complain(str(error))
        _leave_without_meeting(ExitCode.MISTAKE)
        return ExitCode.MISTAKE
    if isinstance(error, CommunicationError):
        _complain(str(error))
        if not _has_joined():
            return ExitCode.PEER_FAILED
        if isinstance(error, TooFewRanksError):  # the last checkpoint is there to go on from
            _communicator().abort(ExitCode.INTERRUPTED)
        # The other ranks cannot be reached: an orderly end would wait for them, or finalise MPI during a collective.
        _communicator().abort(ExitCode.PEER_FAILED)
    if isinstance(error, DivergedError | SetupError | DisagreementError | CallbackError):  # raised on all ranks
        _complain(str(error))
        code = ExitCode.DIVERGED if isinstance(error, DivergedError) else ExitCode.MISTAKE
        try:
            _communicator().barrier("hvdlocal.end")
        except CommunicationError:  # another rank left without waiting
            _communicator().abort(code)
        return code
    if isinstance(error, ValueError | OSError | ImportError | LaunchError):
        _complain((terminal.plain(error) if isinstance(error, OSError) else str(error)) or type(error).__name__)
        if launched_rank() is not None:
            time.sleep(REPORTING_SECONDS)
        return ExitCode.MISTAKE
    code = ExitCode.FAILED
    if isinstance(error, LostRankError):
        own = isinstance(error.__cause__, OwnCodeError)
        if isinstance(error.__cause__, ValueError) and not own:  # damaged data or a bug: the traceback helps
            traceback.print_exception(error.__cause__)
        _complain(str(error))
        if own:  # and the next start would fail in the same way
            code = ExitCode.MISTAKE
    elif shortage := _shortage(error):
        _complain(shortage)
    else:
        traceback.print_exception(error)
        _complain(f"ended by {type(error).__name__}, which is a bug of hvdlocal or of what it uses; see the traceback")
    if _has_joined() and _communicator().size > 1:
        _communicator().abort(code)
    return code


def _leave_without_meeting(code: int) -> None:
    """Ends this rank so that the others notice it by a failing collective and can report the reason."""
    communicator = _communicator()
    if communicator.size > 1:
        if not communicator.survives:  # there, a rank that dies is noticed anyway
            communicator.shutdown()
            time.sleep(NOTICING_SECONDS)
        communicator.abort(code)


def _communicator() -> Communicator:
    from hvdlocal.communicator import current  # loads torch, which a mistake in the arguments need not wait for

    return current()


def _has_joined() -> bool:
    """Returns whether the ranks of this job have a communicator."""
    try:
        _communicator()
    except RuntimeError:
        return False
    return True


def _shortage(error: Exception) -> str | None:
    from hvdlocal.training.memory import out_of_memory  # loads torch

    return out_of_memory(error)


def _complain(message: str) -> None:
    rank = launched_rank()
    terminal.complain(f"hvdlocal{'' if rank is None else f' (rank {rank})'}: {message}")


def _help() -> str:
    lines = [f"  {name:9} {text}" for name, text in COMMANDS.items()]
    return "\n".join(["usage: hvdlocal COMMAND …", "", *lines, "", "hvdlocal COMMAND --help describes a command."])
