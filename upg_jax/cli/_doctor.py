"""`upg-jax doctor`: what is installed, what this machine has, and what `sparse_dense` does here."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Annotated, Any

import typer

from upg_jax._version import __version__

NO_LOWERING = "none"
_PACKAGES = ("jax", "jaxlib", "numpy", "safetensors", "chex", "gguf", "tokenizers", "jinja2")
_SIMD = (
    "sse4_2",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vbmi2",
    "avx512_bf16",
    "amx_int8",
)


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    metal: Annotated[
        bool,
        typer.Option(
            "--metal",
            help="Compile, check and time every Metal kernel, and print what to paste into an issue. Without a "
            "Mac they run in an emulator.",
        ),
    ] = False,
) -> None:
    """Prints versions, platform, SIMD, and which lowering sparse_dense takes here and why; exits with 1 if none."""
    from upg_jax.cli._output import print_json

    if metal:
        _metal(json)
        return
    report = collect()
    if json:
        print_json(report)
    else:
        _print_tables(report)
    if report["sparse_dense"]["lowering"] == NO_LOWERING:
        raise typer.Exit(1)


def _print_tables(report: dict[str, dict[str, Any]]) -> None:
    from rich.table import Table

    from upg_jax.cli._output import stdout

    for title, rows in report.items():
        table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None)
        table.add_column(min_width=14, no_wrap=True, style="cyan")
        table.add_column(overflow="fold")
        for key, value in rows.items():
            table.add_row(key, str(value))
        stdout.print(table)
        stdout.print()


def _metal(json: bool) -> None:
    import dataclasses

    from upg_jax._metal_report import as_text, report
    from upg_jax.cli._output import print_json, status, stdout

    lines = []
    with status("compiling kernels") as show:
        for line in report():
            lines.append(line)
            show(f"{line.section}: {line.name}")
    if json:
        print_json([dataclasses.asdict(line) for line in lines])
    else:
        stdout.print(as_text(lines), soft_wrap=True)
    if not all(line.ok for line in lines):
        raise typer.Exit(1)


def collect() -> dict[str, dict[str, Any]]:
    """Returns the report as sections of key and value."""
    import jax

    from upg_jax._errors import BackendError
    from upg_jax._sparse_dense import BACKENDS, choose_backend, unavailable_reason

    try:
        devices = jax.devices()
    except Exception as e:  # jax raises RuntimeError or AssertionError, by how JAX_PLATFORMS is wrong
        platform_name, shown = "none", f"none; jax does not start: {str(e) or type(e).__name__}"
        backend, reason = NO_LOWERING, "jax does not start; unset JAX_PLATFORMS, or install what it asks for"
    else:
        platform_name, shown = devices[0].platform, ", ".join(str(d) for d in devices)
        try:
            backend, reason = choose_backend(platform_name)
        except BackendError as e:  # of what UPG_JAX_BACKEND asks for
            backend, reason = NO_LOWERING, str(e)
    return {
        "versions": {
            "upg_jax": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "usable cores": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
            "SIMD": ", ".join(_simd()) or "unknown",
        },
        "jax": {
            "platform": platform_name,
            "devices": shown,
            "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "not set"),
        },
        "sparse_dense": {
            "lowering": backend,
            "because": reason,
            "4 or 3 bits": "native with a mask or dense rows, else reference"
            if backend == "native"
            else "reference: no kernels for values of fewer than 8 bits here",
            "UPG_JAX_BACKEND": os.environ.get("UPG_JAX_BACKEND", "not set"),
            **{f"{name} backend": unavailable_reason(name) or "usable" for name in BACKENDS},
        },
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def _processor() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _simd() -> list[str]:
    if platform.machine() in ("arm64", "aarch64"):
        return ["neon"]
    flags = _cpuinfo("flags").split()
    return [name for name in _SIMD if name in flags]
