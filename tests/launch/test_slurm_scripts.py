"""What the batch scripts do with exit codes and signals: run by bash as Slurm would run them, with stand-ins for its programs.

tests/slurm does the same with a real Slurm.
"""

import itertools
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support.launch import ROOT

from hvdlocal.exit_codes import ExitCode

# A launcher that notes how it was started, then does what LAUNCHER says. It hears USR2 as the ranks would through mpirun.
LAUNCHER = """\
#!/bin/bash
if [[ ${1:-} == --version ]]; then echo "${VERSION:-mpirun (Open MPI) 4.1.4}"; exit; fi
printf '%s\\n' "$@" >>"$RECORD/${0##*/}"
env >"$RECORD/${0##*/}.environment"
trap 'echo USR2 >>"$RECORD/signals"; heard=1' USR2
eval "$LAUNCHER"
"""
WAIT = 'touch "$RECORD/ready"; until [[ ${heard:-} ]]; do sleep 0.02; done; sleep 0.3;'

# Of srun, the options are dropped: staging runs commands on every node with it.
SRUN = """\
#!/bin/bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
NOTE = '#!/bin/bash\necho "$*" >>"$RECORD/${0##*/}"\nexit "${REFUSE:-0}"\n'


class Node:
    """A node of a cluster that is none."""

    def __init__(self, directory: Path):
        self.record = directory / "record"
        self.programs = directory / "programs"
        self.work = directory / "work"
        for path in (self.record, self.programs, self.work):
            path.mkdir()
        (self.work / "slurm").symlink_to(ROOT / "slurm")
        for name, text in {
            "mpirun": LAUNCHER,
            "srun": SRUN,
            "scontrol": NOTE,
            "squeue": NOTE,
            "apptainer": NOTE,
        }.items():
            self.install(name, text)

    def install(self, name: str, text: str) -> None:
        (self.programs / name).write_text(text)
        (self.programs / name).chmod(0o755)

    def start(self, template: str, *arguments: str, launcher: str = "exit 0", **variables: str) -> subprocess.Popen:
        """As slurmd does: a copy of the script, in its own session, in a directory that is not the user's."""
        copy = self.record.parent / "slurm_script"
        copy.write_bytes((ROOT / "slurm" / f"{template}.sbatch").read_bytes())
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "HVDLOCAL", "OMP_"))}
        own = {"RECORD": str(self.record), "LAUNCHER": launcher, "SLURM_SUBMIT_DIR": str(self.work)}
        return subprocess.Popen(
            ["bash", str(copy), *arguments],
            cwd=self.record,
            env={**kept, **own, "PATH": f"{self.programs}:{os.environ['PATH']}", **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, template: str, *arguments: str, **settings: str) -> tuple[int, str]:
        """Exit code and output of a script that nobody signals."""
        script = self.start(template, *arguments, **settings)
        said, _ = script.communicate(timeout=30)
        return script.returncode, said

    def noted(self, name: str) -> list[str]:
        path = self.record / name
        return path.read_text().splitlines() if path.exists() else []

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + 20
        while not (self.record / name).exists():
            assert time.monotonic() < deadline, f"no {name}"
            time.sleep(0.02)


@pytest.fixture
def node(tmp_path) -> Node:
    return Node(tmp_path)


ENDS = [  # what the launcher does, restarts so far, the script's exit code, whether the job is started again
    ("exit 0", 0, 0, False),
    ("exit 2", 0, 2, False),
    ("exit 3", 0, 3, False),
    ("exit 4", 0, 4, True),
    ("exit 4", 29, 4, True),
    ("exit 4", 30, 4, False),
    ("exit 85", 0, 85, True),
    ("exit 85", 1000, 85, True),
    ("kill -KILL $$", 0, 137, True),
    ("kill -KILL $$", 30, 137, False),
    ("exit 134", 2, 134, True),
    ("exit 1", 0, 1, True),  # a bug, and Open MPI 5's mpirun after a TERM
    ("exit 1", 30, 1, False),
    ("exit 14", 0, 14, True),  # Open MPI 5 after the death of a rank on another node
    ("exit 127", 0, 127, True),
    ("exit 251", 0, 251, True),  # the launcher's own
]


@pytest.mark.parametrize("template", ["cpu", "gpu-nodes-srun"])
@pytest.mark.parametrize(("end", "restarts", "code", "again"), ENDS)
def test_exit_codes(node, template, end, restarts, code, again):
    node.install("srun", LAUNCHER)
    variables = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts), "SLURM_NTASKS": "2"}
    assert node.run(template, "run.yaml", launcher=end, **variables)[0] == code
    assert node.noted("scontrol") == (["requeue Incomplete 7"] if again else [])


