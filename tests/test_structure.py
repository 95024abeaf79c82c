"""The shape of the package: who imports whom, what an import costs."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PACKAGE = Path(importlib.util.find_spec("upg_jax").origin).parent
METAL = Path(importlib.util.find_spec("metal_ops").origin).parent

# A package may import itself and what stands to its right.
MAY_IMPORT = {
    "cli": {"serve", "train", "inference", "models", "compress", "io", "core"},
    "train": {"inference", "models", "io", "core"},
    "serve": {"inference", "core"},
    "inference": {"models", "io", "core"},
    "models": {"_native", "core"},  # attention at one position has a kernel of its own
    # Calibration runs a model, block by block; models know nothing of compression.
    "compress": {"models", "io", "core"},
    "io": {"core"},
    "core": {"_native", "metal_ops"},
    "_native": set(),
    "metal_ops": set(),
}


def layer_of(module: str) -> str:
    package, _, rest = module.partition(".")
    part = package if package == "metal_ops" else rest.partition(".")[0]
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
    ".".join((package.name, *path.relative_to(package).with_suffix("").parts)): path
    for package in (PACKAGE, METAL)
    for path in sorted(package.rglob("*.py"))
}


@pytest.mark.parametrize("module", [m for m in MODULES if m != "upg_jax.__init__"])
def test_imports_point_one_way(module):
    layer = layer_of(module)
    used = {layer_of(name) for name in imports(MODULES[module]) if name.startswith(("upg_jax.", "metal_ops"))}
    assert used <= {layer, *MAY_IMPORT[layer]}


@pytest.mark.parametrize("module", MODULES)
def test_semi_public_jax_names_stay_in_the_compatibility_module(module):
    names = imports(MODULES[module])
    assert not {n for n in names if n.startswith(("jax._src", "jaxlib."))}
    if module != "upg_jax._compat":
        assert not {n for n in names if n.startswith(("jax.interpreters", "jax.extend"))}


def run(code: str) -> Any:
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


# What a program has imported after each thing that it may do, in the order in which it costs more.
SESSION = """
import json, sys
import upg_jax
found = {"import upg_jax": sorted(sys.modules)}
import jax
found["import jax"] = sorted(sys.modules)
upg_jax.sparse_dense, upg_jax.save
found["names"] = sorted(sys.modules)
upg_jax.sparse_dense(jax.numpy.ones(2), upg_jax.MdCSR.from_dense(jax.numpy.eye(2), density=1.0))
found["product"] = sorted(sys.modules)
missing = [name for name in upg_jax.__all__ if not hasattr(upg_jax, name)]
print(json.dumps({**found, "missing": missing}))
"""


@pytest.fixture(scope="module")
def imported():
    """Names of modules by what was done last, and public names that do not exist."""
    return {after: set(names) for after, names in run(SESSION).items()}


def test_importing_the_package_does_not_import_jax(imported):
    assert "upg_jax" in imported["import upg_jax"]
    assert "jax" not in imported["import upg_jax"]


def test_the_product_needs_only_the_required_packages(imported):
    optional = {
        "gguf",
        "tokenizers",
        "jinja2",
        "typer",
        "rich",
        "torch",
        "transformers",
        "scipy",
        "platformdirs",
    }
    assert imported["names"] & optional == imported["import jax"] & optional
    assert "upg_jax._sparse_dense" in imported["names"]


def test_metal_ops_is_imported_only_where_its_backends_are_asked_for(imported):
    assert "upg_jax._sparse_dense._lowering" in imported["product"]
    assert "metal_ops" not in imported["product"]


def test_metal_ops_needs_no_jax():
    assert run("import json, sys, metal_ops; print(json.dumps('jax' in sys.modules))") is False


def test_every_public_name_exists(imported):
    assert not imported["missing"]
