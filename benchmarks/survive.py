"""Kills random ranks of real training at random moments, and checks that the others finish it; or measures what this costs.

    python benchmarks/survive.py --kills 100 --seed 1
    python benchmarks/survive.py --cost

Each job of --kills has random settings, two to four ranks, and loses one to all but one of them, rank 0 too, at any moment from
the start of mpirun to the end. It must end by itself: with 0; with 85 when fewer ranks than `min_workers` are left; or, after a
death before training, with any code after which a batch script starts it again. Then the same command must end with 0. The
replicas of all ranks must be equal to the bit at each evaluation and at the end, and `metrics.jsonl` must hold each step, round
and evaluation once. A job is repeated with `--kills 1 --seed SEED`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kill_loop import DEADLINE_SECONDS, FINAL, ROOT, Broken, Combination, Run, end_of, send, session, write_data
from survive_digests import DIGESTS

from hvdlocal.exit_codes import ExitCode

EARLY = 0.2
"""Share of the kills whose moment is drawn from the time before training."""

TIMEOUT_SECONDS = 60.0
"""Of a collective, and of the start of MPI, which waits for a rank that was killed before it."""

WITH_FAULT_TOLERANCE = ("--with-ft", "ulfm")


@dataclass
class Victim:
    """A rank that is to be killed.

    Attributes:
        rank: its number.
        early: whether the moment counts from the start of mpirun; otherwise from the first record of a step.
        seconds: the moment.
        during: what the job was doing when the rank was killed; None if it had ended before.
    """

    rank: int
    early: bool
    seconds: float
    during: str | None = None

    def __str__(self) -> str:
        return f"{self.rank} {self.seconds:.1f} s after the {'start' if self.early else 'first step'}"


@dataclass(frozen=True)
class Job:
    """A job and its victims.

    Attributes:
        seed: with which it was drawn.
        combination: ranks and settings.
        min_workers: the setting of this name.
        victims: in the order of their deaths, as far as it is known.
    """

    seed: int
    combination: Combination
    min_workers: int
    victims: list[Victim]

    @classmethod
    def draw(cls, seed: int, start_seconds: float, training_seconds: float) -> Job:
        """Draws a job whose undisturbed run takes about these times before and in training."""
        dice = random.Random(seed)
        settings = ["carry" if one == "drop" else one for one in Combination.draw(dice).settings]
        ranks = dice.choice([2, 3, 4])
        min_workers = dice.choice([1, 1, 1, 2])
        settings = [*settings, "--survive", "true", "--min_workers", str(min_workers)]
        victims = []
        for rank in dice.sample(range(ranks), dice.randint(1, ranks - 1)):
            early = dice.random() < EARLY
            victims.append(Victim(rank, early, dice.uniform(0, start_seconds if early else training_seconds)))
        return cls(seed, Combination(ranks, "mpi4py", settings), min_workers, victims)

    def __str__(self) -> str:
        return f"{self.combination}, killing {', '.join(map(str, self.victims))}"


# -- a job ----------------------------------------------------------------------------------------------------------------


def steps_recorded(run: Run) -> bool:
    """Returns whether training has begun."""
    with suppress(OSError):
        return (run.output / "metrics.jsonl").stat().st_size > 0
    return False


def ranks_of(process: subprocess.Popen[bytes]) -> dict[int, int]:
    """Returns the process ids of the ranks that have been started, by rank."""
    found = {}
    for pid, command in session(process.pid).items():
        with suppress(OSError):
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            rank = [one for one in variables if one.startswith(b"OMPI_COMM_WORLD_RANK=")]
            if rank and " -m hvdlocal train" in command:
                found[int(rank[0].partition(b"=")[2])] = pid
    return found


def start_and_kill(run: Run, victims: list[Victim]) -> int:
    """Starts a job, kills the victims in it, and returns the exit code.

    Raises:
        Broken: it did not end within its deadline.
    """
    with run.started() as process:
        start, first_step = time.monotonic(), None
        waiting = list(victims)
        while waiting and process.poll() is None and time.monotonic() - start < DEADLINE_SECONDS:
            began = steps_recorded(run)
            if began and first_step is None:
                first_step = time.monotonic()
            for victim in list(waiting):
                origin = start if victim.early else first_step
                pid = ranks_of(process).get(victim.rank)
                if origin is None or pid is None or time.monotonic() < origin + victim.seconds:
                    continue
                victim.during = "training" if began else "the start"
                send(pid, signal.SIGKILL)
                waiting.remove(victim)
            time.sleep(0.01)
        return end_of(process)


def records_of(run: Run) -> list[dict[str, Any]]:
    """Returns the records of metrics.jsonl, of which a torn one would be an error."""
    return [json.loads(line) for line in (run.output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def check_records(run: Run, job: Job) -> set[int]:
    """Checks that nothing is missing in a finished run's records, and nothing there twice; returns the ranks that were lost."""
    records = records_of(run)
    summary = json.loads((run.output / "summary.json").read_text(encoding="utf-8"))
    steps = [record["step"] for record in records if record["kind"] == "steps"]
    if steps != list(range(1, summary["steps"] + 1)):
        raise Broken(f"metrics.jsonl has other steps than 1 to {summary['steps']}: {steps}")
    rounds = [record["round"] for record in records if record["kind"] == "round"]
    if rounds != list(range(1, len(rounds) + 1)):
        raise Broken(f"metrics.jsonl has other rounds than 1 to {len(rounds)}: {rounds}")
    evaluations = [record["step"] for record in records if record["kind"] == "evaluation"]
    if evaluations != sorted(set(evaluations)) or evaluations[-1:] != steps[-1:]:
        raise Broken(f"metrics.jsonl has evaluations at {evaluations}")
    lost = [rank for record in records if record["kind"] == "lost" for rank in record["ranks"]]
    killed = {victim.rank for victim in job.victims if victim.during is not None}
    if len(set(lost)) < len(lost) or not set(lost) <= killed:
        raise Broken(f"metrics.jsonl says that ranks {lost} were lost, and {sorted(killed)} were killed")
    return set(lost)