def documented() -> dict[int, str]:
    """What docs/checkpoints.md says that the templates do, by exit code."""
    text = (ROOT / "docs/checkpoints.md").read_text()
    rows = re.findall(r"^\| ([0-9]+) \|.*\| ([a-z ]+) \|$", text, re.MULTILINE)
    return {int(code): templates for code, templates in rows}


def test_srun_needs_pmix_but_for_the_engine_that_needs_no_mpi(node):
    node.install("srun", LAUNCHER)
    for engine, plugin in (("torch", "none"), ("mpi4py", "pmix"), ("", "pmix")):
        assert node.run("gpu-nodes-srun", "run.yaml", SLURM_NTASKS="2", HVDLOCAL_BACKEND=engine)[0] == 0
        assert [word for word in node.noted("srun") if word.startswith("--mpi=")][-1] == f"--mpi={plugin}"


def test_every_exit_code_is_documented():
    assert sorted(documented()) == sorted(ExitCode)


@pytest.mark.parametrize("code", list(ExitCode))
def test_the_documentation_says_what_the_templates_do(node, code):
    node.run("cpu", "run.yaml", launcher=f"exit {code}", SLURM_JOB_ID="7")
    assert documented()[code] == ("start it again" if node.noted("scontrol") else "end")


class Chain:
    """The starts of one job, the first and those after it."""

    def __init__(self, node: Node):
        self.node, self.starts = node, 0

    def start(self, launcher: str, **variables: str) -> tuple[bool, str]:
        """Whether the job is to be started again after this start, and what the script said."""
        (self.node.record / "scontrol").unlink(missing_ok=True)
        count = {"SLURM_RESTART_COUNT": str(self.starts)} if self.starts else {}
        _, said = self.node.run("cpu", "run.yaml", launcher=launcher, SLURM_JOB_ID="7", **count, **variables)
        self.starts += 1
        return bool(self.node.noted("scontrol")), said


@pytest.mark.parametrize("end", ["exit 1", "exit 14", "exit 213", "kill -SEGV $$", "exit 4"])
def test_failures_soon_after_the_start_end_the_chain(node, end):
    chain = Chain(node)
    assert [chain.start(end)[0] for _ in range(2)] == [True, True]
    log = node.work / "hvdlocal-7.failures"
    assert [line.split()[1:3] for line in log.read_text().splitlines()] == [["start", "1"], ["start", "2"]]
    again, said = chain.start(end)
    assert not again
    assert "failed three times in a row within 60 s" in said
    assert not log.exists(), "the owner mends it, and queues the job again"


def test_only_failures_in_a_row_count(node):
    chain = Chain(node)
    for _ in range(4):
        assert chain.start("exit 14")[0]
        assert chain.start("exit 14")[0]
        assert chain.start("exit 85")[0]
    assert chain.start("exit 14")[0]
    assert not chain.start("exit 0")[0]
    assert list(node.work.glob("*.failures")) == []


def test_failures_after_a_while_are_left_to_the_trainer(node, tmp_path):
    """It gives up by itself when it makes no progress, with code 2."""
    site = tmp_path / "site.sh"
    site.write_text("soon=0\n")
    chain = Chain(node)
    assert all(chain.start("exit 14", HVDLOCAL_SITE=str(site))[0] for _ in range(5))
    assert not chain.start("exit 2", HVDLOCAL_SITE=str(site))[0]


def test_a_directory_that_cannot_be_written(node):
    """Then HVDLOCAL_MAX_RESTARTS is the limit."""
    (node.work / "hvdlocal-7.failures").mkdir()
    chain = Chain(node)
    assert all(chain.start("exit 14")[0] for _ in range(4))


@pytest.mark.parametrize(("limit", "restarts"), [(3, {"SLURM_RESTART_COUNT": "3"}), (0, {})])
def test_the_limit_of_restarts_can_be_set(node, limit, restarts):
    code, said = node.run(
        "cpu", "run.yaml", launcher="exit 4", SLURM_JOB_ID="7", HVDLOCAL_MAX_RESTARTS=str(limit), **restarts
    )
    assert code == 4
    assert node.noted("scontrol") == []
    assert f"started again {limit} times already" in said


