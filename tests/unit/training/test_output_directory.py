"""What an earlier attempt left, and who may go on from it."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
from support.configs import digits_config

from hvdlocal.directory import Directory
from hvdlocal.training import interruption, output_directory, run_files
from hvdlocal.training.attempts import note_attempt
from hvdlocal.training.config import OptimizerConfig, flatten
from hvdlocal.training.config_checks import effective_settings
from hvdlocal.training.metrics import JsonLines
from hvdlocal.training.run_files import RunStatus, find_status


def config(tmp_path, **settings):
    return digits_config(output=tmp_path, **settings)


def leave(tmp_path, **settings):
    run_files.describe(Directory(tmp_path), asdict(config(tmp_path, **settings)), {})


def test_standing(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    now = flatten(config(tmp_path, optimizer=OptimizerConfig(lr=1e-5, betas=(0.9, 0.95))))
    (tmp_path / "checkpoints").mkdir()  # perhaps a disk of its own
    assert find_status(tmp_path, now, overwrite=False) is RunStatus.NEW
    leave(tmp_path, optimizer=OptimizerConfig(lr=1e-5, betas=(0.9, 0.95)))
    assert find_status(tmp_path, now, overwrite=False) is RunStatus.STARTED
    assert (
        find_status(tmp_path, {**now, "data.threads": 3, "log_every_seconds": 1.0}, overwrite=False)
        is RunStatus.STARTED
    )
    with pytest.raises(ValueError, match=r"holds an earlier run with optimizer\.lr=1e-05, not 0\.1"):
        find_status(tmp_path, {**now, "optimizer.lr": 0.1}, overwrite=False)
    assert find_status(tmp_path, {**now, "optimizer.lr": 0.1}, overwrite=True) is RunStatus.NEW
    (tmp_path / run_files.SUMMARY).touch()
    assert find_status(tmp_path, now, overwrite=False) is RunStatus.FINISHED
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # a job that said --overwrite true is started again:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert find_status(tmp_path, now, overwrite=True) is RunStatus.NEW  # it had not come to replace anything yet
    note_attempt(Directory(tmp_path), 0, 2)
    assert find_status(tmp_path, now, overwrite=True) is RunStatus.FINISHED  # this is its own
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert find_status(tmp_path, now, overwrite=True) is RunStatus.NEW


def test_a_setting_without_effect_may_be_another_now(tmp_path):
    """Such as a default that was another when the run was begun: 0.08 was the smallest area of every crop once."""
    now = config(tmp_path)
    earlier = replace(now, data=replace(now.data, min_area=0.08))
    run_files.describe(Directory(tmp_path), asdict(earlier), {})
    assert find_status(tmp_path, effective_settings(now), overwrite=False) is RunStatus.STARTED
    cropping = replace(now, data=replace(now.data, image_size=8))
    run_files.describe(Directory(tmp_path), asdict(replace(earlier, data=replace(earlier.data, image_size=8))), {})
    with pytest.raises(ValueError, match=r"an earlier run with data\.min_area=0\.08, not null: continue it"):
        find_status(tmp_path, effective_settings(cropping), overwrite=False)


@pytest.mark.parametrize("content", ["", "[1, 2]", "a: [", "\x00"])
def test_an_unreadable_config_is_no_invitation(tmp_path, content):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match="cannot be read"):
        find_status(tmp_path, {"epochs": 1}, overwrite=False)


def test_a_directory_is_locked_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(output_directory, "PATIENCE_SECONDS", 0.1)
    lock = output_directory.lock(tmp_path / "run")
    with pytest.raises(ValueError, match=f"in use by another run \\(process {os.getpid()} on"):
        output_directory.lock(tmp_path / "run")
    lock.close()
    output_directory.lock(tmp_path / "run").close()


def test_starts_without_progress(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "5")
    for step in (0, 40, 40, 40):
        note_attempt(Directory(tmp_path), step, 2)
    with pytest.raises(ValueError, match="started 3 times from step 40"):
        note_attempt(Directory(tmp_path), 40, 2)
    with (tmp_path / "attempts.jsonl").open("a") as file:
        file.write('{"step": 4')  # a disk was full
    with pytest.raises(ValueError, match="started 3 times from step 40"):
        note_attempt(Directory(tmp_path), 40, 2)
    note_attempt(Directory(tmp_path), 41, 2)
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    for _ in range(5):  # a person may try as often as they like
        note_attempt(Directory(tmp_path), 41, 2)


def test_records_are_cut_at_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = JsonLines(Directory(tmp_path))
    records.write("steps", 1, loss=0.5)
    kept = records.position()
    records.write("steps", 2, loss=0.25)
    records.close()
    again = JsonLines(Directory(tmp_path), kept)
    again.write("steps", 2, loss=0.125)
    assert again.position() == path.stat().st_size
    again.close()
    assert path.read_text().splitlines() == [
        '{"kind": "steps", "step": 1, "loss": 0.5}',
        '{"kind": "steps", "step": 2, "loss": 0.125}',
    ]


def test_records_that_were_lost_leave_no_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1}\n{"b"')
    records = JsonLines(Directory(tmp_path), keep=1000)
    records.write("steps", 2)
    records.close()
    assert path.read_text() == '{"a": 1}\n{"kind": "steps", "step": 2}\n'


def test_clearing(tmp_path):
    leave(tmp_path)
    (tmp_path / "checkpoints" / "step-1" / "deeper").mkdir(parents=True)
    for name in ("model.pt", run_files.SUMMARY, "metrics.jsonl", "checkpoints/step-1/deeper/file"):
        (tmp_path / name).touch()
    run_files.clear(Directory(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "config.yaml"]
    assert list((tmp_path / "checkpoints").iterdir()) == [], "which may be a disk of its own"


def test_a_deadline_does_not_follow_the_clock_on_the_wall(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time() + 3600)))
    deadline = interruption.Deadline(None)
    assert not deadline.passes_within(3500 - interruption.SLURM_GRACE_SECONDS)
    assert deadline.passes_within(3600)
    monkeypatch.setattr(time, "time", lambda: 1e12)
    assert not deadline.passes_within(60)
    monkeypatch.setenv("SLURM_JOB_END_TIME", "unknown")
    assert not interruption.Deadline(None).passes_within(1e9)
    assert interruption.Deadline(1e-6).passes_within(0)
    assert not interruption.Deadline(1e6).passes_within(60)


def test_a_signal_is_noted_before_torch_is_there():
    program = (
        "import os, signal, sys\n"
        "from hvdlocal.training import interruption\n"
        "interruption.install_handlers()\n"
        "assert 'torch' not in sys.modules\n"
        "os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGUSR2)\n"
        "print(interruption.received().name)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.stdout == "SIGTERM\n", result.stderr
    assert set(interruption.SIGNALS) == {signal.SIGUSR2, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT}