def notes_of(run: Run) -> dict[int, list[dict[str, Any]]]:
    """Returns what each rank has noted since the job's last start."""
    found = {}
    for rank in range(run.combination.ranks):
        path = run.directory / DIGESTS.format(rank=rank)
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        found[rank] = [
            json.loads(line) for line in lines if line.endswith("\n")
        ]  # the last one of a killed rank may be torn
    return found


def check_replicas(run: Run) -> set[int]:
    """Checks that all ranks had the same replica wherever they noted one; returns the ranks that finished."""
    digests: dict[tuple[str, int], set[str]] = {}
    notes = notes_of(run)
    for noted in notes.values():
        for note in noted:
            if note["event"] in ("evaluation", "finished"):
                digests.setdefault((note["event"], note["step"]), set()).add(note["digest"])
    if differing := [place for place, found in digests.items() if len(found) > 1]:
        raise Broken(f"the replicas differ: {differing}")
    return {rank for rank, noted in notes.items() if noted and noted[-1]["event"] == "finished"}


def carry_out(run: Run, job: Job) -> int:
    """Runs a job, after a code of 85 once more, and checks what it has left; returns the first exit code.

    Raises:
        Broken: a promise does not hold.
    """
    everyone = set(range(run.combination.ranks))
    code = start_and_kill(run, job.victims)
    killed = {victim.rank for victim in job.victims if victim.during is not None}
    if code != ExitCode.FINISHED:
        in_training = not any(victim.during == "the start" for victim in job.victims)
        too_few = len(everyone - killed) < job.min_workers and code == ExitCode.INTERRUPTED
        if code in FINAL or (in_training and not too_few):
            raise Broken(f"code {code}")
    check_replicas(run)
    if code != ExitCode.FINISHED:
        for path in run.directory.glob(DIGESTS.format(rank="*")):
            path.unlink()
        if again := start_and_kill(run, []):
            raise Broken(f"code {again} at the start after one that ended with {code}")
        killed = set()
    lost, finished = check_records(run, job), check_replicas(run)
    if not everyone - killed <= finished or (code == ExitCode.FINISHED and finished & lost):
        raise Broken(
            f"ranks {sorted(finished)} finished; {sorted(killed)} were killed, of which {sorted(lost)} are recorded"
        )
    return code


