"""What the launcher of kernels asks of Python, over a stand-in for the CUDA driver: needs a C++ compiler, no GPU."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

LAUNCHER = Path(__file__).parents[2] / "upg_jax" / "_cuda" / "src" / "launch.cc"
COMPILER = shutil.which("c++")

DRIVER = """
extern "C" {
int cuGetErrorString(int, const char** text) { *text = "broken"; return 0; }
int cuCtxPushCurrent_v2(void*) { return 0; }
int cuCtxPopCurrent_v2(void**) { return 0; }
int cuStreamGetCtx(void*, void**) { return 0; }
int cuCtxGetDevice(int*) { return 0; }
int cuDeviceGetAttribute(int* value, int which, int) { *value = which == 75 ? 9 : 0; return 0; }
int cuModuleLoadData(void**, const char* code) { return code[0] == 'c' ? 0 : 1; }
int cuModuleGetFunction(void**, void*, const char*) { return 0; }
int cuFuncSetAttribute(void*, int, int) { return 0; }
int cuThreadExchangeStreamCaptureMode(int*) { return 0; }
int cuLaunchKernel() { return 0; }
}
"""

FIND = """
#include "{launcher}"

// Why a kernel is not found; nothing where it is.
UPG_API const char* find_kernel(const char* name) {{
  static std::string problem;
  problem.clear();
  try {{
    find(nullptr, name);
  }} catch (const CompileError& error) {{
    problem = error.problem;
  }} catch (const DriverError& error) {{
    problem = error.what;
  }}
  return problem.c_str();
}}
"""

# Prints what calls say, what was compiled, and what a call says for which nothing can be compiled.
CALLS = """
import ctypes, json, sys
import metal_ops
from upg_jax import _cuda

ctypes.CDLL(sys.argv[1])
library = _cuda.Library(sys.argv[2])
find = ctypes.CDLL(sys.argv[2]).find_kernel
find.restype = ctypes.c_char_p
coming = {
    "interrupted": [KeyboardInterrupt(), MemoryError("out of memory"), b"code"],
    "refused": [metal_ops.SourceError("line 3")],
    "unavailable": [metal_ops.UnavailableError("no NVRTC")],
}
asked = []

def compile_named(name, architecture):
    asked.append(f"{name} {architecture}")
    found = coming[name].pop(0)
    if isinstance(found, bytes):
        return found
    raise found

metal_ops.compile_named = compile_named
sys.modules["metal_ops"] = None  # whatever it is that the import raises
broken = find(b"broken").decode()
sys.modules["metal_ops"] = metal_ops
said = {name: [find(name.encode()).decode() for _ in range(4)] for name in coming}
print(json.dumps([said, asked, broken]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="CUDA's driver is loaded by its name on Linux")
@pytest.mark.skipif(COMPILER is None or not LAUNCHER.exists(), reason="needs a C++ compiler and the sources")
def test_only_what_stays_wrong_is_kept_and_anything_else_is_tried_again(tmp_path):
    driver, library = tmp_path / "libcuda.so.1", tmp_path / "launcher.so"
    build = [COMPILER, "-std=c++17", "-shared", "-fPIC", "-w"]
    (tmp_path / "driver.cc").write_text(DRIVER)
    (tmp_path / "find.cc").write_text(FIND.format(launcher=LAUNCHER))
    subprocess.run(
        [*build, "-Wl,-soname,libcuda.so.1", tmp_path / "driver.cc", "-o", driver], check=True, timeout=120
    )
    headers = f"-I{jax.ffi.include_dir()}"
    subprocess.run([*build, headers, tmp_path / "find.cc", "-ldl", "-o", library], check=True, timeout=120)
    command = [sys.executable, "-c", CALLS, str(driver), str(library)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    said, asked, broken = json.loads(done.stdout)
    assert said == {
        "interrupted": ["KeyboardInterrupt: ", "MemoryError: out of memory", "", ""],
        "refused": ["SourceError: line 3"] * 4,
        "unavailable": ["UnavailableError: no NVRTC"] * 4,
    }
    assert broken.startswith("ModuleNotFoundError: ")
    assert asked == ["interrupted sm_90"] * 3 + ["refused sm_90", "unavailable sm_90"]
