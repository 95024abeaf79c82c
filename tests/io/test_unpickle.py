"""The inert pickle reader against Python's own, on data that models are made of."""

from __future__ import annotations

import collections
import contextlib
import pickle

import hypothesis
import numpy as np
import pytest
import scipy.sparse
from hypothesis import strategies as st

from upg_jax import FormatError
from upg_jax.io._pickle_values import PickledArray, PickledCSR
from upg_jax.io._unpickle import load

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def plain(value):
    """Turns what `load` returns into what `pickle.loads` returns."""
    if isinstance(value, PickledArray):
        return value.array
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value))
    return value


def assert_same(ours, theirs) -> None:
    if isinstance(theirs, np.ndarray):
        assert isinstance(ours, np.ndarray)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype.newbyteorder("="))
        np.testing.assert_array_equal(ours, theirs)
    elif isinstance(theirs, dict):
        assert isinstance(ours, dict)
        assert list(ours) == list(theirs)
        for key, entry in theirs.items():
            assert_same(ours[key], entry)
    elif isinstance(theirs, (list, tuple)):
        assert type(ours) is type(theirs)
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    else:
        assert ours == theirs or (ours != ours and theirs != theirs)


def read(tmp_path, content: bytes):
    path = tmp_path / "model.upg"
    path.write_bytes(content)
    return load(path)


_integers = st.integers(-(2**63), 2**63 - 1)  # larger ones are refused: numbers that are no size of anything
_plain_values = st.one_of(
    st.none(),
    st.booleans(),
    _integers,
    st.floats(),
    st.text(),
    st.binary(),
    st.binary(min_size=300),
)
_keys = st.one_of(st.text(), _integers, st.none(), st.binary(max_size=4))
_arrays = st.builds(
    lambda dtype, shape, data, order: np.resize(np.frombuffer(data, dtype), shape).astype(dtype, order=order),
    st.sampled_from(["?", "i1", "u1", "<i2", "<u2", "<i4", ">i4", "<u4", "<i8", ">f4", "<f2", "<f4", "<f8"]),
    st.sampled_from([(), (0,), (3,), (2, 3), (0, 4), (2, 1, 3)]),
    st.binary(min_size=64, max_size=64).map(lambda data: bytes(b & 1 for b in data)),
    st.sampled_from("CF"),
)
_model_data = st.recursive(
    _plain_values | _arrays,
    lambda inner: st.one_of(
        st.lists(inner), st.lists(inner).map(tuple), st.dictionaries(_keys, inner), st.tuples(inner, inner)
    ),
    max_leaves=12,
)


@hypothesis.given(data=_model_data, protocol=st.sampled_from(PROTOCOLS))
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], max_examples=150)
def test_data_reads_as_pickle_reads_it(tmp_path, data, protocol):
    content = pickle.dumps(data, protocol=protocol)
    assert_same(plain(read(tmp_path, content)), pickle.loads(content))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_shared_and_cyclic_objects_stay_so(tmp_path, protocol):
    shared = np.arange(3)
    data = {"a": shared, "b": [shared]}
    data["self"] = data
    back = read(tmp_path, pickle.dumps(data, protocol=protocol))
    assert back["a"] is back["b"][0]
    assert back["self"] is back


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", [scipy.sparse.csr_matrix, scipy.sparse.csr_array])
def test_scipy_matrices_give_their_planes(tmp_path, protocol, kind):
    matrix = kind(np.array([[0, 1.5, 0], [2, 0, 3]], np.float32))
    back = read(tmp_path, pickle.dumps(matrix, protocol=protocol))
    assert isinstance(back, PickledCSR)
    for key in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(back.state[key].array, getattr(matrix, key))
    assert back.state["_shape"] == (2, 3)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_numpy_numbers_become_plain_ones(tmp_path, protocol):
    data = [np.float32(1.5), np.int64(-3), np.bool_(True), np.float64(2.5), np.uint8(7)]
    back = read(tmp_path, pickle.dumps(data, protocol=protocol))
    assert back == [1.5, -3, True, 2.5, 7]
    assert [type(value) for value in back] == [float, int, bool, float, int]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_sets_become_lists_and_ordered_dicts_dicts(tmp_path, protocol):
    data = {"set": {1, 2}, "frozen": frozenset("ab"), "ordered": collections.OrderedDict(b=1, a=2)}
    back = read(tmp_path, pickle.dumps(data, protocol=protocol))
    assert sorted(back["set"]) == [1, 2]
    assert sorted(back["frozen"]) == ["a", "b"]
    assert list(back["ordered"].items()) == [("b", 1), ("a", 2)]


def test_a_pickle_of_numpy_1_and_python_2_is_read(tmp_path):
    array = np.array([1, -2, 200], np.int16)
    content = pickle.dumps({"a": array}, protocol=2).replace(b"numpy._core", b"numpy.core")
    np.testing.assert_array_equal(read(tmp_path, content)["a"].array, array)
    # Python 2 wrote an array's bytes as its own str, which is one byte a character.
    python2 = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x03\x85cnumpy\ndtype\nU\x02i2K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x06" + array.tobytes() + b"tb."
    )
    np.testing.assert_array_equal(read(tmp_path, python2).array, array)


@pytest.mark.parametrize(("order", "number"), [("<", 513), (">", 258)])
def test_a_dtype_may_be_named_with_its_byte_order(tmp_path, order, number):
    dtype = f"cnumpy\ndtype\n(V{order}i2\ntR".encode()
    content = b"\x80\x03cnumpy.core.numeric\n_frombuffer\n(C\x02\x01\x02" + dtype + b"(I1\ntVC\ntR."
    assert read(tmp_path, content).array.tolist() == [number]


def test_arrays_of_ascii_bytes_fit_the_budget(tmp_path):
    array = np.zeros(100_000, np.uint8)
    np.testing.assert_array_equal(read(tmp_path, pickle.dumps(array, protocol=2)).array, array)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_truncation_anywhere_is_refused(tmp_path, protocol):
    data = {"tensors": {"w": {"values": np.arange(5, dtype=np.int8), "shape": (1, 5)}}, "x": [1.5, "a", None]}
    content = pickle.dumps(data, protocol=protocol)
    for size in range(len(content)):
        with pytest.raises(FormatError, match=r"model\.upg"):
            read(tmp_path, content[:size])


@hypothesis.given(
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4),
    protocol=st.sampled_from(PROTOCOLS),
)
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], max_examples=300)
def test_damage_is_refused_or_read_never_a_crash(tmp_path, edits, protocol):
    data = {
        "w": {"values": np.arange(5, dtype=np.int8), "s": scipy.sparse.csr_matrix(np.eye(2))},
        "x": [1.5, {2}],
    }
    content = bytearray(pickle.dumps(data, protocol=protocol))
    for at, byte in edits:
        content[int(at * len(content))] = byte
    with contextlib.suppress(FormatError):
        read(tmp_path, bytes(content))
