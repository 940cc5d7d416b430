import collections
import contextlib
import os
import pickle
import pickletools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep import pickles
from data_prep.pickles import load_arrays


def load(path, content):
    path.write_bytes(content)
    return load_arrays(path)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", ["u1", "<i8", ">i4", "<u2", "?"])
def test_arrays_come_back(tmp_path, protocol, kind):
    array = (np.arange(24).reshape(2, 3, 4) % 2).astype(kind)
    content = {b"a": array, b"f": np.asfortranarray(array), b"n": [1, 2, np.int64(3)], b"t": "text"}
    if protocol < 2:
        del content[b"t"]
    found = load(tmp_path / "x", pickle.dumps(content, protocol))
    np.testing.assert_array_equal(found[b"a"], array)
    np.testing.assert_array_equal(found[b"f"], array)
    assert found[b"n"] == [1, 2, 3]


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_a_large_array_stays_in_the_file(tmp_path, protocol):
    array = np.random.RandomState(0).randint(0, 256, (3000, 48)).astype(np.uint8)
    found = load(tmp_path / "x", pickle.dumps({b"data": array}, protocol))[b"data"]
    np.testing.assert_array_equal(found, array)
    assert isinstance(found, np.memmap) == (protocol > 2)  # Python 3 spells bytes as text in protocol 2
    assert not found.flags.writeable


class Attack:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_no_code_is_run(tmp_path, protocol):
    proof = tmp_path / "proof"
    attacks = [
        Attack(os.system, f"touch {proof}"),
        Attack(eval, f"open({str(proof)!r}, 'w')"),
        Attack(getattr, "text", "upper"),
        Attack(np.load, str(proof), None, True),
        Attack(pickle.loads, pickle.dumps(Attack(os.system, f"touch {proof}"), 2)),
        collections.OrderedDict(a=1),
        os.system,
        np.float64,
    ]
    for attack in attacks:
        for content in (attack, {b"data": attack}, [attack]):
            with pytest.raises(ValueError, match=r"asks for .* which no array needs"):
                load(tmp_path / "x", pickle.dumps(content, protocol))
    assert not proof.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\n(S'touch /tmp/never'\ntR.",
        b"c__builtin__\neval\n(S'1'\ntR.",
        b"(S'x'\nios\nsystem\n.",  # the opcode INST
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        b"\x80\x04\x8c\x05numpy\x8c\x17ndarray.tofile.__self__\x93.",  # a dotted name
        b"\x80\x02\x82\x01.",  # the extension registry
        b"P1\n.",  # a persistent id
    ],
)
def test_handwritten_attacks(tmp_path, content):
    with pytest.raises(ValueError, match=r"."):
        load(tmp_path / "x", content)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(3, complex), "array of type 'c16'; numbers"),
        (np.array([{}], object), "malformed array"),
        (np.zeros(2, "i4,i4"), "array of type 'V8'"),
    ],
)
def test_other_arrays_are_refused(tmp_path, array, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "x", pickle.dumps({b"data": array}, 2))


NEST = b"2\x86" * 60  # a tuple of the top of the stack, twice: 2**60 leaves in 120 bytes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02})" + NEST + b"K\x01s.", "a dict with a tuple as a key"),
        (b"\x80\x02}()" + NEST + b"K\x01u.", "a dict with a tuple as a key"),
        (b"\x80\x02()" + NEST + b"K\x01d.", "a dict with a tuple as a key"),
        (b"\x80\x04\x8f()" + NEST + b"\x90.", "holds a set"),
        (b"\x80\x04()" + NEST + b"\x91.", "holds a set"),
        (b"\x80\x02})" + NEST + b"\x8c\x01ar.", "."),
        (b"\x80\x02}C\x01a)" + NEST + b"s.", "nests containers"),
        (b"\x80\x02)" + NEST + b".", "nests containers"),
        (b"\x80\x02cnumpy\ndtype\n)" + NEST + b"\x85R.", "array of no known type"),
    ],
)
def test_a_tuple_that_is_nested_for_ever_costs_nothing(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "x", content)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02c_codecs\nencode\nN}X\x0c\x00\x00\x00__defaults__(K\x01K\x02ts\x86b.",
        b"\x80\x02cnumpy\nndarray\n}X\x05\x00\x00\x00stateK\x05sb.",
        b"\x80\x02cnumpy\nndarray\nN}X\x05\x00\x00\x00stateK\x05s\x86b.",
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n}X\x01\x00\x00\x00xK\x05sb.",
    ],
)
def test_nothing_here_can_be_changed(tmp_path, content):
    def state():
        kinds = [value for value in vars(pickles).values() if getattr(value, "__module__", "") == pickles.__name__]
        return [(dict(vars(kind)), getattr(kind, "__defaults__", None)) for kind in kinds]

    before = state()
    with pytest.raises(ValueError, match="it changes what is no array"):
        load(tmp_path / "x", content)
    assert state() == before


def test_a_claimed_length_is_not_set_aside(tmp_path):
    with pytest.raises(ValueError, match=r"."):
        load(tmp_path / "x", b"\x80\x05\x96" + (1 << 45).to_bytes(8, "little") + b"abc.")


def test_a_bomb_is_not_ignited(tmp_path):
    huge = b"\x80\x02r\xff\xff\xff\x7f]."  # LONG_BINPUT: remember under number 2**31-1
    with pytest.raises(ValueError, match=r"."):
        load(tmp_path / "x", huge)
    shape = pickle.dumps({b"data": np.zeros((3, 5), np.uint8)}, 2)
    assert b"K\x03K\x05" in shape
    with pytest.raises(ValueError, match="does not go with its 15 bytes"):
        load(tmp_path / "x", shape.replace(b"K\x03K\x05", b"K\xffK\xff"))


GOOD = pickletools.optimize(
    pickle.dumps({b"data": np.arange(12, dtype=np.uint8).reshape(3, 4), b"labels": [1, 2, 3]}, 2)
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=6), st.integers(0, len(GOOD)))
def test_damage_is_a_value_error(tmp_path, changes, stop):
    content = bytearray(GOOD)
    for position, value in changes:
        content[position] = value
    with contextlib.suppress(ValueError):
        load(tmp_path / "x", bytes(content[:stop]))


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(st.binary(max_size=60))
def test_noise_is_a_value_error(tmp_path, content):
    with contextlib.suppress(ValueError):
        load(tmp_path / "x", b"\x80\x02" + content + b".")
