"""Hostile version 1 files. Each would run code or exhaust the machine under `pickle.load`; none may here.

The attacks leave a mark (a file, an environment variable) when they run; the first test proves that they
work.
"""

from __future__ import annotations

import builtins
import codecs
import os
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest

from upg_jax import FormatError
from upg_jax.io._unpickle import load


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def nested(payload) -> dict:
    """A payload where a converter would come across it late."""
    good = {"shape": (1, 3), "values": np.ones(1, np.int8), "indices": np.zeros(1, np.int32)}
    return {"compression_method": "prime_sparse_v1", "tensors": {"a": good, "b": {**good, "scales": payload}}}


def test_the_attacks_run_under_pickle(mark):
    pickle.loads(pickle.dumps(nested(Calls(os.system, f"touch {mark}"))))
    assert mark.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("wrap", [lambda payload: payload, nested, lambda payload: [{"tensors": (payload,)}]])
def test_a_shell_command(refused, mark, protocol, wrap):
    refused(pickle.dumps(wrap(Calls(os.system, f"touch {mark}")), protocol=protocol), f"{os.name}.system")


@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (eval, ("__import__('os').system('touch {}')",), "builtins.eval"),
        (exec, ("open('{}', 'w')",), "builtins.exec"),
        (open, ("{}", "w"), "io.open"),
        (getattr, (os, "system"), "builtins.getattr"),
        (builtins.__import__, ("os",), "builtins.__import__"),
        (subprocess.Popen, (["touch", "{}"],), "subprocess.Popen"),
        (os.unlink, ("{}",), "unlink"),
        (np.load, ("{}", None, True), "numpy.load"),
        (np.fromfile, ("{}",), "fromfile"),
        (np.memmap, ("{}",), "numpy.memmap"),
        (codecs.open, ("{}", "w"), "codecs.open"),
        (codecs.lookup, ("zlib",), "_codecs.lookup"),
        (compile, ("1", "{}", "exec"), "builtins.compile"),
        (bytearray, (10**12,), "builtins.bytearray"),
        (range, (10**12,), "builtins.range"),
        (type, ("X", (), {}), "builtins.type"),
        (np.ndarray, ((10**9,),), "numpy.ndarray"),
        (np.zeros, (10**12,), "zeros"),
    ],
    ids=lambda value: getattr(value, "__name__", None) if callable(value) else None,
)
def test_a_function_that_is_not_on_the_list(refused, mark, function, arguments, named):
    arguments = [a.format(mark) if isinstance(a, str) else a for a in arguments]
    if function is getattr:
        arguments[0] = "text"
    refused(pickle.dumps(nested(Calls(function, *arguments))), named)


