"""What keeps the library from being used is said, and never breaks JAX."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys

import pytest

from upg_jax import BackendError, _native, use_backend
from upg_jax._sparse_dense import choose_backend


@pytest.fixture
def load(library, monkeypatch):
    """Loads the library again, without registering it again; the process keeps the first one."""
    monkeypatch.setattr(_native, "_register", lambda library: None)
    return _native._load.__wrapped__


def test_the_library_is_chosen_where_it_is_loaded(library):
    assert library.usable_kernels[-1] == "portable"
    assert library.kernels == library.usable_kernels[0]
    backend, reason = choose_backend("cpu")
    assert backend == "native"
    assert library.kernels in reason
    assert choose_backend("tpu")[0] == "reference"


def test_its_handlers_are_the_ones_that_lowerings_name(library):
    assert list(library.handlers) == [
        _native.SPARSE_DENSE,
        _native.DENSE_SPARSE,
        _native.DECODE,
        _native.ATTEND,
        _native.SPARSE_DENSE_NARROW,
        _native.DECODE_NARROW,
    ]


def test_an_install_without_it_says_so(load, monkeypatch, tmp_path):
    monkeypatch.setattr(_native, "__path__", [str(tmp_path)])
    assert "without the compiled kernels" in load()


def test_a_file_that_is_no_library_says_so(load, monkeypatch, tmp_path):
    (tmp_path / "libupg_native.so").write_bytes(b"not a library")
    monkeypatch.setattr(_native, "__path__", [str(tmp_path)])
    assert "do not load" in load()


def test_a_library_built_from_older_sources_says_so(load, monkeypatch):
    """As an editable install has it whose C++ has changed since."""
    monkeypatch.setitem(_native.SIGNATURES, "upg_of_tomorrow", (None, []))
    assert "not of this version; reinstall upg_jax" in load()


def test_a_library_whose_functions_take_other_arguments_says_so(load, monkeypatch):
    monkeypatch.setattr(_native, "_INTERFACE", _native._INTERFACE + 1)
    assert "not of this version; reinstall upg_jax: interface" in load()


def test_an_old_jaxlib_is_not_given_the_handlers(load, monkeypatch):
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.9.1" if name == "jaxlib" else version(name)
    )
    assert "need jaxlib 0.10 or newer; this is 0.9.1" in load()


@pytest.mark.parametrize("change", [(0, -1), (1, 0)])
def test_another_ffi_version_is_not_given_the_handlers_and_warns(load, change, library, monkeypatch):
    major, minor = library.ffi_api
    monkeypatch.setattr(_native, "running_ffi_api", lambda: (major + change[0], minor + change[1]))
    with pytest.warns(UserWarning, match="built for XLA FFI"):
        assert "reinstall upg_jax" in load()


def test_a_newer_minor_ffi_version_is_fine(load, library, monkeypatch):
    major, minor = library.ffi_api
    monkeypatch.setattr(_native, "running_ffi_api", lambda: (major, minor + 1))
    assert isinstance(load(), _native.Library)


def test_kernels_may_be_named_in_the_environment(library):
    script = (
        "from upg_jax import _native; library = _native.load(); "
        "print(library.kernels if library else _native.unavailable_reason())"
    )

    def run(name: str) -> tuple[str, str]:
        environment = {**os.environ, _native.KERNELS_VARIABLE: name}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True
        )
        return done.stdout.strip(), done.stderr

    assert run("portable") == ("portable", "")
    said, warned = run("sse9")
    assert "'sse9'; this processor runs" in said
    assert "falls back to pure JAX" in warned


def test_forcing_an_unusable_library_is_an_error_with_the_reason(library, monkeypatch):
    monkeypatch.setattr(_native, "_load", lambda: "it is not there")
    with pytest.raises(BackendError, match="it is not there"), use_backend("native"):
        pass
    assert choose_backend("cpu") == ("reference", "it is not there: pure JAX runs everywhere")


def test_unusable_kernels_are_refused_by_name(library):
    with (
        pytest.raises(ValueError, match=r"must be one of .*portable.*; got 'mmx'"),
        library.use_kernels("mmx"),
    ):
        pass
