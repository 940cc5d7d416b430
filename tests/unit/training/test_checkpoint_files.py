"""A checkpoint on disk: complete or not there, and every damage found."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdlocal.communicator import SingleProcess
from hvdlocal.directory import Directory
from hvdlocal.training.checkpoint import files
from hvdlocal.training.checkpoint.files import CheckpointError
from hvdlocal.training.checkpoint.interval import FIRST_SECONDS, CheckpointInterval, young_interval
from hvdlocal.training.checkpoint.resume import averaged_model, resume
from hvdlocal.training.checkpoint.writer import CheckpointWriter
from hvdlocal.training.config import CheckpointConfig


def state(rank: int, weight: float, **more) -> dict:
    return {"model": {"w": torch.tensor([weight, 1.0]), "n": torch.tensor(7 + rank)}, "rank": rank, **more}


def write(root, step, states, **contents):
    with Directory(root) as held:
        written = [files.write_rank(held, step, rank, one) for rank, one in enumerate(states)]
        return files.complete(held, step, {"num_workers": len(states), "in_sync": False, **contents}, written)


def test_what_is_written_is_read(tmp_path):
    path = write(tmp_path, 12, [state(0, 2.0), state(1, 4.0)], progress=0.1 + 0.2)
    assert files.newest_first(tmp_path) == [12]
    assert (tmp_path / "latest").resolve() == path
    manifest = files.read_manifest(path)
    assert manifest["step"] == 12
    assert manifest["progress"] == 0.1 + 0.2
    for rank in range(2):
        found = files.read_state(path, manifest, rank)
        assert found["rank"] == rank
        assert found["model"]["w"].tolist() == [2.0 + 2 * rank, 1.0]


def test_what_is_not_complete_is_not_there(tmp_path):
    files.write_rank(Directory(tmp_path), 5, 0, state(0, 1.0))
    assert files.newest_first(tmp_path) == []
    files.discard_incomplete(Directory(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_only_the_newest_are_kept(tmp_path):
    for step in (9, 10, 100, 11):
        write(tmp_path, step, [state(0, 1.0)])
    files.keep_newest(Directory(tmp_path), 2)
    assert files.newest_first(tmp_path) == [100, 11]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-0000000011", "step-0000000100"]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_flipped_bit_and_every_cut_is_found(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("checkpoint")
    path = write(root, 1, [state(0, 2.0)])
    file = path / data.draw(st.sampled_from([files.MANIFEST, files.rank_file(0)]))
    content = bytearray(file.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[position] ^= 1 << data.draw(st.integers(0, 7))
        file.write_bytes(content)
    else:
        file.write_bytes(content[:position])
    with pytest.raises(CheckpointError, match=file.name):
        files.read_state(path, files.read_manifest(path), 0)


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda c: st.lists(c) | st.dictionaries(st.text(), c)
    )
)
def test_any_other_json_is_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("manifest")
    if isinstance(content, dict):
        content |= {"format": files.FORMAT}
        content["sha256"] = files._checksum(content)
    (path / files.MANIFEST).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=files.MANIFEST):
        files.read_manifest(path)


def test_a_file_that_would_run_code_is_refused(tmp_path):
    """Checksums that fit protect from accidents only; nothing but tensors and plain values is unpickled."""
    canary = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (canary.touch, ())

    path = write(tmp_path, 1, [{"model": {}, "evil": Evil()}])
    with pytest.raises(CheckpointError, match="weights_only"):
        files.read_state(path, files.read_manifest(path), 0)
    assert not canary.exists()


def test_a_missing_file_is_named(tmp_path):
    path = write(tmp_path, 1, [state(0, 1.0), state(1, 1.0)])
    (path / files.rank_file(1)).unlink()
    manifest = files.read_manifest(path)
    with pytest.raises(CheckpointError, match=r"rank-00001\.pt cannot be read"):
        files.read_state(path, manifest, 1)
    with pytest.raises(CheckpointError, match=r"lists no file rank-00002\.pt"):
        files.read_state(path, manifest, 2)


def test_another_number_of_ranks_starts_from_the_mean(tmp_path):
    """Replicas and moments are averaged in float64; integers and everything else are rank 0's."""
    weights, moments = [0.1, 0.7, 3.0], [1.0, 2.0, 6.0]
    states = [
        state(rank, w, optimizer={"state": {0: {"momentum_buffer": torch.tensor([m])}}, "lr": rank})
        for rank, (w, m) in enumerate(zip(weights, moments, strict=True))
    ]
    path = write(tmp_path, 4, states)
    found = resume(SingleProcess(), tmp_path, lambda manifest: None)
    assert found.state is None
    averaged = found.averaged
    expected = torch.tensor(weights, dtype=torch.float32).double().mean().float()
    assert averaged["model"]["w"].tolist() == [expected.item(), 1.0]
    assert averaged["model"]["n"].item() == 7
    assert averaged["optimizer"]["state"][0]["momentum_buffer"].item() == 3.0
    assert averaged["optimizer"]["lr"] == 0
    assert averaged_model(path)["w"].tolist() == [expected.item(), 1.0]