def test_the_command_hidden_behind_allowed_names(refused, mark):
    """`copyreg._reconstructor`, `_codecs.encode` and dtypes are on the list; not with everything."""
    command = b"Vtouch " + str(mark).encode() + b"\n"
    refused(b"ccopyreg\n_reconstructor\n(cos\nsystem\n" + command + b"NtR.", "os.system")
    refused(
        b"ccopyreg\n_reconstructor\n(cnumpy\nndarray\nc__builtin__\nobject\nNtR.",
        "makes an object of numpy.ndarray",
    )
    refused(b"c_codecs\nencode\n(Vabc\nVzlib\ntR.", "Latin-1 text only")
    refused(b"c_codecs\nencode\n(cnumpy\ndtype\nVlatin1\ntR.", "Latin-1 text only")
    refused(b"cnumpy\ndtype\n(VO\ntR.", "arrays must be of numbers")
    refused(b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\ndtype\n(I0\ntVb\ntR.", "filled later")
    refused(
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I1000000000000\ntVb\ntR.", "filled later"
    )


def test_names_with_dots_reach_no_attribute(refused):
    """Protocol 4 looks dotted names up as attributes: numpy's own modules lead to os."""
    for module, name in (
        ("numpy", "os.system"),
        ("numpy.core.multiarray", "_reconstruct.__globals__"),
        ("", ""),
    ):
        content = b"\x80\x04" + b"".join(
            b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)
        )
        refused(content + b"\x93)R.", "is not allowed")


def test_a_name_split_so_that_module_and_attribute_are_unclear(refused, mark):
    """GLOBAL's text is joined with a space, STACK_GLOBAL's with a dot; neither way around gets past the list."""
    refused(b"cos system\n\n(Vtrue\ntR.", "is not allowed")
    refused(b"\x80\x04\x8c\x00\x8c\x09os.system\x93(\x8c\x04truetR.", "is not allowed")


def test_a_name_taken_from_the_memo(refused, mark):
    """The name is put together from pieces, so that a scan of the opcodes sees no GLOBAL and no 'os'."""
    content = b"\x80\x04\x8c\x06system\x940\x8c\x02os\x940h\x01h\x00\x93\x94(\x8c" + bytes(
        [len(f"touch {mark}")]
    )
    refused(content + f"touch {mark}".encode() + b"tR.", "os.system")


def test_a_command_behind_a_discarded_value(refused, mark):
    command = f"touch {mark}".encode()
    refused(b"cos\nsystem\n(V" + command + b"\ntR0}.", "os.system")
    refused(b"(cos\nsystem\n1}.", "os.system")


def test_the_opcodes_that_make_instances(refused, mark):
    command = b"V" + f"touch {mark}".encode() + b"\n"
    refused(b"(" + command + b"ios\nsystem\n.", "INST")
    refused(b"(cos\nsystem\n" + command + b"o.", "os.system")
    refused(b"(c__builtin__\nset\n" + command + b"o.", "OBJ")
    refused(b"\x80\x02cos\nsystem\n" + command + b"\x85\x81.", "os.system")
    refused(b"\x80\x02c__builtin__\nset\n)\x81.", "makes an object of __builtin__.set")
    refused(b"\x80\x02cscipy.sparse.csr\ncsr_matrix\n(K\x01t\x81.", "with arguments")
    refused(b"\x80\x04\x8c\x05numpy\x8c\x07ndarray\x93)}\x92.", "NEWOBJ_EX")


def test_the_opcodes_that_reach_outside_the_pickle(refused):
    refused(b"Pid\n.", "PERSID")
    refused(b"\x80\x02K\x01Q.", "BINPERSID")
    refused(b"\x80\x05\x97.", "NEXT_BUFFER")
    for opcode in (b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00"):
        refused(b"\x80\x02" + opcode + b".", "EXT")


def test_an_extension_registered_and_cached_by_the_program_is_not_used(refused, mark):
    """`pickle` trusts `copyreg`'s extension cache without asking `find_class`."""
    import copyreg

    copyreg.add_extension("os", "system", 0xF0)
    copyreg._extension_cache[0xF0] = os.system
    try:
        refused(
            b"\x80\x02\x82\xf0X"
            + struct.pack("<I", len(f"touch {mark}"))
            + f"touch {mark}".encode()
            + b"\x85R.",
            "EXT1",
        )
    finally:
        copyreg.remove_extension("os", "system", 0xF0)


def test_state_is_set_on_nothing_but_arrays(refused):
    """BUILD under `pickle` sets attributes, of classes too."""
    for target in (
        b"}",
        b"]",
        b"K\x01",
        b"cnumpy\nndarray\n",
        b"c_codecs\nencode\n",
        b"cscipy.sparse.csr\ncsr_matrix\n",
    ):
        refused(b"\x80\x02" + target + b"N}U\x0c__setstate__c_codecs\nencode\ns\x86b.", "sets the state of")


def test_arrays_of_objects(refused, mark):
    for array in (np.array([Calls(os.system, f"touch {mark}")], object), np.array([None, 1], object)):
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
            refused(pickle.dumps(nested(array), protocol=protocol))


def test_arrays_of_records_strings_and_times(refused):
    arrays = (
        np.zeros(2, [("a", "i4"), ("b", "O")]),
        np.zeros(2, [("a", "i4")]),
        np.array(["a"]),
        np.array([b"a"]),
        np.zeros(2, "V8"),
        np.zeros(2, "M8[s]"),
        np.zeros(2, "c16"),
    )
    for array in arrays:
        refused(pickle.dumps(nested(array)), "arrays must be of numbers")


def test_an_array_of_another_size_than_its_bytes(refused):
    """`numpy.ndarray.__setstate__` with a wrong size has crashed before."""
    head = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntVb\ntR"
    dtype = b"cnumpy\ndtype\n(Vi8\ntR"
    for shape in (
        b"(I1000000000\nt",
        b"(I-1\nt",
        b"(I4611686018427387904\nI4\nt",
        b"(I0\nI9223372036854775807\nt",
        b"Vx\n",
    ):
        refused(head + b"(I1\n" + shape + dtype + b"I00\nVabcdefgh\ntb.", "array")


@pytest.mark.parametrize("huge", [10**4000, 2**64, -(2**64)], ids=["enormous", "by one", "by one below 0"])
@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
def test_integers_too_large_to_print_or_to_store(refused, protocol, huge):
    refused(pickle.dumps({"tensors": {"a": {"shape": (huge, 1)}}}, protocol=protocol), "fit in 64 bits")


_ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntVb\ntR"
_DTYPE = b"cnumpy\ndtype\n(Vi8\ntR"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"c__builtin__\nset\n(I1\ntR.", "a set must be made from a list; got 1"),
        (
            b"\x80\x02cscipy.sparse.csr\ncsr_matrix\n)\x81I1\nb.",
            "a sparse matrix has a state of unknown form",
        ),
        (_ARRAY + b"(I1\n(I1\nttb.", "an array has a state of unknown form"),
        (_ARRAY + b"(I1\n(I0\nt" + _DTYPE + b"I00\n]tb.", "an array's data must be bytes; got list"),
        (_ARRAY + b"(I1\n(Vx\nt" + _DTYPE + b"I00\nVabcdefgh\ntb.", "non-negative integers"),
        (_ARRAY + b"(I1\n(I-1\nI-1\nt" + _DTYPE + b"I00\nVabcdefgh\ntb.", "non-negative integers"),
        (_DTYPE + b")b.", "a dtype has a state of unknown form"),
        (_DTYPE + b"(I3\nV<\nN(Va\nt}I-1\nI-1\nI0\ntb.", "arrays of records are not allowed"),
    ],
)
def test_what_no_reconstruction_is_given(refused, content, said):
    refused(content, said)