def test_a_limit_that_is_no_number(node):
    code, said = node.run("cpu", "run.yaml", launcher="exit 4", SLURM_JOB_ID="7", HVDLOCAL_MAX_RESTARTS="many")
    assert code == 2
    assert "HVDLOCAL_MAX_RESTARTS=many: a whole number is needed" in said
    assert node.noted("mpirun") == node.noted("scontrol") == []


@pytest.mark.parametrize("template", ["cpu", "gpu-nodes-srun"])
@pytest.mark.parametrize("names", [["USR2"], ["USR1"], ["TERM"], ["USR2", "USR2", "TERM"]])
def test_a_signal_reaches_the_launcher_once(node, template, names):
    node.install("srun", LAUNCHER)
    script = node.start(template, "run.yaml", launcher=WAIT + "exit 85", SLURM_JOB_ID="7")
    node.wait_for("ready")
    for name in names:
        script.send_signal(signal.Signals[f"SIG{name}"])
        time.sleep(0.1)
    said, _ = script.communicate(timeout=30)
    assert script.returncode == 85, said
    assert node.noted("signals") == ["USR2"]
    assert node.noted("scontrol") == ["requeue Incomplete 7"]


@pytest.mark.parametrize(
    ("end", "code", "again"),
    [
        ("exit 0", 0, False),
        ("exit 2", 2, False),
        ("exit 3", 3, False),
        ("exit 137", 137, True),
        ("exit 1", 1, True),
        ("exit 14", 14, True),
    ],
)
def test_what_comes_of_a_run_after_a_signal(node, end, code, again):
    """Finished just then; stopped by the trainer itself; ended by mpirun before its exit code was there."""
    variables = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1000"}
    script = node.start("cpu", "run.yaml", launcher=WAIT + end, **variables)
    node.wait_for("ready")
    script.send_signal(signal.SIGUSR2)
    said, _ = script.communicate(timeout=30)
    assert script.returncode == code, said
    assert bool(node.noted("scontrol")) == again


def test_signals_at_any_moment(node):
    """Between the starts of bash and of the launcher, while both end: never a hang, never another code."""
    for delay in range(12):
        for path in node.record.iterdir():
            path.unlink()
        script = node.start("cpu", "run.yaml", launcher="sleep 0.05; exit 85", SLURM_JOB_ID="7")
        time.sleep(0.1 + 0.01 * delay)
        script.send_signal(signal.SIGUSR2)
        said, _ = script.communicate(timeout=30)
        if script.returncode == -signal.SIGUSR2:  # bash had not come to the trap
            continue
        assert script.returncode in (85, 128 + signal.SIGUSR2), said
        assert node.noted("scontrol") == ["requeue Incomplete 7"]


def test_nothing_is_left_of_a_killed_launcher(node):
    start = 'sleep 1000 & echo $! >"$RECORD/left"; set -m; sleep 1000 & echo $! >>"$RECORD/left"; kill -KILL $$'
    assert node.run("cpu", "run.yaml", launcher=start, SLURM_JOB_ID="7")[0] == 137
    for process in node.noted("left"):
        state = Path(f"/proc/{process}/stat")
        assert not state.exists() or state.read_text().split()[2] == "Z"
    assert len(node.noted("left")) == 2


def test_scontrol_may_refuse(node):
    code, said = node.run("cpu", "run.yaml", launcher="exit 85", SLURM_JOB_ID="7", REFUSE="1")
    assert code == 85
    assert "scontrol refused" in said


def test_outside_of_slurm(node):
    code, said = node.run("cpu", "run.yaml", launcher="exit 85")
    assert code == 85
    assert node.noted("scontrol") == []
    assert "start it again by hand" in said
    assert node.noted("mpirun")[:2] == ["-np", "1"]


def test_not_submitted_from_where_slurm_is(node, tmp_path):
    code, said = node.run("cpu", "run.yaml", SLURM_SUBMIT_DIR=str(tmp_path))
    assert code == 1
    assert "slurm/common.sh: No such file" in said


def test_a_script_of_the_users_own(node):
    node.run("cpu", "my loop.py", "--epochs", "2")
    assert node.noted("mpirun")[-4:] == ["python", "my loop.py", "--epochs", "2"]


