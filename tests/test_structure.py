"""The shape of the package: who imports whom, what an import costs."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(importlib.util.find_spec("upg_jax").origin).parent

# A package may import itself and what stands to its right.
MAY_IMPORT = {
    "cli": {"inference", "models", "compress", "io", "core"},
    "inference": {"models", "io", "core"},
    "models": {"core"},
    "compress": {"io", "core"},
    "io": {"core"},
    "core": {"_native"},
    "_native": set(),
}


def layer_of(module: str) -> str:
    part = module.split(".")[1] if "." in module else ""
    return part if part in MAY_IMPORT else "core"


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            # `from upg_jax import _native` imports a module, too.
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


MODULES = {
    ".".join(("upg_jax", *path.relative_to(PACKAGE).with_suffix("").parts)): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


@pytest.mark.parametrize("module", [m for m in MODULES if m != "upg_jax.__init__"])
def test_imports_point_one_way(module):
    layer = layer_of(module)
    used = {layer_of(name) for name in imports(MODULES[module]) if name.startswith("upg_jax.")}
    assert used <= {layer, *MAY_IMPORT[layer]}


@pytest.mark.parametrize("module", MODULES)
def test_semi_public_jax_names_stay_in_the_compatibility_module(module):
    names = imports(MODULES[module])
    assert not {n for n in names if n.startswith(("jax._src", "jaxlib."))}
    if module != "upg_jax._compat":
        assert not {n for n in names if n.startswith(("jax.interpreters", "jax.extend"))}


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_importing_the_package_does_not_import_jax():
    assert run("import sys, upg_jax; print('jax' in sys.modules)").strip() == "False"


def test_the_product_needs_only_the_required_packages():
    optional = (
        "('gguf', 'tokenizers', 'jinja2', 'typer', 'rich', 'torch', 'transformers', 'scipy', 'platformdirs')"
    )
    loaded = f"print([m for m in {optional} if m in sys.modules])"
    before = run(f"import sys, jax; {loaded}")
    assert run(f"import sys, upg_jax; upg_jax.sparse_dense; upg_jax.save; {loaded}") == before


def test_every_public_name_exists():
    run("import upg_jax; [getattr(upg_jax, name) for name in upg_jax.__all__]")
