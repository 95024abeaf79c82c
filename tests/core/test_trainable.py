"""`TrainableMdCSR`: products and derivatives against the dense formula, and the way there and back."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.bounds import EPS, assert_within_bound, exact
from helpers.layers import Case, each_case, gaps_matrix, stacked

from upg_jax import EncodingError, MdCSR, TrainableMdCSR, combine, partition, stack

CASE = Case("random", (33, 67))


def trainable(case: Case, **settings) -> TrainableMdCSR:
    return TrainableMdCSR.from_layer(case.layer, **settings)


def dense(layer: TrainableMdCSR) -> np.ndarray:
    """The matrix from positions alone, in NumPy."""
    tiles, _ = layer.weights.shape
    height = -(-layer.shape[0] // tiles)
    w = np.zeros((tiles, height * layer.shape[1]))
    for tile, at, weights in zip(w, np.asarray(layer.positions), exact(layer.weights), strict=True):
        inside = at < tile.size
        assert not weights[~inside].any()
        tile[at[inside]] = weights[inside]
    return w.reshape(-1, layer.shape[1])[: layer.shape[0]]


def gradient_matrix(layer: TrainableMdCSR, gradient: jax.Array) -> np.ndarray:
    return dense(dataclasses.replace(layer, weights=gradient))


def with_weights(layer: TrainableMdCSR, weights) -> TrainableMdCSR:
    return dataclasses.replace(layer, weights=weights)


def random_direction(layer: TrainableMdCSR, rng) -> jax.Array:
    """Of the weights; padding stays 0."""
    step = rng.standard_normal(layer.weights.shape) * (np.asarray(layer.weights) != 0)
    return jnp.asarray(step, jnp.float32)


def assert_same_bits(a: MdCSR, b: MdCSR) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


@each_case
def test_product_is_that_of_the_decoded_matrix(case):
    layer, x = trainable(case), case.x(2, 3)
    np.testing.assert_array_equal(dense(layer), exact(case.layer.to_dense(jnp.float32)))
    np.testing.assert_array_equal(exact(layer.to_dense()), dense(layer))
    y = jax.jit(lambda layer, x: layer(x))(layer, x)
    assert_within_bound(y, lambda x, w: x @ w.T, x, dense(layer), terms=case.terms, dtype=case.dtype)


@each_case
def test_vjp_of_input_weights_and_bias(case):
    layer, x, ct = trainable(case), case.x(5), case.cotangent(5, salt=1)
    bias = case.cotangent()

    def pull(weights, x, bias, ct):
        return jax.vjp(lambda w, x, b: with_weights(layer, w)(x, b), weights, x, bias)[1](ct)

    w_bar, x_bar, bias_bar = jax.jit(pull)(layer.weights, x, bias, ct)
    assert_within_bound(x_bar, lambda g, w: g @ w, ct, dense(layer), terms=case.terms, dtype=case.dtype)
    assert_within_bound(bias_bar, lambda g: g.sum(0), ct, terms=case.terms, dtype=case.dtype)
    kept = dense(layer) != 0
    found = gradient_matrix(layer, w_bar)
    assert not found[~kept].any()
    assert_within_bound(
        found.astype(np.float32), lambda g, x: np.where(kept, g.T @ x, 0), ct, x, terms=case.terms
    )


def test_gradient_equals_central_differences(rng):
    """The loss is quadratic along a line, so central differences with step 1 are exact but for rounding."""
    layer, x, ct = trainable(CASE), CASE.x(5), exact(CASE.cotangent(5))
    step = random_direction(layer, rng)

    def loss(w):
        return (with_weights(layer, w)(x) ** 2 * jnp.asarray(ct, jnp.float32)).sum()

    slope = (exact(jax.grad(loss)(layer.weights)) * exact(step)).sum()
    ends = [exact(with_weights(layer, layer.weights + sign * step)(x)) for sign in (1, -1)]
    difference = ((ends[0] ** 2 - ends[1] ** 2) * ct).sum() / 2
    magnitude = (
        np.abs(exact(x)) @ np.abs(dense(layer) + 0.0).T
        + np.abs(exact(x)) @ np.abs(gradient_matrix(layer, step)).T
    )
    assert abs(slope - difference) <= 16 * CASE.terms * EPS * (magnitude**2 * np.abs(ct)).sum()
    assert abs(slope) > 1


def test_forward_mode_and_second_derivatives_agree_with_the_dense_formula(rng):
    layer, x = trainable(CASE), CASE.x(4)
    flat = layer.to_dense()
    direction = random_direction(layer, rng)
    direction_dense = with_weights(layer, direction).to_dense()

    def loss(w, x):
        return (with_weights(layer, w)(x) ** 4).sum()

    def dense_loss(w, x):
        return (jnp.matmul(x, w.T, precision="highest") ** 4).sum()

    def hessian_product(f, w, x, d):
        return jax.jvp(jax.grad(f, (0, 1)), (w, x), (d, jnp.ones_like(x)))[1]

    found_w, found_x = jax.jit(lambda: hessian_product(loss, layer.weights, x, direction))()
    wanted_w, wanted_x = jax.jit(lambda: hessian_product(dense_loss, flat, x, direction_dense))()
    wanted_w = np.where(exact(flat) != 0, wanted_w, 0)
    np.testing.assert_allclose(
        gradient_matrix(layer, found_w), wanted_w, rtol=1e-4, atol=1e-4 * np.abs(wanted_w).max()
    )
    np.testing.assert_allclose(found_x, wanted_x, rtol=1e-4, atol=1e-4 * float(jnp.abs(wanted_x).max()))


def test_vmap_over_examples_and_over_a_stack_equals_a_loop():
    layers = [trainable(Case("random", (33, 67), seed=seed)) for seed in range(3)]
    both, x = TrainableMdCSR.stack(layers), CASE.x(3, 5)

    @jax.jit
    def apply(layer, x):
        return layer(x)

    def loss(weights, layer, x):
        return (with_weights(layer, weights)(x) ** 2).sum()

    gradient = jax.jit(jax.grad(loss))

    @jax.jit
    def mapped(first, both, x):
        return (
            jax.vmap(apply, (None, 0))(first, x),
            jax.vmap(apply)(both, x),
            jax.vmap(jax.grad(loss))(both.weights, both, x),
            jax.grad(lambda w: jax.vmap(loss, (0, 0, 0))(w, both, x).sum())(both.weights),
            jax.vmap(jax.grad(loss), (None, None, 0))(first.weights, first, x),
        )

    over_x, over_layers, gradients, of_sum, per_example = map(np.asarray, mapped(layers[0], both, x))
    np.testing.assert_allclose(over_x, apply(layers[0], x), rtol=1e-5, atol=1e-5)
    for i, layer in enumerate(layers):
        width = layer.weights.shape[-1]
        np.testing.assert_allclose(over_layers[i], apply(layer, x[i]), rtol=1e-5, atol=1e-5)
        expected = gradient(layer.weights, layer, x[i])
        for found in (gradients, of_sum):
            np.testing.assert_allclose(found[i, :, :width], expected, rtol=1e-4, atol=1e-4)
            assert not np.any(found[i, :, width:])
        expected = gradient(layers[0].weights, layers[0], x[i])
        np.testing.assert_allclose(per_example[i], expected, rtol=1e-4, atol=1e-4)


def test_scan_over_a_stack_equals_a_loop_with_its_gradients():
    square = [trainable(Case("random", (33, 33), seed=seed)) for seed in range(3)]
    both, x = TrainableMdCSR.stack(square), Case("random", (33, 33)).x(5)
    weights, pattern = partition(both)

    def scanned(weights):
        out, _ = jax.lax.scan(lambda x, layer: (jnp.tanh(layer(x)), None), x, combine(weights, pattern))
        return out.sum()

    def looped(all_weights):
        y = x
        for layer, w in zip(square, all_weights, strict=True):
            y = jnp.tanh(with_weights(layer, w)(y))
        return y.sum()

    value, gradient = jax.jit(jax.value_and_grad(scanned))(weights)
    expected, gradients = jax.jit(jax.value_and_grad(looped))([layer.weights for layer in square])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for i, wanted in enumerate(gradients):
        np.testing.assert_allclose(gradient.weights[i, :, : wanted.shape[-1]], wanted, rtol=1e-4, atol=1e-4)


def test_weights_are_the_only_leaf_that_is_trained():
    weights, pattern = partition(trainable(CASE))
    assert [leaf.dtype for leaf in jax.tree.leaves(weights)] == [jnp.float32]
    assert all(not jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in jax.tree.leaves(pattern))


def test_the_gradient_is_never_dense_beyond_a_tile():
    layer = trainable(Case("random", (128, 96)))
    x = jnp.ones((8, 96))

    def weights_gradient(weights, ct):
        return jax.vjp(lambda w: with_weights(layer, w)(x), weights)[1](ct)[0]

    text = jax.jit(weights_gradient).lower(layer.weights, jnp.ones((8, 128))).compile().as_text()
    tile = -(-layer.shape[0] // layer.weights.shape[0])
    assert f"f32[{tile},96]" in text
    for whole in ("f32[128,96]", f"f32[{128 * 96}]", f"f32[{layer.weights.shape[0]},{tile},96]"):
        assert whole not in text


@pytest.mark.parametrize("factor", ["float32", "bfloat16"])
def test_precision_rounds_the_factors_and_sums_in_float32(factor):
    layer, x, ct = trainable(CASE, precision=factor), CASE.x(5), CASE.cotangent(5)
    rounded = [exact(jnp.asarray(a, factor)) for a in (x, ct, dense(layer).astype(np.float32))]
    y, pull = jax.vjp(lambda w, x: with_weights(layer, w)(x), layer.weights, x)
    w_bar, x_bar = pull(ct)
    assert_within_bound(y, lambda x, w: x @ w.T, rounded[0], rounded[2], terms=CASE.terms, dtype="float32")
    assert_within_bound(x_bar, lambda g, w: g @ w, rounded[1], rounded[2], terms=CASE.terms, dtype="float32")
    kept = dense(layer) != 0
    found = gradient_matrix(layer, w_bar).astype(np.float32)
    assert_within_bound(
        found, lambda g, x: np.where(kept, g.T @ x, 0), rounded[1], rounded[0], terms=CASE.terms
    )


def test_bfloat16_weights_keep_their_dtype_through_a_gradient():
    layer = trainable(CASE, dtype="bfloat16")
    assert layer.weights.dtype == jnp.bfloat16
    gradient = jax.grad(lambda w: with_weights(layer, w)(CASE.x(5)).sum())(layer.weights)
    assert gradient.dtype == jnp.bfloat16


@each_case
def test_an_untouched_layer_comes_back_bit_for_bit(case):
    assert_same_bits(trainable(case).to_mdcsr(), case.layer)


@pytest.mark.parametrize("manifold", ["unit", "prime"])
def test_long_gaps_come_back_bit_for_bit(manifold):
    layer = MdCSR.from_dense(gaps_matrix(), manifold=manifold)
    assert_same_bits(TrainableMdCSR.from_layer(layer).to_mdcsr(), layer)


def test_scales_that_are_not_the_encoders_come_back():
    """As of SparseGPT, whose scale was chosen before the weights were."""
    layer = dataclasses.replace(CASE.layer, scales=CASE.layer.scales * jnp.float32(1.37))
    layer = dataclasses.replace(layer, values=jnp.where(jnp.abs(layer.values) > 100, 90, layer.values))
    assert_same_bits(TrainableMdCSR.from_layer(layer).to_mdcsr(), layer)


def test_a_stack_comes_back():
    cases = [Case("random", (33, 67), seed=seed) for seed in range(3)]
    layer = stacked(*cases)
    assert_same_bits(TrainableMdCSR.from_layer(layer).to_mdcsr(), stack([case.layer for case in cases]))


@pytest.mark.parametrize("manifold", ["unit", "prime"])
@pytest.mark.parametrize("index", ["delta8", "mask", "dense"])
def test_trained_weights_are_encoded_as_from_dense_would(manifold, index, rng):
    layer = trainable(CASE)
    weights = layer.weights * jnp.asarray(rng.uniform(0.9, 1.1, layer.weights.shape), jnp.float32)
    trained = with_weights(layer, weights)
    expected = MdCSR.from_dense(
        np.asarray(trained.to_dense()), mask=dense(layer) != 0, manifold=manifold, index=index
    )
    assert_same_bits(trained.to_mdcsr(manifold=manifold, index=index), expected)


NARROW = [
    Case("random", (33, 67), index=index, value_bits=bits, row_alignment=8)
    for index, bits in [("mask", 4), ("dense", 3), ("delta8", 8)]
]


def steps_of(layer: TrainableMdCSR) -> np.ndarray:
    """Scale times multiplier at every position of the matrix, in NumPy."""
    scales = np.asarray(layer.scale_bits).view(np.float32).astype(np.float64)[:, None]
    if layer.group_size is None:
        return np.broadcast_to(scales, layer.shape)
    multipliers = np.asarray(layer.group_scales).reshape(layer.shape[0], -1).astype(np.float64)
    return (scales * multipliers).repeat(layer.group_size, axis=1)[:, : layer.shape[1]]


@pytest.mark.parametrize("case", NARROW, ids=str)
def test_rounded_weights_are_the_nearest_and_come_back_from_the_layer(case, rng):
    layer = trainable(case)
    moved = layer.weights * rng.uniform(0.5, 1.3, layer.weights.shape).astype(np.float32)
    moved = with_weights(layer, moved)
    rounded = jax.jit(TrainableMdCSR.rounded)(moved)
    w, held, steps = dense(moved), dense(rounded), steps_of(layer)
    largest = (1 << (case.value_bits - 1)) - 1
    q = np.divide(held, steps, out=np.zeros(w.shape), where=steps > 0)
    assert np.abs(q).max() <= largest * (1 + EPS)
    np.testing.assert_allclose(q, np.rint(q), atol=4 * EPS * largest)
    inside = np.abs(w) < largest * steps
    assert 0 < inside.sum() < np.count_nonzero(w) + (w == 0).sum()
    assert (np.abs(w - held) <= steps * (0.5 + 4 * EPS * largest))[inside].all()
    back = rounded.to_mdcsr()
    np.testing.assert_array_equal(exact(back.to_dense(jnp.float32)), held)
    np.testing.assert_array_equal(back.scales, case.layer.scales)


@pytest.mark.parametrize("case", NARROW, ids=str)
def test_gradients_pass_through_the_rounding_but_not_where_weights_are_clipped(case, rng):
    layer = trainable(case)
    moved = layer.weights * rng.uniform(0.5, 1.3, layer.weights.shape).astype(np.float32)
    ct = random_direction(layer, rng)

    @jax.jit
    def pull(weights, ct):
        return jax.vjp(lambda w: with_weights(layer, w).rounded().weights, weights)[1](ct)[0]

    largest = (1 << (case.value_bits - 1)) - 1
    found, given = (gradient_matrix(layer, g) for g in (pull(moved, ct), ct))
    ratio = np.abs(dense(with_weights(layer, moved))) / (
        largest * np.where(steps_of(layer) > 0, steps_of(layer), 1)
    )
    np.testing.assert_array_equal(found[ratio < 1 - EPS], given[ratio < 1 - EPS])
    assert not found[ratio > 1 + EPS].any()
    assert (ratio > 1 + EPS).any()


def test_weights_without_one_step_are_not_rounded():
    with pytest.raises(ValueError, match="unit manifold and no stack; got the prime manifold"):
        trainable(Case("random", (33, 67), "prime")).rounded()
    layer = trainable(CASE)
    with pytest.raises(ValueError, match=r"no stack; got the unit manifold and weights \(2, "):
        TrainableMdCSR.stack([layer, layer]).rounded()


def test_only_changed_rows_get_a_new_scale():
    layer = trainable(CASE)
    changed = layer.weights.at[0, 0].multiply(1.7)  # the first entry of row 0
    back = with_weights(layer, changed).to_mdcsr()
    assert back.scales[0] != CASE.layer.scales[0]
    np.testing.assert_array_equal(back.scales[1:], CASE.layer.scales[1:])


def test_weights_that_are_not_finite_are_refused_by_row():
    layer = trainable(CASE)
    first_of_second_tile = layer.weights.at[1, 0].set(jnp.nan)
    with pytest.raises(EncodingError, match="row 17 has one that is not"):
        with_weights(layer, first_of_second_tile).to_mdcsr()


def test_wrong_inputs_are_refused():
    layer = trainable(CASE)
    with pytest.raises(ValueError, match="in_features=67"):
        layer(jnp.ones((2, 66)))
    with pytest.raises(ValueError, match="no stack"):
        TrainableMdCSR.stack([layer, layer])(jnp.ones((2, 67)))
    with pytest.raises(ValueError, match="float32 or bfloat16; got float16"):
        trainable(CASE, dtype="float16")
    with pytest.raises(ValueError, match="equal metadata"):
        TrainableMdCSR.stack([layer, trainable(Case("random", (67, 33)))])


def test_large_layers_have_several_tiles(rng):
    w = rng.standard_normal((1 << 12, 1 << 9)).astype(np.float32)
    layer = TrainableMdCSR.from_layer(MdCSR.from_dense(w, density=0.1))
    assert layer.weights.shape[0] == 2
    wide = TrainableMdCSR.from_layer(MdCSR.from_dense(w.reshape(1 << 8, -1), density=0.1))
    assert wide.weights.shape[0] == 2
    assert wide.nnz == round(0.1 * w.size) or wide.nnz < w.size * 0.1
    big = TrainableMdCSR.from_layer(MdCSR.from_dense(np.tile(w, (2, 1)), density=0.1))
    assert big.weights.shape[0] == 4
    np.testing.assert_array_equal(dense(big), exact(big.to_dense()))
