"""A type checker sees hvdlocal's types, and a choice that there is not is no string like any other."""

import configparser
import inspect
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import pytest

import hvdlocal
from hvdlocal.averaging.moments import POLICIES
from hvdlocal.communicator.launch import BACKENDS
from hvdlocal.data import open_hdf5
from hvdlocal.training.config import MethodConfig, PeriodConfig

ROOT = Path(__file__).parents[2]

CHOICES = [
    (hvdlocal.LocalOptimizer.__init__, "momentum", POLICIES),
    (hvdlocal.LocalOptimizer.__init__, "rate_for_period", get_args(get_type_hints(PeriodConfig)["rate"])),
    (hvdlocal.LocalAdaScale, "statistics", get_args(get_type_hints(MethodConfig)["statistics"])),
    (hvdlocal.ShardedDataset.__init__, "storage", ("auto", "ram", "mmap", "stream")),
    (open_hdf5, "storage", ("auto", "ram", "mmap", "stream")),
    (open_hdf5, "share", ("node", "job")),
    (hvdlocal.init, "backend", BACKENDS),
]


@pytest.mark.parametrize(("function", "name", "choices"), CHOICES, ids=[f"{f.__qualname__} {n}" for f, n, _ in CHOICES])
def test_a_choice_has_the_type_of_what_is_accepted(function, name, choices):
    hint = get_type_hints(function)[name]
    found = [part for part in (hint, *get_args(hint)) if getattr(part, "__origin__", None) is Literal]
    assert found, hint
    assert set(get_args(found[0])) == set(choices)


def test_the_marker_is_there_and_installed():
    """PEP 561: without it, type checkers take every name of the package for Any."""
    assert (Path(inspect.getfile(hvdlocal)).parent / "py.typed").is_file()
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert "py.typed" in setup["options.package_data"]["*"]


def test_what_an_sdist_needs_beside_the_packages():
    """Horovod cannot be built without install/; and the documents, which the messages name."""
    lines = (ROOT / "MANIFEST.in").read_text().splitlines()
    grafted = {line.split()[1] for line in lines if line.startswith("graft ")}
    assert {"install", "docs", "examples", "experiments", "slurm"} <= grafted
    assert all((ROOT / name).is_dir() for name in grafted)
    included = {name for line in lines if line.startswith("include ") for name in line.split()[1:]}
    assert {"constraints.txt", "Makefile"} <= included
    assert all((ROOT / name).is_file() for name in included)