def test_an_array_filled_twice(refused):
    array = pickle.dumps(np.arange(3, dtype=np.int8), protocol=2)
    body = array[:-1]  # without STOP
    state = body[body.index(b"(K\x01") :]
    refused(body + state + b".", "state of unknown form")


# -- other files


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (b"PK\x03\x04", "zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<html>", "HTML"),
        (b"GGUF\x03\0\0\0", "GGUF"),
        (b"", "empty"),
    ],
)
def test_a_file_that_is_no_pickle_is_named(tmp_path, start, said):
    path = tmp_path / "model.upg"
    path.write_bytes(start)
    with pytest.raises(FormatError, match=rf"model\.upg: must be a Python pickle; it is .*{said}"):
        load(path)


@pytest.mark.parametrize("content", [b"hello", b"\xff\xfe", b"{}", b"\x08\0\0\0\0\0\0\0{}"])
def test_a_file_of_other_bytes_is_refused(tmp_path, content):
    path = tmp_path / "model.upg"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"model\.upg: (after )?offset \d+: "):
        load(path)


def test_bytes_after_the_pickle_are_refused(refused):
    refused(pickle.dumps({"tensors": {}}) + b"x", "must end with the pickle")


@pytest.mark.timeout(10)
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
def test_a_fifo_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.upg")
    with pytest.raises(FormatError, match="it is a FIFO"):
        load(tmp_path / "pipe.upg")


def test_nothing_is_imported_for_a_name_in_a_file(tmp_path):
    """`pickle` imports the module that a file names, which runs it; a fresh process shows that we do not."""
    package = tmp_path / "trap.py"
    mark = tmp_path / "imported"
    package.write_text(f"open({str(mark)!r}, 'w').close()\n")
    evil = tmp_path / "evil.upg"
    evil.write_bytes(b"ctrap\nspring\n.")
    script = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
from upg_jax.io._unpickle import load
from upg_jax import FormatError
try:
    load({str(evil)!r})
except FormatError:
    print("refused", "trap" in sys.modules)
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=os.getcwd()
    )
    assert result.stdout.split() == ["refused", "False"]
    assert not mark.exists()
