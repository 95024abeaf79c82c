"""The compiled kernel of attention at one position, against a plain softmax in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from upg_jax import _native, use_backend
from upg_jax.models._attention import Scores, attend_cached

pytestmark = pytest.mark.skipif(_native.load() is None, reason=f"{_native.unavailable_reason()}")

CASES = [
    # batch, heads, kv_heads, dim, length, capacity, tokens before
    (1, 9, 3, 64, 256, 256, [130]),
    (3, 4, 2, 16, 40, 40, [0, 39, 7]),
    # Rings: one that has gone round, one whose first slot has just been taken again, and one that has not.
    (3, 2, 1, 80, 24, 100, [90, 24, 3]),
    (1, 4, 4, 7, 300, 300, [299]),
    (1, 2, 2, 512, 70, 70, [69]),
]


def softmax_oracle(q, keys, values, position, key_positions, scores):
    """One sequence in float64: q (heads, dim), keys (kv_heads, n, dim)."""
    group = q.shape[0] // keys.shape[0]
    out = []
    for h, row in enumerate(q.astype(np.float64)):
        products = keys[h // group].astype(np.float64) @ row * scores.scale
        if scores.cap is not None:
            products = scores.cap * np.tanh(products / scores.cap)
        behind = position - key_positions
        visible = (behind >= 0) & (behind < (scores.window or np.inf))
        weights = np.where(visible, np.exp(products - products[visible].max()), 0)
        out.append(weights / weights.sum() @ values[h // group].astype(np.float64))
    return np.concatenate(out)


def inputs(case, dtype, layers=2):
    batch, heads, kv_heads, dim, length, capacity, past = case
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jax.device_put(rng.standard_normal(shape).astype(dtype))

    buffers = tuple(draw(layers, batch, kv_heads, length, dim) for _ in range(2))
    new = draw(batch, 1, heads, dim), *(draw(batch, 1, kv_heads, dim) for _ in range(2))
    return new, buffers, jnp.asarray(past, jnp.int32), jnp.ones(batch, jnp.int32), capacity


def run(new, buffers, past, counts, capacity, scores, index=1):
    return attend_cached(*new, buffers, index, past, counts, capacity, scores)


compiled = jax.jit(run, static_argnums=(4, 5, 6))


# The kernel's loops are made for each dtype; what the scores ask for is an argument of all of them.
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "scores"),
    [
        (jnp.float32, Scores(scale=0.2)),
        (jnp.float32, Scores(scale=0.2, window=20)),
        (jnp.bfloat16, Scores(scale=0.5, cap=3.0)),
        (jnp.float16, Scores(scale=0.5, cap=3.0, window=20)),
    ],
    ids=str,
)
def test_one_position_attends_like_the_definition(case, dtype, scores):
    (q, k, v), buffers, past, counts, capacity = inputs(case, dtype)
    with use_backend("native"):
        out, (keys, values) = compiled((q, k, v), buffers, past, counts, capacity, scores)
    # On the host, where an index is no program.
    q, out, keys, values = (np.asarray(array, np.float32) for array in (q, out, keys, values))
    length = case[4]
    for b, before in enumerate(case[-1]):
        held = np.arange(max(before + 1 - length, 0), before + 1)
        place = held % length
        expected = softmax_oracle(
            q[b, 0],
            keys[1, b][:, place],
            values[1, b][:, place],
            before,
            held,
            scores,
        )
        # Scores are sums of `dim` products: each of their roundings moves a weight by as much, relatively.
        products = np.abs(q[b, 0]).sum(-1).max() * np.abs(keys).max()
        bound = (16 + products * scores.scale) * np.finfo(np.float32).eps * np.abs(values).max()
        rounding = float(jnp.finfo(dtype).eps) * np.abs(expected) + float(jnp.finfo(dtype).tiny)
        assert np.all(np.abs(out[b, 0] - expected) <= bound + rounding)


def test_scores_far_below_the_largest_weigh_nothing():
    """Their exponentials are below what float32 holds."""
    (q, k, v), buffers, past, counts, capacity = inputs(CASES[0], jnp.float32)
    scores = Scores(scale=40.0)
    with use_backend("native"):
        out, (keys, values) = compiled((q, k, v), buffers, past, counts, capacity, scores)
    held = np.arange(past[0] + 1)
    q, keys, values = (np.asarray(array) for array in (q, keys, values))
    expected = softmax_oracle(q[0, 0], keys[1, 0][:, held], values[1, 0][:, held], held[-1], held, scores)
    np.testing.assert_allclose(out[0, 0], expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("name", _native.load().usable_kernels if _native.load() else [])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_instruction_set_computes_the_same(case, name):
    new, buffers, past, counts, capacity = inputs(case, jnp.bfloat16)
    # Without a result's rounding to bfloat16, in which neighbours differ by far more than sums do.
    new, buffers = jax.tree.map(lambda x: np.asarray(x, np.float32), (new, buffers))
    scores = Scores(scale=0.1, cap=4.0)
    with use_backend("reference"):
        expected, _ = compiled(new, buffers, past, counts, capacity, scores)
    with use_backend("native"), _native.load().use_kernels(name):
        out = np.asarray(compiled(new, buffers, past, counts, capacity, scores)[0])
    products = np.abs(np.asarray(new[0])).sum(-1).max() * np.abs(np.asarray(buffers[0])).max()
    bound = (16 + products * scores.scale) * np.finfo(np.float32).eps * np.abs(np.asarray(buffers[1])).max()
    np.testing.assert_allclose(out, expected, rtol=0, atol=2 * bound)


def test_it_lowers_to_the_kernel_on_cpus_alone_and_the_reference_to_none():
    new, buffers, past, counts, capacity = inputs(CASES[0], jnp.float32)
    scores = Scores(scale=1.0)

    def lowered(platform):
        traced = compiled.trace(new, buffers, past, counts, capacity, scores)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert _native.ATTEND in lowered("cpu")
    assert _native.ATTEND not in lowered("cuda")
    with use_backend("reference"):
        assert _native.ATTEND not in lowered("cpu")


def test_derivatives_and_vmap_agree_with_the_reference():
    new, buffers, past, counts, capacity = inputs(CASES[1], jnp.float32)
    scores = Scores(scale=0.3, cap=5.0)

    def loss(new, buffers):
        return jnp.sum(run(new, buffers, past, counts, capacity, scores)[0] ** 2)

    @jax.jit
    def both(new, buffers):
        mapped = jax.vmap(
            lambda scale: run(
                jax.tree.map(lambda x: x * scale, new), buffers, past, counts, capacity, scores
            )[0]
        )
        return jax.grad(loss, (0, 1))(new, buffers), mapped(jnp.array([0.5, 1.0, 2.0]))

    with use_backend("reference"):
        expected = both(new, buffers)
    with use_backend("native"):
        found = both(new, buffers)
    # Gradients pass the kernel's own output on, which differs by roundings.
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_hostile_positions_lengths_and_layers_stay_inside_the_cache():
    new, buffers, _, _, capacity = inputs(CASES[1], jnp.float32)
    hostile = jax.jit(run, static_argnums=(4, 5))
    with use_backend("native"):
        for index in (-5, 99):
            for past in ([-(2**31), 2**31 - 2, -1], [10**9, -7, 2**31 - 1]):
                counts = jnp.asarray([0, 1, -3], jnp.int32)
                past = jnp.asarray(past, jnp.int32)
                out, _ = hostile(new, buffers, past, counts, capacity, Scores(scale=1.0), index)
                assert out.shape == (3, 1, 64)
                assert np.isfinite(out).all()


def test_a_key_that_is_no_number_shows_in_the_result():
    (q, k, v), buffers, past, counts, capacity = inputs(CASES[0], jnp.float32)
    with use_backend("native"):
        out, _ = compiled(
            (q, k.at[0, 0, 1].set(jnp.nan), v), buffers, past, counts, capacity, Scores(scale=1.0)
        )
    heads = np.isnan(np.asarray(out).reshape(9, 64)).all(axis=1)
    assert heads.tolist() == [False] * 3 + [True] * 3 + [False] * 3
