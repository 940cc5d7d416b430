"""Test samples that a preparation held out of a training split: they are no test of another one, which may contain them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from hvdlocal.data.format.manifest import MANIFEST_NAME, Manifest


def held_out_of(manifest: Manifest) -> str | None:
    """Returns the name of the split that samples were held out of, that split's own manifest included; None if none were."""
    chosen = manifest.preparation.get("holdout")
    if not chosen:
        return None
    return str(chosen["from"]) if isinstance(chosen, dict) else "train"  # of text it is the share alone


def refuse_left_splits(directory: Path, splits: Collection[str]) -> None:
    """Checks that new splits do not contain what an earlier preparation held out of them, and left in the same directory.

    Args:
        directory: of the data set.
        splits: names of all splits that are written.

    Raises:
        ValueError: a split is there that was held out of an earlier one of these, and is not written again.
    """
    for path in sorted(directory.glob(f"*/{MANIFEST_NAME}")):
        split = path.parent.name
        try:
            origin = None if split in splits else held_out_of(Manifest.load(path))
        except ValueError:
            continue  # nothing can be tested on it
        if origin in splits:
            raise ValueError(
                f"{path.parent} was held out of an earlier {origin} split, and the new one may contain its samples: remove it, "
                "hold out as before, or choose another --output"
            )


def refuse_other_preparation(train: Manifest, test: Manifest) -> None:
    """Checks that a test split was held out of this training split, if it was held out of one of that name.

    Raises:
        ValueError: the training split was prepared otherwise, so that it may contain the test samples. Splits of the user's
            own making are not judged.
    """
    prepared = train.preparation
    if held_out_of(test) != train.split or train.split == test.split or "data_set" not in prepared:
        return
    for fact in ("data_set", "holdout"):
        theirs, ours = prepared.get(fact), test.preparation.get(fact)
        if theirs != ours:
            raise ValueError(
                f"the {test.split} split was held out of another {train.split} split ({fact}: {ours}, not {theirs}), so this "
                "one may contain its samples: prepare both again, with --holdout and --overwrite"
            )