def test_what_the_ranks_get(node):
    shape = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "4", "SLURM_CPUS_PER_TASK": "6"}
    times = {"SLURM_JOB_END_TIME": "1800000000", "SLURM_RESTART_COUNT": "1"}
    own = {"HOROVOD_CYCLE_TIME": "3", "NCCL_DEBUG": "WARN", "GLOO_SOCKET_IFNAME": "ib0", "MASTER_PORT": "29400"}
    own |= {"HVDLOCAL_BACKEND": "torch"}
    assert node.run("cpu", "my run.yaml", "--epochs", "2", **shape, **times, **own, OTHER="x")[0] == 0
    arguments = node.noted("mpirun")
    assert arguments[:6] == ["-np", "8", "--bind-to", "none", "--map-by", "ppr:4:node"]
    assert arguments[-7:] == ["python", "-m", "hvdlocal", "train", "my run.yaml", "--epochs", "2"]
    handed_on = {name for flag, name in itertools.pairwise(arguments) if flag == "-x"}
    assert handed_on >= {"PATH", "OMP_NUM_THREADS", "PYTHONUNBUFFERED", *times, *own}
    assert "OTHER" not in handed_on
    assert {"OMP_NUM_THREADS=5", "PYTHONFAULTHANDLER=1"} <= set(node.noted("mpirun.environment"))


def test_the_end_of_the_job_is_asked_for_when_slurm_does_not_set_it(node):
    node.install("squeue", '#!/bin/bash\necho "$*" >"$RECORD/squeue"\necho 2027-01-15T08:00:00\n')
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    assert node.run("cpu", "run.yaml", SLURM_JOB_ID="7", TZ="UTC", **array)[0] == 0
    assert node.noted("squeue") == ["--noheader --jobs=7_3 --format=%e"]
    assert "SLURM_JOB_END_TIME=1800000000" in node.noted("mpirun.environment")
    node.install("squeue", "#!/bin/bash\necho UNLIMITED\n")
    assert node.run("cpu", "run.yaml", SLURM_JOB_ID="7")[0] == 0
    assert not any(line.startswith("SLURM_JOB_END_TIME") for line in node.noted("mpirun.environment"))


FILES = ("OMPI_MCA_orte_tmpdir_base", "PRTE_MCA_prte_tmpdir_base")
MEMORY = ("OMPI_MCA_btl_vader_backing_directory", "OMPI_MCA_btl_sm_backing_directory")


def test_open_mpi_leaves_nothing_behind(node, tmp_path):
    """Of this start, nor of one that was killed together with its script."""
    disk = tmp_path / "disk"
    job = f"test{os.getpid()}"
    killed = [disk / f"hvdlocal-mpi-{job}-1", Path(f"/dev/shm/hvdlocal-mpi-{job}-1")]
    for path in (*killed, disk / f"hvdlocal-mpi-{job}1-1"):
        path.mkdir(parents=True)
    leave = "".join(f'[[ -d ${name} ]] && touch "${name}/left" && ' for name in (*FILES, *MEMORY)) + "exit 85"
    variables = {"SLURM_JOB_ID": job, "TMPDIR": str(disk), "SLURM_JOB_NUM_NODES": "2"}
    code, said = node.run("cpu", "run.yaml", launcher=leave, **variables)
    assert code == 85, said
    assert [path.name for path in disk.iterdir()] == [f"hvdlocal-mpi-{job}1-1"], "another job's"
    assert list(Path("/dev/shm").glob(f"hvdlocal-mpi-{job}-*")) == []


def test_a_site_may_have_places_of_its_own_for_open_mpi(node, tmp_path):
    site = tmp_path / "site.sh"
    site.write_text(f"export {FILES[1]}=/local {MEMORY[1]}=/memory\n")
    assert node.run("cpu", "run.yaml", SLURM_JOB_ID="7", HVDLOCAL_SITE=str(site))[0] == 0
    assert {f"{FILES[1]}=/local", f"{MEMORY[1]}=/memory"} <= set(node.noted("mpirun.environment"))


def test_open_mpi_keeps_its_usual_places_where_no_others_can_be_made(node):
    node.install("mkdir", "#!/bin/bash\nexit 1\n")
    assert node.run("cpu", "run.yaml", SLURM_JOB_ID="7")[0] == 0
    assert not [line for line in node.noted("mpirun.environment") if line.startswith((*FILES, *MEMORY))]


