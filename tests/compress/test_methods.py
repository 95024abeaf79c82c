"""Pruning methods against their definitions, written down with NumPy and without the library."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from upg_jax import EncodingError
from upg_jax.compress import Encoding, Settings, prune_mask, sparsegpt
from upg_jax.compress._hessian import factor
from upg_jax.compress._methods import compress_matrix
from upg_jax.compress._selection import keep_largest
from upg_jax.compress._statistics import Inputs, gram, square_sums


def correlated(rng, samples, features):
    """Inputs whose features say something of each other, some far larger than others."""
    shared = rng.normal(size=(samples, -(-features // 2))) @ rng.normal(size=(-(-features // 2), features))
    x = shared / np.sqrt(features / 2) + 0.3 * rng.normal(size=(samples, features))
    return (x * np.exp(rng.normal(size=features))).astype(np.float32)


def brain_surgeon(w, hessian, counts_of, scales=None):
    """Optimal Brain Surgeon, a column after the other, with the inverse Hessian updated in float64.

    `counts_of(first, last)` says how many to keep of the columns of a group, of each row if it is an integer and of all
    rows if it is a tuple of one, and None where no group begins.
    """
    w = w.astype(np.float64)
    columns = w.shape[1]
    dead = np.diag(hessian) == 0
    hessian = hessian + np.diag(0.01 * np.mean(np.diag(hessian)) + dead)
    inverse = np.linalg.inv(hessian)
    mask = np.zeros(w.shape, bool)
    for j in range(columns):
        if (group := counts_of(j)) is not None:
            last, keep = group
            # The cost of each removal, once the columns before it in the group are settled.
            reached = np.diag(np.linalg.cholesky(inverse[j:last, j:last]))
            cost = (w[:, j:last] / reached) ** 2
            whole = isinstance(keep, tuple)
            cost = cost.reshape(1, -1) if whole else cost
            best = np.argsort(-cost, axis=1, kind="stable")[:, : keep[0] if whole else keep]
            chosen = np.zeros(cost.shape, bool)
            np.put_along_axis(chosen, best, True, axis=1)
            mask[:, j:last] = chosen.reshape(w.shape[0], -1)
        settled = np.where(mask[:, j], w[:, j], 0)
        if scales is not None:
            settled = np.clip(np.rint(settled / scales), -127, 127) * scales
        error = (w[:, j] - settled) / inverse[j, j]
        w[:, j + 1 :] -= error[:, None] * inverse[j, j + 1 :]
        w[:, j] = settled
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return w, mask


def counts(pattern, density, rows, columns, group=128):
    def of_group(j):
        if pattern == "2:4":
            return (j + 4, 2) if j % 4 == 0 else None
        if j % group:
            return None
        last = min(j + group, columns)
        if pattern == "row":
            return last, round(density * last) - round(density * j)
        return last, (round(density * rows * last) - round(density * rows * j),)

    return of_group


@pytest.mark.parametrize("pattern", ["row", "layer", "2:4"])
@pytest.mark.parametrize(("quantized", "columns"), [(False, 128), (True, 200)])
def test_sparsegpt_is_optimal_brain_surgeon_column_by_column(rng, columns, pattern, quantized):
    rows, density = 12, 0.5
    x = correlated(rng, 600, columns)
    x[:, 5] = 0  # a feature that is never seen
    w = rng.normal(size=(rows, columns)).astype(np.float32)
    scales = (np.abs(w).max(axis=1) / 127).astype(np.float32) if quantized else None
    hessian = (x.astype(np.float64).T @ x).astype(np.float32)
    got = sparsegpt(w, hessian, density, pattern=pattern, scales=scales)
    expected, mask = brain_surgeon(
        w, hessian.astype(np.float64), counts(pattern, density, rows, columns), scales
    )
    # A cost or a rounding that is nearly a tie may fall the other way in float32, and changes what follows in its row.
    same = (got.mask == mask).all(axis=1)
    if quantized:
        same &= (np.abs(got.weights - expected) < 0.5 * scales[:, None]).all(axis=1)
    assert same.mean() > 0.8
    # The inverse amplifies rounding by the dampened Hessian's condition.
    dampened = hessian + np.diag(0.01 * np.mean(np.diag(hessian)) + (np.diag(hessian) == 0))
    bound = columns * 2.0**-24 * np.linalg.cond(dampened) * np.abs(expected).max()
    np.testing.assert_allclose(got.weights[same], expected[same], rtol=0, atol=bound)
    if quantized:
        np.testing.assert_array_equal(got.weights, got.levels.astype(np.float32) * scales[:, None])
        assert not got.levels[~got.mask].any()


def test_a_hessian_that_cannot_be_factored_is_dampened_more_up_to_its_mean():
    def correlated_by(c):
        return np.array([[1, c], [c, 1]], np.float32)

    for c, dampening in ((1.05, 0.1), (1.5, 1.0)):
        upper = np.asarray(factor(jnp.asarray(correlated_by(c))))
        expected = np.linalg.inv(correlated_by(c) + dampening * np.eye(2))
        np.testing.assert_allclose(upper.T @ upper, expected, rtol=1e-4)
    with pytest.raises(
        EncodingError, match=r"cannot be factored .* more calibration text, or --method wanda"
    ):
        factor(jnp.asarray(correlated_by(3)))


def test_a_hessian_whose_mean_overflows_is_refused_and_makes_no_matrix_of_zeros():
    with pytest.raises(EncodingError, match=r"mean diagonal inf .*cannot be factored in float32"):
        sparsegpt(np.ones((4, 64), np.float32), 1e37 * np.eye(64), 0.5)


def test_sparsegpt_leaves_a_smaller_error_than_wanda_and_wanda_than_magnitude(rng):
    x = correlated(rng, 800, 96)
    w = rng.normal(size=(40, 96)).astype(np.float32)
    norms = np.sqrt((x**2).sum(axis=0))

    def error(pruned):
        return np.linalg.norm(x @ (pruned - w).T)

    magnitude = error(np.where(prune_mask(w, 0.5), w, 0))
    wanda = error(np.where(prune_mask(w, 0.5, "wanda", norms=norms), w, 0))
    surgeon = error(sparsegpt(w, x.T @ x, 0.5).weights)
    assert surgeon < 0.9 * wanda
    assert wanda < 0.9 * magnitude


def test_quantizing_inside_the_loop_beats_quantizing_afterwards(rng):
    x = correlated(rng, 800, 128)
    w = rng.normal(size=(40, 128)).astype(np.float32)
    scales = (np.abs(w).max(axis=1) / 7).astype(np.float32)  # coarse, so that rounding is what counts
    inside = sparsegpt(w, x.T @ x, 0.9, scales=scales)
    after = sparsegpt(w, x.T @ x, 0.9).weights
    after = np.clip(np.rint(after / scales[:, None]), -127, 127) * scales[:, None]
    assert np.linalg.norm(x @ (inside.weights - w).T) < 0.9 * np.linalg.norm(x @ (after - w).T)


@pytest.mark.parametrize(("shape", "density"), [((7, 30), 0.5), ((1, 1), 0.3), ((5, 9), 0.0), ((4, 8), 1.0)])
def test_wanda_keeps_the_largest_products_of_each_row(rng, shape, density):
    w = np.round(rng.normal(size=shape), 1).astype(np.float32)  # many ties
    norms = np.round(np.abs(rng.normal(size=shape[1])), 1).astype(np.float32)
    keep = round(density * shape[1])
    expected = np.zeros(shape, bool)
    best = np.argsort(-np.abs(w) * norms, axis=1, kind="stable")[:, :keep]
    np.put_along_axis(expected, best, True, axis=1)
    got = prune_mask(w, density, "wanda", norms=norms)
    np.testing.assert_array_equal(got, expected, strict=True)


@pytest.mark.parametrize("pattern", ["2:4", "1:3", "4:6"])
def test_every_group_of_m_has_n(rng, pattern):
    n, m = map(int, pattern.split(":"))
    w, x = rng.normal(size=(9, 36)).astype(np.float32), correlated(rng, 100, 36)
    norms = np.sqrt((x**2).sum(axis=0))
    masks = [
        prune_mask(w, n / m, pattern=pattern),
        prune_mask(w, n / m, "wanda", norms=norms, pattern=pattern),
        sparsegpt(w, x.T @ x, n / m, pattern=pattern).mask,
    ]
    for mask in masks:
        assert (mask.reshape(9, -1, m).sum(axis=2) == n).all()


@pytest.mark.parametrize("columns", [36, 300])
def test_density_is_met_exactly_in_every_row_or_in_all(rng, columns):
    w, x = rng.normal(size=(9, columns)).astype(np.float32), correlated(rng, 400, columns)
    for density in (0.0, 0.3, 0.71, 1.0):
        by_row = sparsegpt(w, x.T @ x, density).mask
        assert (by_row.sum(axis=1) == round(density * columns)).all()
        assert sparsegpt(w, x.T @ x, density, pattern="layer").mask.sum() == round(density * w.size)


@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_selection_is_a_stable_sort(rng, count):
    scores = np.abs(np.round(rng.normal(size=(6, 20)), 1)).astype(np.float32)
    scores[0] = 0
    scores[1, 3:] = -np.inf
    scores[2, 0] = np.finfo(np.float32).max
    scores[3, 4] = 1e-42  # subnormal
    expected = np.zeros(scores.shape, bool)
    np.put_along_axis(expected, np.argsort(-scores, axis=1, kind="stable")[:, :count], True, axis=1)
    np.testing.assert_array_equal(keep_largest(scores, np.int32(count)), expected)


@pytest.mark.parametrize("features", [1, 3, 33])
def test_gram_in_bfloat16_is_that_of_rounded_inputs(rng, features):
    batches = [rng.normal(size=(2, 5, features)).astype(np.float32) for _ in range(3)]
    x = np.concatenate(batches).reshape(-1, features)
    rounded = x.astype(jnp.bfloat16).astype(np.float64)
    found = np.asarray(gram(batches, "bfloat16"))
    assert found.dtype == np.float32
    assert (
        np.abs(found - rounded.T @ rounded) <= 30 * 2.0**-24 * (np.abs(rounded).T @ np.abs(rounded))
    ).all()
    assert (np.abs(found - gram(batches)) > 0).any()


@pytest.mark.parametrize("features", [1, 3, 33])
def test_statistics_are_those_of_all_tokens(rng, features):
    batches = [rng.normal(size=(2, 5, features)).astype(np.float32) for _ in range(3)]
    x = np.concatenate(batches).reshape(-1, features).astype(np.float64)
    bound = 30 * 2.0**-24 * (np.abs(x).T @ np.abs(x))
    assert (np.abs(gram(batches) - x.T @ x) <= bound).all()
    assert (np.abs(square_sums(batches) - (x * x).sum(axis=0)) <= np.diag(bound)).all()


@pytest.mark.parametrize("index", ["delta8", "mask", "dense"])
def test_encoded_layer_has_the_mask_and_the_levels_that_sparsegpt_chose(rng, index):
    x = correlated(rng, 300, 64)
    w = rng.normal(size=(10, 64)).astype(np.float32)
    w[3] = 0
    inputs = Inputs([x.reshape(3, 100, 64)])
    settings = Settings(density=0.5, method="sparsegpt")
    layer = compress_matrix(w, Encoding(0.5, "unit", index), settings, inputs)
    scales = (np.abs(w).max(axis=1) / np.float32(127)).astype(np.float32)
    expected = sparsegpt(w, np.asarray(gram([x.reshape(3, 100, 64)])), 0.5, scales=scales)
    np.testing.assert_array_equal(layer.to_dense(), expected.weights)
    np.testing.assert_array_equal(layer.scales, scales)
    layer.validate("full")


def test_what_does_not_fit_is_refused_by_name(rng):
    w = np.ones((4, 6), np.float32)
    with pytest.raises(EncodingError, match="needs a multiple of 4 columns; got 6"):
        prune_mask(w, 0.5, pattern="2:4")
    with pytest.raises(EncodingError, match=r"2:3 keeps a density of 0\.666"):
        Settings(density=0.5, pattern="2:3")
    with pytest.raises(EncodingError, match="'3:2'"):
        Settings(density=0.5, pattern="3:2")
    with pytest.raises(EncodingError, match="needs the norms"):
        prune_mask(w, 0.5, "wanda")
    with pytest.raises(EncodingError, match="call sparsegpt"):
        prune_mask(w, 0.5, "sparsegpt")
    with pytest.raises(EncodingError, match="norms must be finite"):
        prune_mask(w, 0.5, "wanda", norms=np.full(6, np.inf, np.float32))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"w": np.ones(6)}, r"w must be a matrix \(out_features, in_features\); got shape \(6,\)"),
        ({"w": np.ones((4, 6), int)}, "w must be float32, .* got int64"),
        ({"w": np.diag([1, 1, -np.inf, 1, 1, 1])}, "finite in float32; got -inf at row 2, column 2"),
        ({"w": np.full((4, 6), 1e39)}, r"finite in float32; got 1e\+39 at row 0, column 0"),
        ({"hessian": np.eye(5)}, r"hessian must be .* \(6, 6\) for this w; got \(5, 5\)"),
        ({"hessian": np.ones(6)}, r"hessian must be .* got \(6,\)"),
        ({"hessian": np.zeros((6, 6))}, "hessian must be of one calibration input or more; got zeros"),
        ({"hessian": np.full((6, 6), np.nan)}, "Hessian of the calibration inputs must be finite"),
        ({"density": float("nan")}, "density must be in"),
        ({"pattern": "3:2"}, "'3:2'"),
        ({"scales": np.ones(5)}, r"scales must be \(out_features,\), \(4,\) for this w; got \(5,\)"),
        ({"scales": [1, 1, -1, 1]}, r"scales must be finite and at least 0; got -1\.0 at row 2"),
        ({"scales": [1, np.nan, 1, 1]}, "scales must be finite and at least 0; got nan at row 1"),
        ({"value_bits": 5}, "value_bits must be one of .* got 5"),
        ({"value_bits": 4}, "group_size must be one of .* with value_bits 4; got None"),
        ({"value_bits": 4, "group_size": -32}, "group_size must be one of .* got -32"),
        ({"value_bits": 4, "group_size": 64.0}, r"group_size must be one of .* got 64\.0"),
        ({"value_bits": 3, "group_size": 64}, "scales must be given with value_bits 3; got None"),
        ({"group_size": 64}, "group_size is for values of 4 or 3 bits; got 64"),
    ],
)
def test_arguments_of_sparsegpt_that_do_not_fit_are_refused_by_name(changes, said):
    arguments = {"w": np.ones((4, 6)), "hessian": np.eye(6), "density": 0.5} | changes
    with pytest.raises(EncodingError, match=said):
        sparsegpt(**arguments)


@pytest.mark.parametrize("shape", [(8, 0), (0, 8)])
def test_a_matrix_without_weights_stays_one(shape):
    gram_of_it = np.eye(shape[1])
    assert sparsegpt(np.zeros(shape), gram_of_it, 0.5).weights.shape == shape
    narrow = {"scales": np.zeros(shape[0]), "value_bits": 4, "group_size": 32}
    found = sparsegpt(np.zeros(shape), gram_of_it, 0.5, **narrow)
    assert found.mask.shape == found.levels.shape == shape
    assert found.multipliers.shape == (shape[0], -(-shape[1] // 32))
    for method in ("wanda", "sparsegpt"):
        for encoding in (
            Encoding(0.5, "unit"),
            Encoding(0.5, "prime"),
            Encoding(0.5, "unit", value_bits=4, group_size=32),
        ):
            settings, inputs = (
                Settings(density=0.5, method=method),
                Inputs([np.ones((2, 3, shape[1]), np.float32)]),
            )
            layer = compress_matrix(np.zeros(shape, np.float32), encoding, settings, inputs)
            assert layer.shape == shape
            layer.validate("full")
