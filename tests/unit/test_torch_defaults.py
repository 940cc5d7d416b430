"""hvdlocal's own tensors have the dtype and the device that it gives them: torch's global defaults belong to the user."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

import hvdlocal
from hvdlocal.data.augment import MixUp, Normalize, RandAugment, RandomResizedCrop
from hvdlocal.data.augment.rand_augment import OPERATIONS

PACKAGE = Path(hvdlocal.__file__).parent

NEEDS_DTYPE = {
    *("arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "frombuffer", "full", "linspace", "logspace"),
    *("normal", "ones", "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros"),
}
NEEDS_DEVICE = NEEDS_DTYPE - {"frombuffer"}  # it is always on the CPU


def without(keyword: str, functions: set[str], source: str) -> list[tuple[int, str]]:
    """(line, function) of the calls of torch functions that make a tensor from nothing and are not given `keyword`."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        (call.lineno, call.func.attr)
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id == "torch"
        and call.func.attr in functions
        and keyword not in {given.arg for given in call.keywords}
    ]


def test_the_search_finds_what_it_looks_for():
    assert without("dtype", NEEDS_DTYPE, "x = torch.zeros(3, device=d)\ny = torch.zeros(3, dtype=f)") == [(1, "zeros")]
    assert without("device", NEEDS_DEVICE, "x = [torch.tensor([1.0], dtype=f)]") == [(1, "tensor")]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_tensor_made_from_nothing_names_its_dtype_and_device(path):
    source = path.read_text(encoding="utf-8")
    assert without("dtype", NEEDS_DTYPE, source) == []
    assert without("device", NEEDS_DEVICE, source) == []


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def under_another_default(request):
    """Calls a function while torch's default dtype is another one."""

    def call(function, *arguments):
        before = torch.get_default_dtype()
        torch.set_default_dtype(request.param)
        try:
            return function(*arguments)
        finally:
            torch.set_default_dtype(before)

    return call


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", OPERATIONS)
def test_images_are_changed_alike(under_another_default, name, channels):
    """An integer times a Python number has the default dtype, so that also arithmetic can depend on it."""
    images = torch.randint(0, 256, (2, 16, 12, channels), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for sign in (1, -1):
        augment = RandAugment(1, 17)
        assert torch.equal(under_another_default(augment.apply, name, sign, images), augment.apply(name, sign, images))


def test_images_are_prepared_alike(under_another_default):
    images = torch.randint(0, 256, (4, 16, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    keys = np.arange(4, dtype=np.uint64)
    labels = torch.arange(4)

    def prepare():
        pixels = Normalize([0.1, 0.4, 0.7], [0.3, 0.2, 0.1])(RandomResizedCrop(8)(images, keys), keys)
        return MixUp(0.2, 5)(pixels, labels, keys)

    for found, expected in zip(under_another_default(prepare), prepare(), strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