def test_mpich_gets_no_options_of_open_mpi(node):
    node.install("mpirun", LAUNCHER.replace("mpirun (Open MPI) 4.1.4", "HYDRA build details:"))
    assert node.run("cpu", "run.yaml", SLURM_NTASKS="2")[0] == 0
    assert node.noted("mpirun")[:5] == ["-np", "2", "-bind-to", "none", "python"]


def test_a_site_of_ones_own(node, tmp_path):
    site = tmp_path / "my site.sh"
    site.write_text("export NCCL_NET=x$UNSET_LIKE_IN_MODULES\n")
    assert node.run("cpu", "run.yaml", HVDLOCAL_SITE=str(site))[0] == 0
    assert "NCCL_NET=x" in node.noted("mpirun.environment")


def test_every_pair_of_a_sweep(node):
    pairs = set()
    for task in range(12):
        (node.record / "mpirun").unlink(missing_ok=True)
        variables = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": str(task), "SLURM_JOB_ID": str(5 + task)}
        more = {"SLURM_JOB_NAME": "sweep", "SLURM_NTASKS": "4"}
        assert node.run("sweep", "run.yaml", launcher="exit 85", **variables, **more)[0] == 85
        said = node.noted("mpirun")
        k, h, output = said[1], said[-3], said[-1]
        assert output == f"runs/sweep/k{k}-h{h}"
        pairs.add((int(k), int(h)))
    assert pairs == {(k, h) for k in (1, 2, 4) for h in (1, 4, 16, 64)}
    # The last task of an array bears the id of the whole array: only its own task may be queued again.
    assert node.noted("scontrol") == [f"requeue Incomplete 5_{task}" for task in range(12)]
    code, said = node.run("sweep", "run.yaml", SLURM_ARRAY_TASK_ID="12")
    assert code == 1
    assert "more tasks than" in said


@pytest.fixture
def shards(node) -> Path:
    path = node.work / "my data" / "train"
    path.mkdir(parents=True)
    (path / "shard").write_bytes(b"x" * 1000)
    return path.parent


def test_staging(node, tmp_path, shards):
    disk = tmp_path / "disk"
    disk.mkdir()
    see = 'ls "${@: -1}/train" >"$RECORD/seen"; exit 85'
    variables = {"SLURM_JOB_ID": "7", "TMPDIR": str(disk)}
    code, said = node.run("staging", "my data", "run.yaml", "--epochs", "2", launcher=see, **variables)
    assert code == 85, said
    assert node.noted("seen") == ["shard"]
    assert node.noted("mpirun")[-5:] == ["run.yaml", "--epochs", "2", "--data.path", f"{disk}/hvdlocal-7"]
    assert list(disk.iterdir()) == [], "the job may start again on another node"


def test_staging_that_fails(node, tmp_path, shards):
    variables = {"SLURM_JOB_ID": "7", "TMPDIR": str(tmp_path)}
    code, said = node.run("staging", "no data", "run.yaml", **variables)
    assert code == 2
    assert "no directory no data" in said
    node.install("cp", "#!/bin/bash\nexit 1\n")
    code, said = node.run("staging", "my data", "run.yaml", **variables)
    assert code == 2
    assert "copying my data failed" in said
    node.install("df", "#!/bin/bash\necho 0\n")
    assert "has room for 0 MiB" in node.run("staging", "my data", "run.yaml", **variables)[1]
    assert node.noted("mpirun") == node.noted("scontrol") == []


def test_a_signal_while_data_are_copied(node, tmp_path, shards):
    node.install("cp", '#!/bin/bash\ntouch "$RECORD/ready"\nsleep 20\n')
    script = node.start("staging", "my data", "run.yaml", SLURM_JOB_ID="7", TMPDIR=str(tmp_path))
    node.wait_for("ready")
    script.send_signal(signal.SIGUSR2)
    said, _ = script.communicate(timeout=10)
    assert script.returncode == 128 + signal.SIGUSR2, said
    assert node.noted("mpirun") == []
    assert node.noted("scontrol") == ["requeue Incomplete 7"]
    assert not (tmp_path / "hvdlocal-7").exists()