def test_between_rounds_only_the_first_rank_holds_the_model(tmp_path):
    alone = {"model": {"mean": torch.tensor([4.0])}, "rank": 1}
    first = {"model": {"w": torch.tensor([1.0]), "mean": torch.tensor([2.0])}, "rank": 0}
    path = write(tmp_path, 4, [first, alone], in_sync=True)
    assert averaged_model(path) == {"w": torch.tensor([1.0]), "mean": torch.tensor([3.0])}


def test_the_newest_good_one_is_taken(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step, [state(0, float(step))])
    (tmp_path / "step-0000000003" / files.rank_file(0)).write_bytes(b"")
    found = resume(SingleProcess(), tmp_path, lambda manifest: None)
    assert found.step == 2
    assert "has 0 bytes instead of" in found.skipped[0]
    assert resume(SingleProcess(), tmp_path / "nothing", lambda manifest: None) is None
    with pytest.raises(CheckpointError, match="step-0000000002 was written with lr=1"):
        resume(SingleProcess(), tmp_path, lambda manifest: "was written with lr=1, not 2")


def test_a_checkpoint_under_the_name_of_another_step(tmp_path):
    """What it says it is counts, not what it is called."""
    write(tmp_path, 1, [state(0, 1.0)])
    path = write(tmp_path, 2, [state(0, 2.0)])
    path.rename(tmp_path / "step-0000000009")
    found = resume(SingleProcess(), tmp_path, lambda manifest: None)
    assert found.step == 1
    assert re.search("step-0000000009/manifest.json is that of step 2", found.skipped[0])
    path = (tmp_path / "step-0000000009").rename(tmp_path / "a-copy")
    assert files.read_manifest(path)["step"] == 2, "any other name says nothing"


def test_a_checkpoint_of_another_run(tmp_path):
    write(tmp_path, 1, [state(0, 1.0)], run="ours")
    write(tmp_path, 2, [state(0, 2.0)])
    write(tmp_path, 3, [state(0, 3.0)], run="theirs")
    found = resume(SingleProcess(), tmp_path, lambda manifest: None, "ours")
    assert found.step == 2, "written before runs had names"
    assert found.skipped == [f"{tmp_path}/step-0000000003 was written by another run"]
    assert resume(SingleProcess(), tmp_path, lambda manifest: None).step == 3, "one without a name takes it"
    shutil.rmtree(tmp_path / "step-0000000002")
    shutil.rmtree(tmp_path / "step-0000000001")
    with pytest.raises(CheckpointError, match=r"none of the 1 checkpoints in .* by another run"):
        resume(SingleProcess(), tmp_path, lambda manifest: None, "ours")


def test_a_rank_that_cannot_write_takes_no_room(tmp_path, monkeypatch):
    """The others have written theirs, which take room until rank 0 has heard; this one takes none from the start."""
    root = Directory(tmp_path)
    files.reserve(root, 1, 5000)
    assert (tmp_path / "step-0000000001.tmp" / files.RESERVE).stat().st_size == 5000
    written = [files.write_rank(root, 1, 0, state(0, 1.0))]
    monkeypatch.setattr(files._HashingFile, "flush", lambda self: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match=r"No space left.*step-0000000001\.tmp/rank-00001\.pt"):
        files.write_rank(root, 1, 1, state(1, 1.0))
    monkeypatch.undo()
    assert sorted(path.name for path in (tmp_path / "step-0000000001.tmp").iterdir()) == ["rank-00000.pt", "reserve"]
    path = files.complete(root, 1, {"num_workers": 1, "in_sync": True}, written)
    assert sorted(path.name for path in path.iterdir()) == ["manifest.json", "rank-00000.pt"]


