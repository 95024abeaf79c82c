"""One run at a time in a directory of unfinished work."""

from __future__ import annotations

import contextlib
import errno
import os

import pytest

from upg_jax import CheckpointError
from upg_jax.io._locked import locked

fcntl = pytest.importorskip("fcntl", reason="directories have no locks on Windows")


def test_a_second_run_is_refused_until_the_first_ends(tmp_path):
    path = tmp_path / "work"
    with locked(path, "compress"):
        with pytest.raises(CheckpointError, match=r"compress: another run is at work in .*work"):
            locked(path, "compress").__enter__()
        assert path.is_dir()
    with locked(path, "compress"):
        pass


def test_a_run_that_fails_leaves_what_it_has_done_but_no_empty_directory(tmp_path):
    path = tmp_path / "work"
    for done in (False, True):
        with contextlib.suppress(ZeroDivisionError), locked(path, "compress"):
            if done:
                (path / "state").touch()
            raise ZeroDivisionError
        assert path.exists() == done


@pytest.mark.parametrize("link", [False, True])
def test_a_file_or_a_dangling_link_in_the_place_is_named(tmp_path, link):
    path = tmp_path / "work"
    if link:
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.touch()
    with pytest.raises(CheckpointError, match=r"recover: .*work must be a directory.* move it away"):
        locked(path, "recover").__enter__()
    assert path.is_symlink() or path.is_file()


def test_a_directory_that_a_run_took_along_before_it_was_opened_is_that_runs(tmp_path, monkeypatch):
    path, open_ = tmp_path / "work", os.open

    def late(name, flags):
        path.rmdir()
        return open_(name, flags)

    monkeypatch.setattr(os, "open", late)
    with pytest.raises(CheckpointError, match="another run is at work"):
        locked(path, "compress").__enter__()


@pytest.mark.parametrize("again", [False, True])
def test_a_directory_that_another_run_took_along_or_made_anew_is_not_taken_for_the_locked_one(
    tmp_path, monkeypatch, again
):
    path = tmp_path / "work"
    lock = fcntl.flock

    def late(descriptor, operation):
        path.rename(tmp_path / "result")
        if again:
            path.mkdir()
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(CheckpointError, match="another run is at work"):
        locked(path, "compress").__enter__()
    assert path.exists() == again


def test_a_file_system_without_locks_goes_without(tmp_path, monkeypatch):
    def none(descriptor, operation):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", none)
    with locked(tmp_path / "work", "compress"):
        assert (tmp_path / "work").is_dir()
