"""`hvdlocal prepare` and `python -m data_prep` are one command."""

from __future__ import annotations

import json

import pytest

from data_prep.__main__ import main as data_prep
from hvdlocal.cli import main


def test_both_commands_write_the_same_files(tmp_path, capsys):
    words = ["synthetic", "--samples", "30", "--size", "8", "--classes", "3"]
    assert main(["prepare", *words, "--output", f"{tmp_path}/a"]) == 0
    assert data_prep([*words, "--output", f"{tmp_path}/b"]) == 0
    for path in (tmp_path / "a").rglob("*.h5"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
    fingerprints = {json.loads(path.read_text())["fingerprint"] for path in tmp_path.rglob("train/manifest.json")}
    assert len(fingerprints) == 1
    assert main(["prepare", "verify", f"{tmp_path}/a"]) == 0
    assert "train: 30 samples, all checksums agree" in capsys.readouterr().out


def test_mistakes_end_with_one_sentence(tmp_path, capsys):
    assert main(["prepare", "cifar10", "--source", f"{tmp_path}/none", "--output", f"{tmp_path}/a"]) == 2
    assert "holds neither data_batch_1.bin nor data_batch_1; unpack" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main(["prepare", "cifar10"])
    assert left.value.code == 2
    assert "usage: hvdlocal prepare cifar10" in capsys.readouterr().err
