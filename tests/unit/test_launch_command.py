"""The command that starts ranks: options by MPI, what a killed mpirun leaves, and the reason in an output."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hvdlocal.launch_command import last_words, launcher_words, refused_root, without_leftovers


@pytest.fixture
def mpirun(tmp_path, monkeypatch):
    """Puts an mpirun on PATH that gives this answer to --version."""

    def install(answer: str, stream: int = 1) -> str:
        path = tmp_path / "mpirun"
        path.write_text(f"#!/bin/sh\necho '{answer}' >&{stream}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        return str(path)

    return install


@pytest.mark.parametrize("answer", ["mpirun (Open MPI) 4.1.4", "mpirun (OpenRTE) 4.0.0", "prterun (PRTE) 3.0"])
@pytest.mark.parametrize("stream", [1, 2])
def test_open_mpi_under_its_names(mpirun, answer, stream):
    path = mpirun(answer, stream)
    assert launcher_words() == [path, "--oversubscribe", "--bind-to", "none", "-np"]


def test_hydra(mpirun):
    path = mpirun("HYDRA build details:")
    assert launcher_words() == [path, "-bind-to", "none", "-np"]


def test_the_users_own(mpirun):
    path = mpirun("")
    assert launcher_words(f"{path} --mpi='p m' -n") == [path, "--mpi=p m", "-n"]
    for wrong in ("", "no-such-launcher -n"):
        with pytest.raises(ValueError, match="no such command on PATH"):
            launcher_words(wrong)


def test_none_at_all(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="no mpirun on PATH"):
        launcher_words()


def test_a_directory_with_the_process_id_is_removed(tmp_path):
    """Made here by the very process that becomes the command."""
    program = (
        "import os, sys; sys.exit(os.path.exists(f'{os.environ[\"PRTE_MCA_prte_tmpdir_base\"]}/ompi.{os.getpid()}'))"
    )
    command = without_leftovers([sys.executable, "-c", program])
    start = 'mkdir "$PRTE_MCA_prte_tmpdir_base/ompi.$$" && mkdir "$PRTE_MCA_prte_tmpdir_base/ompi.x$$" && exec "$@"'
    environment = {"PRTE_MCA_prte_tmpdir_base": str(tmp_path), "PATH": "/usr/bin:/bin"}
    assert subprocess.run(["sh", "-c", start, "sh", *command], env=environment, check=False).returncode == 0
    assert [path.name[:6] for path in tmp_path.iterdir()] == ["ompi.x"], "those of others stay"


def test_last_words():
    assert last_words("a\nhvdlocal: b\n\n-----\nc\n", lambda line: line.startswith("hvdlocal")) == "hvdlocal: b"
    assert last_words(" a\n---\n", lambda line: False) == "a"
    assert last_words("", lambda line: True) == "no output"
    assert refused_root("mpirun has detected an attempt to run as root.\n\nThis is strongly discouraged\n-----")
    assert not refused_root("as root is\n" + "line\n" * 12)
