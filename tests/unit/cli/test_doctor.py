"""What `hvdlocal doctor` finds, by modules that stand in for a real installation."""

import subprocess

import pytest

from hvdlocal.cli import doctor


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Puts a torchvision first on the path of the processes that doctor starts."""

    def write(program):
        (tmp_path / "torchvision.py").write_text(program)
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{doctor.__file__.rsplit('/hvdlocal/', 1)[0]}")
        return doctor.torchvision("2.13.0+cpu")

    return write


def test_a_torchvision_that_loads(stand_in):
    assert stand_in("__version__ = '1.2'") == doctor.Finding("ok", "torchvision", "1.2")


def test_one_that_only_hvdlocal_can_load(stand_in):
    """Of another torch: two operators are missing, which hvdlocal declares, and a user's script does not."""
    found = stand_in(
        "import torch\n__version__ = '1.2+cu130'\n"
        "if not hasattr(torch.ops.torchvision, 'nms'): raise RuntimeError('operator torchvision::nms does not exist')\n"
    )
    assert found.level == "note"
    assert "1.2+cu130 fails at a plain `import torchvision`" in found.found
    assert "operator torchvision::nms does not exist" in found.found
    assert found.remedy.startswith("pip install the torchvision that was built for torch 2.13.0+cpu")


def test_none_that_loads(stand_in):
    found = stand_in("raise ImportError('libcudart.so.13 is missing')")
    assert found.level == "note"
    assert found.found.startswith("does not import: ")
    assert "libcudart.so.13" in found.found


RANK = """Traceback (most recent call last):
  File "x.py", line 1, in <module>
hvdlocal.communicator.errors.LaunchError: the 2 ranks do not find each other
rank 1 of 2 on host: uncaught LaunchError; ending the job
"""
TORCHRUN = """E1128 api.py:1002] failed (exitcode: 1) local_rank: 0
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
============
"""


@pytest.mark.parametrize(
    ("launcher", "output", "reason"),
    [
        ("mpirun", RANK, "hvdlocal.communicator.errors.LaunchError: the 2 ranks do not find each other"),
        ("torchrun", RANK + TORCHRUN, "hvdlocal.communicator.errors.LaunchError: the 2 ranks do not find each other"),
        ("mpirun", "mpirun: Error: unknown option\nType 'mpirun --help'.\n", "mpirun: Error: unknown option"),
    ],
)
def test_why_two_ranks_failed(monkeypatch, launcher, output, reason):
    """The exception of a rank, and not what the launcher says after it."""
    monkeypatch.setattr(doctor.shutil, "which", lambda name: name if name == launcher else None)
    ended = subprocess.CompletedProcess([], 1, stdout="", stderr=output)
    monkeypatch.setattr(doctor.subprocess, "run", lambda *args, **kwargs: ended)
    assert doctor._trial("torch") == f"{launcher} ended with code 1: {reason}"


@pytest.mark.parametrize(
    ("cycle", "level"), [("1", "note"), ("5.5", "ok"), ("fast", "note"), ("nan", "note"), ("-1", "note")]
)
def test_the_cycle_of_horovod(monkeypatch, cycle, level):
    monkeypatch.setenv("HOROVOD_CYCLE_TIME", cycle)
    (found,) = (one for one in doctor.cores() if one.subject == "Horovod's cycle")
    assert (found.level, cycle in found.found) == (level, True)


@pytest.mark.parametrize(("backend", "how"), [("torch", "with srun"), ("mpi4py", "with srun --mpi=pmix (srun")])
def test_srun_alone(monkeypatch, backend, how):
    monkeypatch.setenv("HVDLOCAL_BACKEND", backend)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: name if name == "srun" else None)
    (found,) = doctor.launcher()
    assert f"start ranks {how}" in found.found


@pytest.fixture
def trial(monkeypatch):
    """Lets a trial of three ranks end in some way; returns the findings and the commands that were run."""

    def run(code=0, output="", error="", version="mpirun (Open MPI) 5.0.11"):
        commands = []

        def stand_in(command, **settings):
            commands.append(command)
            if command == ["mpirun", "--version"]:
                return subprocess.CompletedProcess(command, 0, stdout=f"{version}\n", stderr="")
            return subprocess.CompletedProcess(command, code, stdout=output, stderr=error)

        monkeypatch.setattr(doctor, "_python", lambda program: [])
        monkeypatch.setattr(doctor, "is_open_mpi", lambda mpirun: "Open MPI" in version)
        monkeypatch.setattr(doctor, "launcher_words", lambda: ["mpirun", "-np"])
        monkeypatch.setattr(doctor.subprocess, "run", stand_in)
        return list(doctor.survival()), [command for command in commands if "--with-ft" in command]

    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "HVDLOCAL_SURVIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: name)
    return run


GONE_ON = "hvdlocal-doctor 2 4 4 end hvdlocal-doctor 2 4 4 end "


def test_a_job_that_survives(trial):
    (found,), (command,) = trial(output=GONE_ON)
    assert found == doctor.Finding("ok", "survive", "one of three ranks was killed, and the other two went on")
    assert command[-6:-1] == ["3", "--with-ft", "ulfm", doctor.sys.executable, "-c"]


@pytest.mark.parametrize(
    ("ended", "reason"),
    [
        (
            {"code": 137, "error": "mpirun noticed that process rank 1 exited\n"},
            "mpirun ended with code 137: mpirun noticed",
        ),
        ({"output": GONE_ON[:28], "error": "x"}, "mpirun ended with code 0: x"),
        ({"output": GONE_ON.replace("2 4 4", "3 6 6")}, "mpirun ended with code 0"),
        ({"version": "HYDRA build details:"}, "HYDRA build details: is not Open MPI"),
    ],
)
@pytest.mark.parametrize(("needed", "level"), [("0", "note"), ("1", "wrong")])
def test_a_job_that_does_not(trial, monkeypatch, ended, reason, needed, level):
    monkeypatch.setenv("HVDLOCAL_SURVIVE", needed)
    (found,), _ = trial(**ended)
    assert found.level == level
    assert found.found.startswith(f"a job does not outlive the death of a rank: {reason}")
    assert "Open MPI 5 or later and mpi4py 4.1 or later" in found.remedy


def test_nobody_is_killed_below_another_mpirun(trial, monkeypatch):
    """Which cannot start a second one."""
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert trial(output=GONE_ON) == ([], [])


def test_nobody_is_killed_without_mpirun(trial, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert trial(output=GONE_ON) == ([], [])


def test_a_step_of_slurm_can_start_one(trial, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    (found,), _ = trial(output=GONE_ON)
    assert found.level == "ok"