# -- all jobs -------------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What has been done, for the table."""

    kills: Counter[str] = field(default_factory=Counter)
    jobs: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)

    def add(self, job: Job, code: int, seconds: float) -> None:
        """Counts a job that kept its promises."""
        killed = [victim for victim in job.victims if victim.during is not None]
        self.kills.update(f"a rank, during {victim.during}" for victim in killed)
        ranks = job.combination.ranks
        names = ["all jobs", f"{len(killed)} of {ranks} ranks killed", "rank 0 killed"]
        for name in names if any(victim.rank == 0 for victim in killed) else names[:2]:
            self.jobs[f"{name}, ended with {int(code)}"] += 1
        self.seconds.append(seconds)

    def __str__(self) -> str:
        rows = [(name, count) for counter in (self.kills, self.jobs) for name, count in sorted(counter.items())]
        longest = f"\nlongest job {max(self.seconds):.0f} s" if self.seconds else ""
        return "\n".join(f"{name:40}{count:5}" for name, count in rows) + longest


def undisturbed(run: Run) -> tuple[float, float]:
    """Returns the seconds that a run takes before its first step, and from there to its end."""
    with run.started() as process:
        start, first_step = time.monotonic(), None
        while process.poll() is None and first_step is None and time.monotonic() - start < DEADLINE_SECONDS:
            first_step = time.monotonic() if steps_recorded(run) else None
            time.sleep(0.01)
        if (code := end_of(process)) or first_step is None:
            raise Broken(f"code {code} without a fault")
    return first_step - start, time.monotonic() - first_step


def kill(kills: int, seed: int, directory: Path, memory: Path) -> int:
    """Runs jobs until so many ranks were killed; returns 1 if a promise does not hold, in which case the files are kept.

    Args:
        kills: number of ranks.
        seed: of the first job.
        directory: for files.
        memory: for Open MPI's shared memory.
    """
    config = write_data(directory)
    config.write_text(config.read_text() + 'callbacks: [{name: "survive_digests:Digests"}]\n')
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "TMPDIR": str(directory)}
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'benchmarks'}"
    environment["HVDLOCAL_TIMEOUT_SECONDS"] = str(TIMEOUT_SECONDS)
    environment["OMPI_MCA_btl_sm_backing_directory"] = str(memory)
    tally = Tally()
    try:
        trial = Combination(2, "mpi4py", ["--survive", "true"])
        times = undisturbed(Run(trial, config, directory / "undisturbed", environment, WITH_FAULT_TOLERANCE))
        print(f"undisturbed: {times[0]:.1f} s before the first step, {times[1]:.1f} s after it", flush=True)
        while tally.kills.total() < kills:
            job = Job.draw(seed, *times)
            print(f"seed {seed}: {job}", flush=True)
            run = Run(job.combination, config, directory / str(seed), environment, WITH_FAULT_TOLERANCE)
            start = time.monotonic()
            code = carry_out(run, job)
            tally.add(job, code, time.monotonic() - start)
            shutil.rmtree(run.directory)
            seed += 1
    except Broken as error:
        kept = Path(tempfile.mkdtemp(prefix="hvdlocal-survive-")) / "broken"
        shutil.copytree(directory, kept)
        print(f"seed {seed}: {error}\nwhat it wrote is left in {kept}", flush=True)
        return 1
    finally:
        print(f"{tally.kills.total()} ranks killed in {len(tally.seconds)} jobs\n{tally}", flush=True)
    return 0


def main() -> int:
    """Kills, or measures; returns 1 if a promise does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="number of ranks to kill in all")
    parser.add_argument("--seed", type=int, default=0, help="of the first job; the next one has the next number")
    parser.add_argument("--cost", action="store_true", help="measure an averaging in which nothing dies, on two ranks")
    options = parser.parse_args()
    if options.cost:
        command = [str(ROOT / "install/mpirun"), "-np", "2", *WITH_FAULT_TOLERANCE]
        command += [sys.executable, str(ROOT / "benchmarks/survive_cost.py")]
        return subprocess.run(command, cwd=ROOT, check=False, stdin=subprocess.DEVNULL).returncode
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left
    with (
        tempfile.TemporaryDirectory(prefix="hvdlocal-survive-", ignore_cleanup_errors=True) as directory,
        tempfile.TemporaryDirectory(prefix="hvdlocal-survive-", dir="/dev/shm", ignore_cleanup_errors=True) as memory,
    ):
        return kill(options.kills, options.seed, Path(directory), Path(memory))


if __name__ == "__main__":
    sys.exit(main())
