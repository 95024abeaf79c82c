"""Which tensors are compressed, and how much: rules by name, the first match wins."""

from __future__ import annotations

import numpy as np
import pytest
from small_models import llama

from upg_jax import EncodingError, MdCSR
from upg_jax.compress import METHODS, Rule, Settings, prune_mask

SHAPES = {name: w.shape for name, w in llama.weights().items()}


def densities(*rules, density=0.5, shapes=SHAPES):
    return Settings(density=density, rules=rules).densities(shapes)


def test_by_default_the_linear_layers_are_compressed_and_nothing_else():
    for name, density in densities().items():
        linear = "_proj" in name
        assert density == (0.5 if linear else None), name


def test_matrices_of_norms_and_heads_stay_dense_by_default():
    shapes = {"a.norm.weight": (4, 4), "lm_head.weight": (9, 4), "x.bias": (2, 2), "a.weight": (4, 4)}
    assert densities(shapes=shapes) == {
        "a.norm.weight": None,
        "lm_head.weight": None,
        "x.bias": None,
        "a.weight": 0.5,
    }


def test_first_matching_rule_wins():
    first, second = Rule(r"layers\.0\..*down_proj", 0.9), Rule(r"down_proj", 0.2)
    name = "model.layers.{}.mlp.down_proj.weight"
    for rules, expected in (((first, second), [0.9, 0.2]), ((second, first), [0.2, 0.2])):
        found = densities(*rules)
        assert [found[name.format(i)] for i in (0, 1)] == expected


def test_rules_override_the_default_for_the_head_but_never_for_embeddings_and_vectors():
    found = densities(Rule(".", 0.25))
    assert found["lm_head.weight"] == 0.25
    assert found["model.embed_tokens.weight"] is None
    assert found["model.norm.weight"] is None


def test_keep_dense_rule_keeps_dense():
    found = densities(Rule.keep_dense("mlp"), Rule("proj", 0.3))
    assert found["model.layers.0.mlp.up_proj.weight"] is None
    assert found["model.layers.0.self_attn.q_proj.weight"] == 0.3


@pytest.mark.parametrize(
    ("pattern", "closest"),
    [
        (r"mlp\.down_prj", r"mlp\.down_proj"),
        (r"self_atn\.q_proj", r"self_attn\.q_proj"),
        ("zzzzzz", "down_proj, gate_proj, k_proj"),
    ],
)
def test_rule_that_matches_nothing_names_the_closest(pattern, closest):
    with pytest.raises(EncodingError, match=rf"matches no matrix; the closest names are .*{closest}"):
        densities(Rule(pattern, 0.5))


def test_rule_that_matches_only_what_stays_dense_says_so():
    with pytest.raises(EncodingError, match="always stay dense"):
        densities(Rule("embed_tokens", 0.5))
    assert densities(Rule.keep_dense("embed_tokens"))["model.embed_tokens.weight"] is None


def test_rules_are_read_from_text():
    assert Rule.parse(r"mlp\.down_proj=0.7") == Rule(r"mlp\.down_proj", 0.7)
    assert Rule.parse("a=b=1") == Rule("a=b", 1.0)


@pytest.mark.parametrize("text", ["", "=", "=0.5", "mlp", "mlp=", "mlp=half"])
def test_text_of_another_form_is_refused(text):
    with pytest.raises(EncodingError, match=r"must be PATTERN=DENSITY"):
        Rule.parse(text)


@pytest.mark.parametrize("text", ["mlp=1.5", "mlp=-0.1", "mlp=nan"])
def test_density_outside_its_range_is_refused(text):
    with pytest.raises(EncodingError, match=r"density must be in \[0, 1\]"):
        Rule.parse(text)


def test_bad_patterns_methods_and_manifolds_are_refused():
    with pytest.raises(EncodingError, match="regular expression"):
        Rule("(", 0.5)
    with pytest.raises(EncodingError, match=r"must be one of magnitude; got 'wanda'"):
        Settings(density=0.5, method="wanda")
    with pytest.raises(EncodingError, match="manifold must be one of"):
        Settings(density=0.5, manifold="real")
    with pytest.raises(EncodingError, match=r"density must be in \[0, 1\]"):
        Settings(density=2)


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (33, 67)])
def test_magnitude_keeps_the_largest_with_ties_in_order(rng, density, shape):
    w = np.round(rng.normal(size=shape), 1).astype(np.float32)  # many ties
    mask = prune_mask(w, density)
    largest_first = np.argsort(-np.abs(w).ravel(), kind="stable")[: round(density * w.size)]
    expected = np.zeros(w.size, bool)
    expected[largest_first] = True
    np.testing.assert_array_equal(mask, expected.reshape(shape), strict=True)


def test_pruning_by_mask_and_by_density_agree(rng):
    w = rng.normal(size=(40, 60)).astype(np.float32)
    for method in METHODS:
        by_mask = MdCSR.from_dense(w, mask=prune_mask(w, 0.3, method))
        np.testing.assert_array_equal(by_mask.to_dense(), MdCSR.from_dense(w, density=0.3).to_dense())


def test_unknown_method_is_refused():
    with pytest.raises(EncodingError, match="'random'"):
        prune_mask(np.ones((2, 2), np.float32), 0.5, "random")