def test_a_writer_that_finds_no_room(tmp_path, monkeypatch):
    writer = CheckpointWriter(SingleProcess(), Directory(tmp_path), keep=1)
    root = tmp_path / "checkpoints"

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_rank", full)
        writer.begin(1, state(0, 1.0), {"num_workers": 1})
        assert "No space left on device (rank 0)" in writer.finish(wait=True)
    assert files.newest_first(root) == []
    with monkeypatch.context() as patch:
        patch.setattr(files, "complete", full)
        writer.begin(2, state(0, 1.0), {"num_workers": 1})
        assert "No space left" in writer.finish(wait=True)
    assert list(root.iterdir()) == [], "what could not be completed takes no room"
    live = state(0, 1.0)
    writer.begin(3, live, {"num_workers": 1})
    live["model"]["w"].zero_()  # training goes on while the thread writes
    assert writer.finish(wait=True) is None
    assert files.newest_first(root) == [3]
    with monkeypatch.context() as patch:
        patch.setattr(files, "_discard", full)
        writer.begin(4, live, {"num_workers": 1})
        assert writer.finish(wait=True) is None, "that an old one could not be removed does not undo the new one"
        writer.submit(full)
        assert len(writer.failures(wait=True)) == 2
        assert writer.failures() == []
    live["model"]["w"].fill_(float("nan"))
    writer.begin(5, live, {"num_workers": 1})
    assert "NaN or infinity in the model (rank 0)" in writer.finish(wait=True)
    writer.close()
    assert files.newest_first(root) == [4, 3]
    path = files.directory(root, 3)
    assert files.read_state(path, files.read_manifest(path), 0)["model"]["w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("lose", [Path.unlink, lambda file: file.write_bytes(b"")], ids=["vanished", "cut off"])
def test_a_file_that_was_lost_before_the_end_is_no_checkpoint(tmp_path, lose):
    root = Directory(tmp_path)
    written = [files.write_rank(root, 1, rank, state(rank, 1.0)) for rank in range(2)]
    lose(tmp_path / "step-0000000001.tmp" / files.rank_file(1))
    with pytest.raises(OSError, match="rank-00001"):
        files.complete(root, 1, {"num_workers": 2, "in_sync": False}, written)
    assert files.newest_first(tmp_path) == []


def test_pace():
    assert young_interval(2.0, 3600.0) == 120.0
    pace = CheckpointInterval(CheckpointConfig(failure_hours=1.0))
    pace.start(100.0)
    assert not pace.due(100.0 + FIRST_SECONDS - 1)
    assert pace.due(100.0 + FIRST_SECONDS)
    pace.learn(cost=2.0, writing=1.0)
    assert pace.interval == 120.0
    pace.learn(cost=2.0, writing=30.0)
    assert pace.interval == pytest.approx(600.0), "never more than a twentieth of the time writing"
    fixed = CheckpointInterval(CheckpointConfig(every_minutes=2.0))
    fixed.start(0.0)
    fixed.learn(cost=2.0, writing=30.0)
    assert (fixed.due(119.0), fixed.due(120.0)) == (False, True)
    by_steps = CheckpointInterval(CheckpointConfig(every_steps=10))
    by_steps.start(0.0)
    assert not by_steps.due(1e9)


def test_manifest_of_another_version(tmp_path):
    path = write(tmp_path, 1, [state(0, 1.0)])
    manifest = files.read_manifest(path)
    manifest["format"] = 99
    manifest["sha256"] = files._checksum(manifest)
    (path / files.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="format 99"):
        files.read_manifest(path)


def test_copies_keep_their_types():
    from hvdlocal.training.checkpoint.writer import _copy

    value = SimpleNamespace(x=torch.zeros(3))
    copied = _copy({"a": [value.x, 1], "b": (2.0, None)})
    value.x += 1
    assert copied["a"][0].tolist() == [0, 0, 0]
    assert copied["b"] == (2.0, None)


class OneOfTwo(SingleProcess):
    """Rank 1 of a job of two, of which rank 0 finds a checkpoint of step 3."""

    def __init__(self):
        super().__init__(size=2)
        self.rank = 1

    def gather(self, value, name):
        return [[3] if name == "hvdlocal.resume.steps" else value, value]


def test_what_all_ranks_share_is_written_once_and_read_by_all(tmp_path):
    shared = {"momentum": torch.tensor([1.0, 2.0])}
    write(tmp_path, 3, [state(0, 2.0, shared=shared), state(1, 4.0)], shared=True)
    other = resume(OneOfTwo(), tmp_path, lambda manifest: None)
    assert other.state["model"]["w"].tolist() == [4.0, 1.0]
    averaged = resume(SingleProcess(), tmp_path, lambda manifest: None)
    assert averaged.averaged["model"]["w"].tolist() == [3.0, 1.0]
    for resumed in (other, averaged):
        assert [part["momentum"].tolist() for part in resumed.shared] == [[1.0, 2.0]]


def test_the_first_island_writes_what_is_shared_in_slices(tmp_path):
    states = [state(rank, 2.0, shared={"phi": torch.tensor([float(rank)])}) for rank in (0, 1)]
    write(tmp_path, 3, [*states, state(2, 4.0), state(3, 4.0)], shared=True, islands=[[0, 1], [2, 3]])
    resumed = resume(SingleProcess(), tmp_path, lambda manifest: None)
    assert [part["phi"].tolist() for part in resumed.shared] == [[0.0], [1.0]]
    assert resumed.averaged["model"]["w"].tolist() == [3.0, 1.0]
