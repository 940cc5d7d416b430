"""The kinds of samples: how each is stored in a shard, described in a manifest, and read in batches. A kind is one class."""

from __future__ import annotations

from hvdlocal.data.kinds.arrays import Arrays
from hvdlocal.data.kinds.base import Kind
from hvdlocal.data.kinds.images import Images
from hvdlocal.data.kinds.jpeg import Jpeg
from hvdlocal.data.kinds.tokens import Tokens

KINDS: dict[str, Kind] = {kind.name: kind for kind in (Images(), Jpeg(), Arrays(), Tokens())}
"""All kinds by the name that a manifest and `ShardedDataset.kind` give them."""
