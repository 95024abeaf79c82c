"""Builds and runs the C++ test driver: under sanitizers, and NEON's kernels in an emulator."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="needs a checkout of the sources"),
    pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake (apt install cmake)"),
]


def run(*command: str | Path) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def driver(folder: Path, *options: str) -> Path:
    run("cmake", "-S", ROOT, "-B", folder, "-DUPG_DRIVER=ON", "-DUPG_DEVELOPER=ON", *options)
    run("cmake", "--build", folder, "--parallel", "2")
    return folder / "upg_driver"


@pytest.mark.parametrize("sanitizers", ["", "address,undefined", "thread"])
def test_kernels_are_right_under_sanitizers(sanitizers, tmp_path):
    assert "portable: ok" in run(driver(tmp_path, f"-DUPG_SANITIZE={sanitizers}"))


def test_neon_kernels_are_right_in_an_emulator(tmp_path):
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs apt install g++-aarch64-linux-gnu qemu-user")
    built = driver(
        tmp_path,
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={compiler}",
        "-DCMAKE_EXE_LINKER_FLAGS=-static",
    )
    assert "neon: ok" in run(emulator, built)
