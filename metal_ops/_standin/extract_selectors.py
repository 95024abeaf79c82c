"""Writes `_selectors.py`: the types of the Metal methods that this package calls, as PyObjC publishes them.

    pip download --no-deps --only-binary=:all: --platform macosx_11_0_arm64 --python-version 3.12 pyobjc-framework-Metal
    python -m metal_ops._standin.extract_selectors pyobjc_framework_metal-*.whl

PyObjC describes in `Metal/_metadata.py` the methods of Metal's protocols. That file needs nothing but a module `objc`
to tell it to, so a stand-in for `objc` hears on Linux what PyObjC would be told on a Mac. Only names, type codes and
the values of constants are kept.
"""

from __future__ import annotations

import re
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

_METHODS = (
    # MTLDevice
    "name",
    "newCommandQueue",
    "newLibraryWithSource:options:error:",
    "newComputePipelineStateWithFunction:error:",
    "newBufferWithBytesNoCopy:length:options:deallocator:",
    "hasUnifiedMemory",
    "maxBufferLength",
    "maxThreadgroupMemoryLength",
    # MTLLibrary, MTLComputePipelineState
    "newFunctionWithName:",
    "maxTotalThreadsPerThreadgroup",
    "threadExecutionWidth",
    # MTLCommandQueue, MTLCommandBuffer
    "commandBuffer",
    "computeCommandEncoder",
    "commit",
    "waitUntilCompleted",
    "status",
    "error",
    "GPUStartTime",
    "GPUEndTime",
    # MTLComputeCommandEncoder
    "setComputePipelineState:",
    "setBuffer:offset:atIndex:",
    "setBytes:length:atIndex:",
    "setThreadgroupMemoryLength:atIndex:",
    "dispatchThreadgroups:threadsPerThreadgroup:",
    "endEncoding",
    # MTLCompileOptions
    "setFastMathEnabled:",
)
_CONSTANTS = (
    "MTLCommandBufferStatusCompleted",
    "MTLCommandBufferStatusError",
    "MTLMathModeSafe",
    "MTLResourceStorageModeShared",
)
_FUNCTIONS = ("MTLCreateSystemDefaultDevice", "MTLSizeMake")
# PyObjC asks the Objective-C runtime about the methods of classes, and publishes only what that gets wrong. Those of
# MTLCompileOptions are taken from Apple's documentation.
_DOCUMENTED = {"setMathMode:": ("v", "q")}


def read_metadata(wheel: Path) -> tuple[dict[str, dict[str, Any]], dict[str, int], dict[str, Any]]:
    """Returns a wheel's methods, constants and functions."""
    methods: dict[str, dict[str, Any]] = {}

    class Stub(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return lambda *args, **settings: None

    def register(owner: bytes, selector: bytes, metadata: dict[str, Any]) -> None:
        # Methods of protocols are registered under NSObject, and what more than one has is described once.
        if owner == b"NSObject" or selector.decode() not in methods:
            methods[selector.decode()] = metadata

    objc: Any = Stub("objc")
    objc.registerMetaDataForSelector = register
    objc._C_NSBOOL, objc._C_BOOL = b"Z", b"B"
    objc.sel_registerName = lambda name: name
    objc.arch, objc.platform = "arm64", "MACOSX"
    before = sys.modules.get("objc")
    sys.modules["objc"] = objc
    try:
        with zipfile.ZipFile(wheel) as archive:
            source = archive.read("Metal/_metadata.py").decode()
        found: dict[str, Any] = {}
        exec(compile(source, "Metal/_metadata.py", "exec"), found)
    finally:
        del sys.modules["objc"]
        if before is not None:
            sys.modules["objc"] = before
    constants = {name: int(value) for name, value in re.findall(r"\$(\w+)@(-?\d+)", found["enums"])}
    return methods, constants, found["functions"]


def signature(selector: str, metadata: dict[str, Any]) -> tuple[str, ...]:
    """Type codes of a method's result and arguments; `o` before one that comes back as a second result."""

    def code(value: dict[str, Any]) -> str:
        kind = value.get("type", "@")
        kind = kind.decode() if isinstance(kind, bytes) else kind
        return ("o" if value.get("type_modifier") == b"o" else "") + kind

    arguments = metadata.get("arguments", {})
    result = code(metadata.get("retval", {"type": "v" if selector.startswith("set") else "@"}))
    # The first two arguments of every method are the object and the selector.
    return (result, *(code(arguments.get(2 + i, {})) for i in range(selector.count(":"))))


def table(version: str, methods: dict[str, tuple[str, ...]], constants: dict[str, int]) -> str:
    """The text of `_selectors.py`."""

    def codes(types: tuple[str, ...]) -> str:
        return "(" + ", ".join(f'"{code}"' for code in types) + ("," if len(types) == 1 else "") + ")"

    rows = [f'    "{name}": {codes(types)},' for name, types in sorted(methods.items())]
    values = [f'    "{name}": {value},' for name, value in constants.items()]
    return "\n".join(
        [
            f'"""Made by `extract_selectors.py` from pyobjc-framework-Metal {version}; facts about its interface."""',
            "",
            "from __future__ import annotations",
            "",
            "METHODS: dict[str, tuple[str, ...]] = {",
            *rows,
            "}",
            "",
            "CONSTANTS: dict[str, int] = {",
            *values,
            "}",
            "",
            f"FUNCTIONS = {codes(_FUNCTIONS)}",
            "",
        ]
    )


def main(wheel: Path) -> None:
    """Writes the table beside this file."""
    methods, constants, functions = read_metadata(wheel)
    missing = [m for m in _METHODS if m not in methods] + [f for f in _FUNCTIONS if f not in functions]
    if missing:
        raise SystemExit(f"{wheel.name} does not describe {', '.join(missing)}")
    found = {name: signature(name, methods[name]) for name in _METHODS} | _DOCUMENTED
    text = table(wheel.name.split("-")[1], found, {name: constants[name] for name in _CONSTANTS})
    Path(__file__).with_name("_selectors.py").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
