"""Sampling: by hand, against sorting in NumPy, and statistically."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from upg_jax.inference import Sampling, sample
from upg_jax.inference._sampling import filtered

draw = jax.jit(sample)
keep = jax.jit(filtered)


def positions(batch, start=0):
    return jnp.arange(start, start + batch, dtype=jnp.int32)


def padded(logits, vocabulary):
    """The same rows with further tokens that are never drawn, so that rows of any length share a program."""
    further = np.full((len(logits), vocabulary - np.shape(logits)[1]), -np.inf)
    return np.concatenate([logits, further], axis=1).astype(np.float32)


def kept(logits, vocabulary=None, **settings):
    """Which tokens of one row of logits may be drawn."""
    sampling = Sampling.create(1, **{"temperature": 1.0, "seed": 0, **settings})
    scores = keep(padded([logits], vocabulary or len(logits)), sampling)
    return np.flatnonzero(np.isfinite(scores[0])).tolist()


def test_greedy_takes_the_likeliest_and_the_first_of_equals():
    logits = jnp.asarray([[1.0, 3.0, 2.0], [5.0, 5.0, 1.0], [-1.0, -2.0, -jnp.inf]])
    tokens = draw(logits, Sampling.create(3), positions(3))
    assert tokens.dtype == jnp.int32
    np.testing.assert_array_equal(tokens, [1, 0, 0])


# Probabilities 0.5, 0.25, 0.125, 0.125.
HALVES = np.log([0.125, 0.5, 0.125, 0.25])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 1}, [1]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 3}, [0, 1, 2, 3]),  # what ties with the last is kept, too
        ({"top_k": 100}, [0, 1, 2, 3]),
        ({"top_p": 1.0}, [0, 1, 2, 3]),
        ({"top_p": 1e-9}, [1]),
        ({"top_p": 0.4}, [1]),
        ({"top_p": 0.6}, [1, 3]),
        ({"top_p": 0.74}, [1, 3]),
        ({"top_p": 0.76}, [0, 1, 2, 3]),
        # Top-k first: the two left have probabilities 2/3 and 1/3.
        ({"top_k": 2, "top_p": 0.6}, [1]),
        ({"top_k": 2, "top_p": 0.7}, [1, 3]),
        ({"min_p": 0.0}, [0, 1, 2, 3]),
        ({"min_p": 0.2}, [0, 1, 2, 3]),
        ({"min_p": 0.3}, [1, 3]),
        ({"min_p": 1.0}, [1]),
        # Temperature first: at 2 the probabilities are about 0.37, 0.26, 0.18, 0.18; at 0.5 about 0.73, 0.18, ...
        ({"temperature": 2.0, "top_p": 0.4}, [1, 3]),
        ({"temperature": 0.5, "top_p": 0.7}, [1]),
    ],
)
def test_what_top_k_and_top_p_keep(settings, expected):
    assert kept(HALVES, **settings) == expected


@pytest.mark.parametrize("seed", range(5))
def test_filters_keep_what_sorting_keeps(seed):
    rng = np.random.default_rng(seed)
    vocabulary = int(rng.integers(2, 3000))
    logits = (rng.normal(size=vocabulary) * rng.choice([0.1, 1.0, 10.0])).astype(np.float32)
    if seed == 0:
        logits[::3] = -np.inf
    top_k, top_p = int(rng.integers(1, vocabulary)), float(rng.uniform(0.05, 0.99))
    order = np.argsort(-logits, kind="stable")
    by_k = order[:top_k]
    chosen = kept(logits, 3000, top_k=top_k)
    assert set(by_k[np.isfinite(logits[by_k])]) <= set(chosen)
    assert len(chosen) <= top_k
    probability = np.exp(logits[order].astype(np.float64) - logits.max())
    reached = np.cumsum(probability / probability.sum())
    chosen = kept(logits, 3000, top_p=top_p)
    count = len(chosen)
    assert set(order[:count]) == set(chosen)
    # The fewest that reach top_p, up to the rounding of float32 sums.
    slack = 1e-5
    assert reached[count - 1] >= top_p - slack
    assert count == 1 or reached[count - 2] < top_p + slack


def test_filters_keep_what_transformers_keeps():
    transformers = pytest.importorskip("transformers", reason='pip install "upg-jax[oracle]"')
    torch = pytest.importorskip("torch", reason='pip install "upg-jax[oracle]"')
    logits = np.random.default_rng(0).normal(size=(1, 500)).astype(np.float32) * 3
    for temperature, top_k, top_p, min_p in [
        (0.7, 40, 0.9, 0.0),
        (1.3, 200, 0.5, 0.1),
        (1.0, 3, 0.99, 0.01),
        (1.5, 500, 1.0, 0.02),
    ]:
        scores = torch.tensor(logits)
        for warp in (
            transformers.TemperatureLogitsWarper(temperature),
            transformers.TopKLogitsWarper(top_k),
            transformers.TopPLogitsWarper(top_p),
            transformers.MinPLogitsWarper(min_p),
        ):
            scores = warp(None, scores)
        expected = np.flatnonzero(np.isfinite(scores.numpy()[0])).tolist()
        settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        assert kept(logits[0], 3000, **settings) == expected


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (2.0, 3)])
def test_draws_follow_the_distribution(temperature, top_k):
    logits = np.array([0.3, -1.0, 1.2, 0.0, -3.0, 0.9])
    scaled = np.exp(logits / temperature)
    if top_k is not None:
        scaled[np.argsort(-logits)[top_k:]] = 0
    probability = scaled / scaled.sum()
    draws = 20_000
    sampling = Sampling.create(draws, temperature=temperature, top_k=top_k, seed=[7] * draws)
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (draws, 6))
    counts = np.bincount(draw(rows, sampling, positions(draws)), minlength=6)
    # Six standard deviations of a binomial count.
    assert np.all(
        np.abs(counts - draws * probability) <= 6 * np.sqrt(draws * probability * (1 - probability))
    )
    assert np.all(counts[probability == 0] == 0)


@pytest.mark.parametrize("vocabulary", [1, 2, 127, 128, 129, 1000])
def test_draws_invert_the_cumulative_distribution_and_equals_go_to_the_first(vocabulary):
    draws = 200
    logits = np.random.default_rng(vocabulary).integers(-3, 4, (draws, vocabulary)).astype(np.float32)
    assert draw(logits, Sampling.create(draws), positions(draws)).tolist() == logits.argmax(axis=1).tolist()

    sampling = Sampling.create(draws, temperature=0.7, top_k=vocabulary // 2 or None, seed=1)
    scores = np.asarray(keep(padded(logits, 1000), sampling), np.float64)[:, :vocabulary]
    ends = np.cumsum(np.exp(scores), axis=1) / np.exp(scores).sum(axis=1, keepdims=True)
    keys = jax.random.wrap_key_data(jnp.asarray(sampling.key))
    uniform = jax.vmap(lambda key, at: jax.random.uniform(jax.random.fold_in(key, at)))
    u = np.asarray(uniform(keys, positions(draws)))
    drawn = np.asarray(draw(logits, sampling, positions(draws)))
    rows = np.arange(draws)
    assert np.isfinite(scores[rows, drawn]).all()
    # Sums of positive terms, each with a relative rounding of 2**-24, in the function's order and in this one.
    rounding = 2 * vocabulary * 2.0**-24
    assert np.all(u < ends[rows, drawn] + rounding)
    assert np.all(u >= np.where(drawn > 0, ends[rows, drawn - 1], 0.0) - rounding)


def test_a_row_that_keeps_all_does_so_beside_one_that_does_not():
    # Rounded, the sum of the many reaches 1 before the unlikely ones are counted.
    logits = jnp.concatenate([jnp.zeros(40_000), jnp.full(500, -12.0)])
    rows = dataclasses.replace(Sampling.create(2, temperature=1.0), top_p=np.array([1.0, 0.5], np.float32))
    scores = keep(jnp.stack([logits, logits]), rows)
    assert np.isfinite(scores[0]).all()
    assert not np.isfinite(scores[1]).all()


def test_neighbouring_seeds_and_positions_are_independent():
    logits = jnp.zeros((2000, 2))
    by_seed = np.asarray(
        draw(logits, Sampling.create(2000, temperature=1.0, seed=0), jnp.zeros(2000, jnp.int32))
    )
    by_position = np.asarray(
        draw(logits, Sampling.create(2000, temperature=1.0, seed=[0] * 2000), positions(2000))
    )
    for bits in (by_seed, by_position, by_seed[1:] ^ by_seed[:-1], by_position[1:] ^ by_position[:-1]):
        assert abs(bits.mean() - 0.5) < 6 * 0.5 / np.sqrt(len(bits))


def test_a_row_draws_the_same_whatever_else_is_in_the_batch():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(4, 300)), jnp.float32)
    mixed = dataclasses.replace(
        Sampling.create(4),
        temperature=np.array([0.0, 1.5, 0.7, 1.0], np.float32),
        top_k=np.array([0, 50, 0, 5], np.int32),
        top_p=np.array([1.0, 1.0, 0.8, 0.5], np.float32),
        min_p=np.array([0.5, 0.0, 0.01, 0.0], np.float32),
        key=np.array([[0, 1], [0, 2], [3, 4], [0, 2]], np.uint32),
    )
    at = jnp.array([3, 900, 4, 1], jnp.int32)
    together = draw(logits, mixed, at)
    assert together[0] == jnp.argmax(logits[0])
    for row in range(4):
        alone = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], mixed)
        assert draw(logits[row : row + 1], alone, at[row : row + 1])[0] == together[row]


def test_seeds_reproduce_and_differ():
    logits = jnp.zeros((1, 1 << 16))

    def token(seed):
        return int(draw(logits, Sampling.create(1, temperature=1.0, seed=seed), positions(1))[0])

    seeds = [0, 1, 2**32, 2**32 + 1, 2**63, -1]
    assert [token(s) for s in seeds] == [token(s) for s in seeds]
    assert len({token(s) for s in seeds}) == len(seeds)
    assert token(None) != token(None)


def test_a_tiny_temperature_is_greedy_and_does_not_overflow():
    logits = jnp.asarray([[1e4, 2e4, -3e4, 1.9e4]])
    assert draw(logits, Sampling.create(1, temperature=1e-30, seed=0), positions(1))[0] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature must be finite and at least 0; got -0.1"),
        ({"temperature": float("nan")}, "temperature must be finite and at least 0; got nan"),
        ({"temperature": float("inf")}, "temperature must be finite and at least 0; got inf"),
        ({"top_k": 0}, "top_k must be an integer of at least 1"),
        ({"min_p": 1.1}, r"min_p must be in \[0, 1\]; got 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be finite and above 0; got 0.0"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty must be a finite number; got nan"),
        ({"presence_penalty": "1"}, "presence_penalty must be a finite number; got '1'"),
        ({"logit_bias": {1: float("inf")}}, "logit_bias must be finite numbers by token id"),
        ({"logit_bias": {"1": 1.0}}, "logit_bias must be finite numbers by token id"),
        ({"logprobs": 21}, r"logprobs must be in \[0, 20\]; got 21"),
        ({"stop": ["a", ""]}, "stop must be texts of at least one character"),
        ({"stop": 5}, "stop must be texts of at least one character; got 5"),
        ({"stop": None}, "stop must be texts of at least one character; got None"),
        ({"temperature": True}, "temperature must be finite and at least 0; got True"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]; got 0.0"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\]; got 1.1"),
        ({"top_p": float("nan")}, r"top_p must be in \(0, 1\]; got nan"),
        ({"seed": [1, 2, 3]}, "seed must be one integer, or one for each of 2 rows"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling.create(2, **settings)


def test_settings_are_arrays_so_that_none_recompiles():
    draw = jax.jit(lambda *args: sample(*args))  # with a cache of its own
    logits = jnp.zeros((2, 50))
    for settings in ({}, {"temperature": 0.5, "seed": 3}, {"temperature": 2.0, "top_k": 3, "top_p": 0.4}):
        draw(logits, Sampling.create(2, **settings), positions(2))
    assert draw._cache_size() == 1
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(Sampling.create(2)))


def test_numpy_integers_are_seeds_like_any_other():
    for seed in (np.int64(3), [np.int64(3), 4]):
        np.testing.assert_array_equal(Sampling.create(2, seed=seed).key, Sampling.create(2, seed=3).key)


def test_a_top_p_below_the_smallest_float_keeps_the_likeliest_token():
    logits = jnp.array([[0.0, 3.0, 1.0, -1.0]])
    sampling = Sampling.create(1, temperature=1.0, top_p=1e-50, seed=0)
    assert int(draw(logits, sampling, positions(1))[0]) == 1


def test_a_fractional_top_k_is_refused():
    with pytest.raises(ValueError, match="top_k must be an integer"):
        Sampling.create(1, top_k=2.5)
