"""Continuing from the newest checkpoint that every rank can read: each rank's own part, or the average of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hvdlocal.communicator import Communicator
from hvdlocal.training.checkpoint import files
from hvdlocal.training.checkpoint.files import CheckpointError
from hvdlocal.training.environment import versions

State = dict[str, Any]


@dataclass(frozen=True)
class Resumed:
    """A checkpoint from which this rank continues.

    Attributes:
        step: optimizer steps done.
        contents: the contents of the manifest.
        state: this rank's own state; None when the number of ranks or their islands have changed.
        averaged: the common state of all ranks when that has changed: tensors averaged over the old ranks, everything else
            from old rank 0.
        skipped: newer checkpoints that cannot be used, and why.
        shared: what the ranks of the first island wrote for all, in their order; see `ReplicaOptimizer.shared_state`.
        differing: the names under "states" whose values differ between the ranks when there is no state of this rank.
    """

    step: int
    contents: Mapping[str, Any]
    state: State | None
    averaged: State | None
    skipped: list[str]
    shared: list[State]
    differing: frozenset[str] = frozenset()

    @property
    def common(self) -> State:
        """The state of this rank, or the common one of all ranks."""
        found = self.averaged if self.state is None else self.state
        assert found is not None
        return found

    def describe(self, code: Mapping[str, str]) -> Iterator[str]:
        """Yields what a person should read about it, each a line.

        Args:
            code: digests of the user's own code as it is now, by module.
        """
        how = ""
        if self.state is None:
            ranks, size = self.contents["num_workers"], island_size(self.contents)
            islands = f" in islands of {size}" if size > 1 else ""
            how = f", averaged over the {ranks} rank{'s' if ranks > 1 else ''}{islands} that wrote it"
        yield f"continuing from the checkpoint of step {self.step}{how}"
        before, now = self.contents["versions"], versions()
        if changed := [f"{name} {before.get(name)} → {now.get(name)}" for name in now if before.get(name) != now[name]]:
            yield f"note: other versions than before, so not bit for bit the same: {', '.join(changed)}"
        earlier = self.contents.get("code", {})
        if edited := [module for module, digest in code.items() if earlier.get(module, digest) != digest]:
            yield f"note: your own code has changed since the checkpoint: {', '.join(edited)}"


def resume(
    communicator: Communicator,
    root: Path,
    check: Callable[[Mapping[str, Any]], str | None],
    run: str | None = None,
) -> Resumed | None:
    """Reads the newest checkpoint that every rank can read; a collective.

    Args:
        communicator: the ranks.
        root: directory of the checkpoints.
        check: returns why the checkpoint with a given manifest cannot be continued with these settings; None if it can.
        run: identifies this run. Checkpoints of another run are skipped; those without an identifier are not.

    Returns:
        None when there is no checkpoint at all.

    Raises:
        CheckpointError: on all ranks: there are checkpoints and none can be read, or the newest belongs to another run.
    """
    steps = communicator.gather(files.newest_first(root) if communicator.rank == 0 else [], "hvdlocal.resume.steps")[0]
    skipped: list[str] = []
    for step in steps:
        found, problem = None, None
        try:
            found = _read(communicator, files.directory(root, step), run)
        except CheckpointError as error:
            problem = str(error)
        problems = communicator.gather(problem, "hvdlocal.resume.read")
        bad = {rank: text for rank, text in enumerate(problems) if text is not None}
        if bad:
            rank, text = next(iter(bad.items()))
            where = "" if len(bad) == communicator.size else f" (rank {rank} of {communicator.size})"
            skipped.append(text + where)
            continue
        assert found is not None
        manifest, state, shared = found
        try:
            foreign = check(manifest)
        except (KeyError, TypeError, AttributeError) as error:
            foreign = f"is not one of this trainer ({type(error).__name__}: {error})"
        if foreign:
            raise CheckpointError(f"{files.directory(root, step)} {foreign}")
        if isinstance(state, _Mean):
            state.reduce(communicator)
            differing = frozenset().union(*communicator.gather(state.differing, "hvdlocal.resume.differing"))
            return Resumed(step, manifest, None, state.result(), skipped, shared, differing)
        return Resumed(step, manifest, state, None, skipped, shared)
    if skipped:
        raise CheckpointError(
            f"none of the {len(skipped)} checkpoints in {root} can be used: {skipped[0]}. "
            "Remove them to start anew (hvdlocal train: --overwrite true), or choose another directory"
        )
    return None


def island_size(manifest: Mapping[str, Any]) -> int:
    """Returns the ranks of an island of the run that wrote a checkpoint; 1 if it had none."""
    return len(_islands(manifest)[0]) if _islands(manifest) else 1


def same_layout(manifest: Mapping[str, Any], communicator: Communicator) -> bool:
    """Whether a checkpoint was written by as many ranks in the same islands, so that each finds its own state.

    Islands of other ranks, as after a start with `--map-by node`, would hold replicas that differ.
    """
    now = [list(ranks) for ranks in communicator.islands]
    return manifest["num_workers"] == communicator.size and _islands(manifest) == now


def _islands(manifest: Mapping[str, Any]) -> list[list[int]]:
    return manifest.get("islands") or []  # checkpoints from before there were islands lack them


def averaged_model(path: Path) -> State:
    """Returns the model that a checkpoint stands for, as a plain `state_dict`: the average of its replicas.

    Args:
        path: directory of the checkpoint.

    Raises:
        CheckpointError: it cannot be read.
    """
    manifest = files.read_manifest(path)
    mean = _Mean(_without_moments(files.read_state(path, manifest, 0)))
    for rank in range(1, manifest["num_workers"]):
        mean.add(_without_moments(files.read_state(path, manifest, rank)))
    return mean.result()["model"]


def _read(communicator: Communicator, path: Path, run: str | None) -> tuple[dict[str, Any], State | _Mean, list[State]]:
    """Reads the manifest and this rank's own state; with other ranks or islands, this rank's share of the average.

    What is shared comes last.
    """
    manifest = files.read_manifest(path)
    if run is not None and manifest.get("run", run) != run:
        raise CheckpointError(f"{path} was written by another run")
    old, rank, size = manifest["num_workers"], communicator.rank, communicator.size
    shared = []
    if manifest.get("shared"):
        first_island = _islands(manifest)[0] if _islands(manifest) else [0]
        shared = [files.read_state(path, manifest, one).get("shared", {}) for one in first_island]
    if not same_layout(manifest, communicator):
        mean = _Mean(files.read_state(path, manifest, 0), include=rank == 0)
        for one in range(rank or size, old, size):
            mean.add(files.read_state(path, manifest, one))
        return manifest, mean, shared
    own = files.read_state(path, manifest, rank)
    if rank and manifest["in_sync"]:  # only rank 0 has written what is the same on all
        own["model"] = {**files.read_state(path, manifest, 0)["model"], **own["model"]}
    return manifest, own, shared


class _Mean:
    """Averages the replicas, and the moments of the ranks that have them; everything else is that of the first rank.

    Args:
        first: the state of rank 0.
        include: whether it is part of the average; otherwise it only gives names and shapes.
    """

    def __init__(self, first: State, include: bool = True) -> None:
        self._first = first
        self._sums = {name: tensor.double() * include for name, tensor in _averaged_tensors(first).items()}
        self._counts = dict.fromkeys(self._sums, int(include))
        self.differing: set[str] = set()

    def add(self, state: State) -> None:
        """Adds the state of another rank."""
        first = self._first.get("states", {})
        self.differing |= {name for name, value in state.get("states", {}).items() if not _equal(value, first[name])}
        for name, tensor in _averaged_tensors(state).items():
            if name in self._sums:
                self._sums[name] += tensor
                self._counts[name] += 1

    def reduce(self, communicator: Communicator) -> None:
        """Adds what the other ranks have added; a collective."""
        counts = torch.tensor([float(count) for count in self._counts.values()], dtype=torch.float64, device="cpu")
        communicator.sum_(counts, "hvdlocal.resume.counts")
        self._counts = dict(zip(self._counts, map(round, counts.tolist()), strict=True))
        for i, total in enumerate(self._sums.values()):
            communicator.sum_(total, f"hvdlocal.resume.{i}")

    def result(self) -> State:
        """Returns the first state with the averages in it."""
        for name, tensor in _averaged_tensors(self._first).items():
            tensor.copy_(self._sums[name] / self._counts[name])
        return self._first


def _equal(one: Any, other: Any) -> bool:
    """Whether two plain values with tensors in them are equal."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(value, other[name]) for name, value in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return type(one) is type(other) and bool(one == other)


def _without_moments(state: State) -> State:
    return {"model": state["model"], "optimizer": {**state.get("optimizer", {}), "state": {}}}


def _averaged_tensors(state: State) -> dict[str, torch.Tensor]:
    """Returns the model and the optimizer's moments by name, without the buffers that are each rank's own."""
    kept = state.get("optimizer", {}).get("hvdlocal", {}).get("kept_buffers", [])
    named = {f"model {name}": value for name, value in state["model"].items() if name not in kept}
    for index, moments in state.get("optimizer", {}).get("state", {}).items():
        named |= {f"moment {index} {name}": value for name, value in moments.items()}
    return {
        name: value for name, value in named.items() if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
