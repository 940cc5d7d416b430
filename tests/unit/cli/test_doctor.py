"""What `hvdlocal doctor` finds, by modules that stand in for a real installation."""

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
