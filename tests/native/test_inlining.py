"""Inner loops call nothing: .ci/inlined, and the compiled kernels."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from upg_jax import _native

SCRIPT = Path(__file__).parents[2] / ".ci" / "inlined"
KERNELS = "upg::(anonymous namespace)::"

pytestmark = [
    pytest.mark.skipif(not SCRIPT.exists(), reason="needs a checkout of the sources"),
    pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (apt install binutils)"),
]


def check(library: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment or None)


def test_the_library_inlines_what_inner_loops_do():
    library = _native.library_path()
    if library is None:
        pytest.skip(f"no native library: {_native.unavailable_reason()}")
    done = check(library)
    if done.returncode == 2:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("symbol", "listed"),
    [
        (f"{KERNELS}Avx2::gather(float const*, unsigned long const*)", True),
        (f"{KERNELS}Sixteen::from_int8(signed char const*)", True),
        (
            f"{KERNELS}Avx2::Eight {KERNELS}levels_of<{KERNELS}Avx2, true>(signed char const*) [clone .isra.0]",
            True,
        ),
        (
            f"{KERNELS}scatter_row<{KERNELS}Avx2, false>(Layer const&)::{{lambda(int)#1}}::operator()(int) const",
            True,
        ),
        (f"{KERNELS}Avx2::sum_bytes(unsigned char const*, unsigned long)", False),
        (
            f"void {KERNELS}for_entries<false, {KERNELS}scatter_row<{KERNELS}Avx2>(Layer const&)::{{lambda(int)#1}}>()",
            False,
        ),
    ],
)
def test_what_is_out_of_line_is_listed(symbol, listed, tmp_path):
    nm = tmp_path / "nm"
    symbols = [f"void {KERNELS}product_with_vector<{KERNELS}Avx2>(upg::Layer const&)", symbol]
    nm.write_text("#!/bin/sh\ncat <<'END'\n" + "".join(f"0042 t {name}\n" for name in symbols) + "END\n")
    nm.chmod(0o755)
    done = check(tmp_path, NM=str(nm), PATH="/usr/bin:/bin")
    assert done.returncode == listed, done.stderr
    assert (symbol in done.stdout) == listed
