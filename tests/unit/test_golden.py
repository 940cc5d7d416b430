"""The data sets and the configuration of tests/golden/v1, which d8a0cb7 wrote, still mean the same."""

import dataclasses
import json
from pathlib import Path

import golden
import pytest

import hvdlocal
from data_prep.__main__ import main as data_prep
from hvdlocal.cli.configuration import parse
from hvdlocal.data import RandomResizedCrop

V1 = Path(golden.__file__).parent / "v1"
VALUES = json.loads((V1 / "values.json").read_text())["data"]


@pytest.mark.parametrize("name", ["images", "colour", "jpeg", "jpeg_gray"])
def test_checksums_agree(name):
    assert data_prep(["verify", str(V1 / "data" / name)]) == 0


@pytest.mark.parametrize("storage", ["ram", "mmap", "stream"])
@pytest.mark.parametrize("name", VALUES)
def test_a_data_set_holds_the_same(name, storage):
    directory, split = name.split("/")
    expected = VALUES[name]
    with hvdlocal.ShardedDataset(V1 / "data" / directory, split, storage=storage) as dataset:
        assert dataset.kind == expected["kind"]
        assert dataset.fingerprint == expected["fingerprint"]
        assert list(dataset.classes) == expected["classes"]
        assert (dataset.shape and list(dataset.shape)) == expected["shape"]
        assert list(dataset.mean) == expected["mean"]
        assert list(dataset.std) == expected["std"]
        assert dataset.labels.tolist() == expected["labels"]
        assert dataset.index.tolist() == expected["index"]
        assert (None if dataset.dims is None else dataset.dims.tolist()) == expected["dims"]
        crop = RandomResizedCrop(8) if dataset.kind == "jpeg" else None
        loader = hvdlocal.Loader(
            dataset, 4, rank=1, num_workers=2, seed=3, order="global", tail="partial", crop=crop, threads=1
        )
        batches = [(labels.tolist(), float(images.float().mean())) for images, labels in loader]
    assert [labels for labels, _ in batches] == expected["batch_labels"]
    tolerance = 1e-3 if crop is None else 0.5  # decoders may round differently
    assert [mean for _, mean in batches] == pytest.approx(expected["batch_means"], abs=tolerance)


def test_a_configuration_means_the_same():
    expected = json.loads((V1 / "settings.json").read_text())
    assert _common(json.loads(json.dumps(dataclasses.asdict(parse([str(V1 / "settings.yaml")])))), expected) == expected


def _common(settings: dict, known: dict) -> dict:
    """Returns the settings that were known then: later ones may join them."""
    return {
        name: _common(settings[name], value) if isinstance(value, dict) and name != "buffers" else settings[name]
        for name, value in known.items()
    }
