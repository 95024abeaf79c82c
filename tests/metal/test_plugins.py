"""Under JAX's plugins for Apple GPUs the product is plain StableHLO: no custom call, only operations of a list."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.layers import Case, stacked

import upg_jax
from upg_jax import MdCSR, sparse_dense, use_backend
from upg_jax._sparse_dense import choose_backend, sparse_dense_many

PAGE = Path(__file__).parents[2] / "docs" / "apple.md"
PLUGINS = ("METAL", "mps", "mtl")
ENCODINGS = ("delta8", "mask", "dense")


def listed() -> set[str]:
    """The operations of the table in docs/apple.md."""
    return set(
        re.findall(r"^\| `(stablehlo\.\w+|func\.\w+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    )


def lowered(platforms: tuple[str, ...], function, *args) -> str:
    """One program for several platforms: what differs among them would be a `stablehlo.case`."""
    args = jax.tree.map(np.asarray, args)  # arrays of the host carry no sharding into the text
    return jax.jit(function).trace(*args).lower(lowering_platforms=platforms).as_text()


def operations(text: str) -> set[str]:
    """Names of operations, in the short form and in the quoted one; of terminators the short form drops the dialect."""
    found = set(re.findall(r"\b(stablehlo\.[a-z_0-9]+|chlo\.\w+|func\.(?!func)\w+|sdy\.\w+)", text))
    return found | {"func.return" for _ in re.findall(r"^ +return ", text, re.MULTILINE)} | {
        "func.call" for _ in re.findall(r"= call @", text)
    }  # fmt: skip


def programs():
    """Everything that binds a primitive, over vectors few and many, dtypes, manifolds and encodings."""

    def loss(x, layer):
        return sparse_dense(x, layer).astype(jnp.float32).sum()

    def loss_of_scales(scales, x, layer):
        return loss(x, MdCSR(**{**vars(layer), "scales": scales}))

    for manifold in ("unit", "prime"):
        case = Case("random", (33, 67), manifold)
        layer, stack = case.layer, stacked(case, Case("random", (33, 67), manifold, seed=1))
        for n in (1, 5, 300):
            for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
                x = jnp.ones((n, 67), dtype)
                yield sparse_dense, x, layer
                yield jax.grad(loss), x, layer
            x = jnp.ones((2, n, 67))
            yield lambda x, s, i: sparse_dense(x, s, index=i), x[0], stack, jnp.int32(1)
            yield lambda x, s, i: sparse_dense(x, s, index=i), x, stack, jnp.asarray([1, 0])
            yield jax.vmap(sparse_dense), x, stack
            yield jax.grad(loss_of_scales), layer.scales, x[0], layer
            yield lambda x, s: jax.lax.scan(lambda c, one: (c, sparse_dense(x, one)), None, s)[1], x[0], stack
            yield lambda x, a, b: sparse_dense_many(x, [a, b]), x[0], layer, layer
        yield lambda layer: layer.to_dense(), layer
        for index in ENCODINGS[1:]:
            yield sparse_dense, jnp.ones((5, 67)), upg_jax.pack(layer, index)


@pytest.mark.skipif(not PAGE.exists(), reason="runs in a checkout, where docs/ lies beside tests/")
def test_no_custom_call_and_only_operations_of_the_list():
    used = set()
    for function, *args in programs():
        text = lowered(PLUGINS, function, *args)
        assert "custom_call" not in text
        used |= operations(text)
    assert used <= listed()
    assert listed() <= used, "the list names operations that are not used any more"


def test_a_custom_call_would_be_seen():
    call = jax.ffi.ffi_call("metal_ops.test.nothing", jax.ShapeDtypeStruct((3,), jnp.float32))
    text = lowered(("cpu",), lambda x: call(x), np.ones(3, np.float32))
    assert "stablehlo.custom_call" in operations(text)


@pytest.mark.parametrize("platform", PLUGINS)
def test_auto_is_the_reference_there(platform):
    with use_backend("auto"):
        assert choose_backend(platform)[0] == "reference"
