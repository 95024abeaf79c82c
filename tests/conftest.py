"""Strict JAX for every test: no silent promotion, several CPU devices; pyproject.toml makes warnings errors."""

from __future__ import annotations

import gc
import os
import shutil
import signal

# A shell starts what runs in the background with Ctrl-C ignored, and programs inherit that: some tests send one.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Read once, when jax starts its CPU backend, so they must be set before anything imports it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import hypothesis
import jax
import numpy as np
import pytest
from helpers.backends import EVERY_BACKEND, QUICKEST_BACKEND

from upg_jax import use_backend

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    """Compiles the quick suite's programs, most of which run once, without LLVM's optimizations: a third faster.

    Slow tests, and CI's other lanes by a flag of their own, run what users run.
    """
    flag, flags = "--xla_backend_optimization_level", os.environ["XLA_FLAGS"]
    on_cpu = os.environ["JAX_PLATFORMS"] == "cpu"
    if config.option.markexpr == "not slow" and on_cpu and flag not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}=0"
    if config.option.keep_programs and on_cpu:
        _keep_programs(config)


def pytest_addoption(parser):
    parser.addoption(
        "--keep-programs",
        action="store_true",
        help="keep what XLA compiles in pytest's cache for later runs (the first one takes a little longer)",
    )


def _keep_programs(config):
    """A program is found by its code, its flags and the version of XLA; a folder that has grown large is emptied.

    Processes that tests start compile as users' do: one that is killed while it writes would leave half a program, and
    a warning about it in every later run.
    """
    if getattr(config, "cache", None) is None:
        raise pytest.UsageError("--keep-programs needs pytest's cache; leave out -p no:cacheprovider")
    if jax.__version_info__ < (0, 10):
        raise pytest.UsageError(
            f"--keep-programs: jax {jax.__version__} forgets which arguments may be donated"
        )
    folder = config.cache.mkdir("programs")
    if not hasattr(config, "workerinput") and sum(f.stat().st_size for f in folder.iterdir()) > 1 << 29:
        shutil.rmtree(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_collection_finish(session):
    """Lets Python's garbage collector look only at what tests make, and seldom: programs are very many objects."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


# The same examples in every run; `--hypothesis-seed` or a profile of one's own explores others.
hypothesis.settings.register_profile(
    "upg_jax", deadline=None, derandomize=True, database=None, max_examples=60
)
hypothesis.settings.load_profile("upg_jax")


@pytest.fixture(scope="session", autouse=True)
def _nobody_waits_for_the_disk():
    """Files of tests need not outlive a power failure; io/test_writer.py checks what is synchronized, and when."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(params=EVERY_BACKEND)
def backend(request):
    """Runs a test on every usable implementation of `sparse_dense`; skips the others with a reason."""
    _skip_what_it_refuses(request)
    with use_backend(request.param):
        yield request.param


@pytest.fixture(params=QUICKEST_BACKEND)
def one_backend(request):
    """Runs a test on the usable implementation that compiles fastest; on the others under `-m slow`."""
    _skip_what_it_refuses(request)
    with use_backend(request.param):
        yield request.param


def _skip_what_it_refuses(request):
    index = getattr(request.node.callspec.params.get("case"), "index", "delta8")
    if request.param in ("metal", "emulator", "cuda") and index != "delta8":
        pytest.skip(f"kernels for GPUs read deltas, and this layer's index is {index!r}")


@pytest.fixture
def rng():
    return np.random.default_rng(20240229)


@pytest.fixture(scope="session")
def gguf_model(tmp_path_factory):
    """The file of a small model with a tokenizer."""
    pytest.importorskip("gguf", reason='pip install "upg-jax[test]"')
    from small_models import byte_level

    return byte_level.write(tmp_path_factory.mktemp("model") / "small.gguf")
