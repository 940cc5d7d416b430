"""JPEGs to normalised float batches with RandomResizedCrop(224) and flip: hvdlocal against a bare loop and other loaders.

python benchmarks/data_jpeg.py --data jpeg-sample      (a directory with train/<class>/*.jpg)

webdataset and MosaicML streaming take part if they are installed; streaming and its many dependencies may be in a separate
directory, which --path adds to Python's.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Candidate, compare
from PIL import Image

from data_prep.__main__ import main as data_prep
from hvdlocal.data import Loader, ShardedDataset
from hvdlocal.data.augment import Compose, Flip, Normalize, RandomResizedCrop
from hvdlocal.data.kinds.decode import decode_crop
from hvdlocal.data.random_keys import sample_keys
from hvdlocal.models.torchvision_import import import_torchvision

BATCH, SIZE = 16, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def hvdlocal_loader(directory: str, threads: int) -> Iterator[int]:
    transform = Compose([Flip(), Normalize(MEAN, STD)])
    loader = Loader(
        ShardedDataset(directory), BATCH, crop=RandomResizedCrop(SIZE), transform=transform, threads=threads
    )
    yield from sizes(loader.endless())


def bare_loop(directory: str, threads: int) -> Iterator[int]:
    """Yields batches from the same decoder, crops and transforms over a list of bytes: the necessary work alone."""
    dataset = ShardedDataset(directory)
    files = [bytes(dataset.bytes_of(i)) for i in range(len(dataset))]
    dims, crop, transform = dataset.dims, RandomResizedCrop(SIZE), Compose([Flip(), Normalize(MEAN, STD)])
    assert dims is not None
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    mine = threading.local()

    def batch(position: np.ndarray) -> int:
        if not hasattr(mine, "images"):
            mine.images = torch.empty((BATCH, SIZE, SIZE, 3), dtype=torch.uint8)
        epochs, samples = np.divmod(position, len(files))
        keys = sample_keys(0, epochs, samples)
        boxes = crop.boxes(dims[samples], keys).tolist()
        for i, box, image in zip(samples.tolist(), boxes, mine.images.numpy(), strict=True):
            decode_crop(files[i], dims[i].tolist(), box, image)
        return len(transform(mine.images, keys))

    under_way: deque[Future[int]] = deque()
    for number in itertools.count():
        under_way.append(pool.submit(batch, number * BATCH + np.arange(BATCH)))
        if number >= 2 * threads:
            yield under_way.popleft().result()


def image_folder(directory: str, workers: int) -> Iterator[int]:
    dataset = import_torchvision().datasets.ImageFolder(directory, torchvision_transform())
    return torch_loader(dataset, workers, shuffle=True)


def webdataset(directory: str, workers: int) -> Iterator[int]:
    import webdataset as wds  # type: ignore[import-not-found]

    transform = torchvision_transform()
    shards = sorted(map(str, Path(directory).glob("*.tar")))
    dataset = (
        wds.WebDataset(shards, resampled=True, shardshuffle=False).shuffle(100).decode("pil").to_tuple("jpg", "cls")
    )
    return torch_loader(dataset.map_tuple(transform), workers)


def mosaic_streaming(directory: str, workers: int) -> Iterator[int]:
    import_torchvision()
    import streaming  # type: ignore[import-not-found]

    transform = torchvision_transform()

    class Images(streaming.StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            sample = super().__getitem__(index)
            return transform(Image.open(io.BytesIO(sample["jpeg"])).convert("RGB")), sample["label"]

    return torch_loader(Images(local=directory, shuffle=True, batch_size=BATCH), workers)


def torchvision_transform() -> Any:
    transforms = import_torchvision().transforms
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def torch_loader(dataset: Any, workers: int, **options: Any) -> Iterator[int]:
    loader = torch.utils.data.DataLoader(
        dataset, BATCH, num_workers=workers, multiprocessing_context="fork", persistent_workers=True, **options
    )
    while True:
        yield from sizes(loader)


def sizes(batches: Iterable[Any]) -> Iterator[int]:
    for images, labels in batches:
        assert images.shape[1:] == (3, SIZE, SIZE)
        assert images.dtype == torch.float32
        yield len(labels)


def write_tars(source: Path, directory: Path, shards: int = 4) -> None:
    """Writes the images in the layout that webdataset expects."""
    import webdataset as wds

    directory.mkdir()
    files = sorted(source.glob("*/*"))
    classes = sorted({file.parent.name for file in files})
    for shard in range(shards):
        with wds.TarWriter(f"{directory}/{shard}.tar") as tar:
            for file in files[shard::shards]:
                label = classes.index(file.parent.name)
                tar.write({"__key__": file.stem, "jpg": file.read_bytes(), "cls": label})


def write_mds(source: Path, directory: Path) -> None:
    """Writes the images in the layout that MosaicML streaming expects."""
    import_torchvision()
    import streaming

    files = sorted(source.glob("*/*"))
    classes = sorted({file.parent.name for file in files})
    with streaming.MDSWriter(out=str(directory), columns={"jpeg": "bytes", "label": "int"}) as writer:
        for file in files:
            writer.write({"jpeg": file.read_bytes(), "label": classes.index(file.parent.name)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="directory with train/<class>/*.jpg")
    parser.add_argument("--trials", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each candidate")
    parser.add_argument("--path", action="append", default=[], help="where else to look for other loaders")
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/data_jpeg.json"))
    arguments = parser.parse_args()
    sys.path += arguments.path  # the candidates' processes inherit it
    train, threads = arguments.data / "train", arguments.threads
    with tempfile.TemporaryDirectory() as folder:
        shards = f"{folder}/shards"
        if data_prep(["imagenet", "--source", str(arguments.data), "--output", shards]):
            return
        candidates = [
            Candidate("hvdlocal Loader", hvdlocal_loader, (shards, threads)),
            Candidate("bare loop, same decoder", bare_loop, (shards, threads)),
            Candidate("ImageFolder, DataLoader", image_folder, (str(train), threads)),
        ]
        others = (("webdataset", write_tars, webdataset), ("MosaicML streaming", write_mds, mosaic_streaming))
        for name, write, prepare in others:
            try:
                write(train, Path(folder, name))
            except ImportError as error:
                print(f"{name} takes no part: {error}")
            else:
                candidates.append(Candidate(f"{name}, DataLoader", prepare, (f"{folder}/{name}", threads)))
        compare(
            f"JPEGs, batches of {BATCH}: RandomResizedCrop({SIZE}), flip, normalised to float32; {threads} threads or workers",
            candidates,
            trials=arguments.trials,
            seconds=2.0,
            json_path=arguments.json,
            extra_versions=("webdataset", "mosaicml-streaming"),
        )


if __name__ == "__main__":
    main()