def test_a_signal_that_the_copying_survives(node, tmp_path, shards):
    node.install("srun", '#!/bin/bash\ntrap : USR2\ntouch "$RECORD/ready"\nfor i in {1..20}; do sleep 0.02; done\n')
    script = node.start("staging", "my data", "run.yaml", SLURM_JOB_ID="7", TMPDIR=str(tmp_path))
    node.wait_for("ready")
    script.send_signal(signal.SIGUSR2)
    said, _ = script.communicate(timeout=10)
    assert script.returncode == 85, said
    assert node.noted("mpirun") == []
    assert node.noted("scontrol") == ["requeue Incomplete 7"]


def test_preparing_data_and_a_container(node):
    assert node.run("prepare", "digits", "--output", "my data")[0] == 0
    assert node.noted("mpirun")[-6:] == ["python", "-m", "data_prep", "digits", "--output", "my data"]
    assert node.run("container", "my image.sif", "run.yaml", SLURM_GPUS_ON_NODE="1")[0] == 0
    started = node.noted("mpirun")
    image = started.index("my image.sif")
    assert started[image - 7 : image] == [
        "apptainer",
        "exec",
        "--bind",
        str(node.work),
        "--pwd",
        str(node.work),
        "--nv",
    ]
    assert started[image + 1 :] == ["python", "-m", "hvdlocal", "train", "run.yaml"]


SURVIVING = {"HVDLOCAL_SURVIVE": "1", "VERSION": "mpirun (Open MPI) 5.0.11", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}


def test_a_job_that_survives_is_started_with_fault_tolerance(node):
    node.install("python", NOTE)
    assert node.run("cpu", "run.yaml", "--epochs", "2", **SURVIVING)[0] == 0
    arguments = node.noted("mpirun")
    assert arguments[:4] == ["-np", "2", "--with-ft", "ulfm"]
    handed_on = {name for flag, name in itertools.pairwise(arguments) if flag == "-x"}
    assert handed_on >= {"HVDLOCAL_SURVIVE", "HVDLOCAL_BACKEND"}
    assert "HVDLOCAL_BACKEND=mpi4py" in node.noted("mpirun.environment")


@pytest.mark.parametrize(
    ("template", "arguments"),
    [("cpu", []), ("sweep", []), ("staging", ["data set"]), ("container", ["my image.sif"])],
)
def test_a_launcher_that_lost_everybody_has_not_finished(node, template, arguments):
    """Then mpirun --with-ft ulfm ends with 0 as well; the run's directory says which it was."""
    node.install("python", NOTE)
    node.install("apptainer", NOTE)
    (node.work / "data set").mkdir()
    (node.work / "data set" / "x").touch()
    variables = {**SURVIVING, "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "7", "TMPDIR": str(node.work)}
    code, said = node.run(template, *arguments, "my run.yaml", "--epochs", "2", REFUSE="1", **variables)
    assert code == 4, said
    assert "the run is not finished: all ranks were killed" in said
    assert len(node.noted("scontrol")) == 1
    asked = node.noted("apptainer" if template == "container" else "python")
    assert len(asked) == 1
    assert "-m hvdlocal finished my run.yaml --epochs 2" in asked[0]
    (node.record / "scontrol").unlink()
    assert node.run(template, *arguments, "my run.yaml", "--epochs", "2", **variables)[0] == 0
    assert node.noted("scontrol") == []


def test_only_a_job_that_survives_is_asked_whether_it_has_finished(node):
    node.install("python", NOTE)
    assert node.run("cpu", "run.yaml", REFUSE="1", **{**SURVIVING, "HVDLOCAL_SURVIVE": "0"})[0] == 0
    assert node.run("cpu", "run.yaml", launcher="exit 85", REFUSE="1", **SURVIVING)[0] == 85
    assert node.noted("python") == []


@pytest.mark.parametrize(
    "version", ["mpirun (Open MPI) 4.1.4", "HYDRA build details:", "Intel(R) MPI Library for Linux* OS, Version 2021.9"]
)
def test_a_launcher_that_cannot_survive(node, version):
    code, said = node.run("cpu", "run.yaml", **{**SURVIVING, "VERSION": version})
    assert code == 2
    assert f"HVDLOCAL_SURVIVE=1: this needs mpirun of Open MPI 5 or later; mpirun is {version}\n" in said
    assert node.noted("mpirun") == node.noted("scontrol") == []


def test_srun_cannot_survive(node):
    node.install("srun", LAUNCHER)
    code, said = node.run("gpu-nodes-srun", "run.yaml", **SURVIVING)
    assert code == 2
    assert "under mpirun only: take a template that uses it" in said
    assert node.noted("srun") == node.noted("scontrol") == []
