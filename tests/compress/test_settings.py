"""Which tensors are compressed, and how much: rules by name, the first match wins."""

from __future__ import annotations

import numpy as np
import pytest
from small_models import llama

from upg_jax import EncodingError, MdCSR
from upg_jax._index import INDEXES
from upg_jax.compress import Encoding, Rule, Settings, prune_mask

SHAPES = {name: w.shape for name, w in llama.weights().items()}


def encodings(*rules, density=0.5, shapes=SHAPES, **settings):
    return Settings(density=density, rules=rules, **settings).encodings(shapes)


def densities(*rules, **settings):
    return {
        name: None if encoding is None else encoding.density
        for name, encoding in encodings(*rules, embedding="float", **settings).items()
    }


def test_by_default_the_linear_layers_are_pruned_and_tokens_become_int8_rows():
    for name, encoding in encodings().items():
        if "_proj" in name:
            assert encoding == Encoding(0.5, "unit", "delta8")
        elif name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert encoding == Encoding(1.0, "unit", "dense", tokens=True)
        else:
            assert encoding is None, name


@pytest.mark.parametrize(
    ("manifold", "embedding", "rows"),
    [
        ("unit", None, True),
        ("unit", "float", False),
        ("prime", None, False),
        ("prime", "int8", True),
    ],
)
def test_tokens_stay_float_where_asked_for_and_where_exactness_is(manifold, embedding, rows):
    found = encodings(manifold=manifold, embedding=embedding)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert found[name] == (Encoding(1.0, "unit", "dense", tokens=True) if rows else None)
    assert found["model.layers.0.mlp.up_proj.weight"].manifold == manifold


def test_only_the_embedding_of_tokens_becomes_int8_rows():
    names = ("wte.weight", "wpe.weight", "embed_positions.weight", "patch_embed.weight")
    found = encodings(shapes=dict.fromkeys(names, (4, 4)))
    assert [name for name in names if found[name] is not None] == ["wte.weight"]


@pytest.mark.parametrize(
    ("manifold", "expected"),
    [
        ("unit", {0.0: "delta8", 0.1: "delta8", 0.13: "mask", 0.5: "mask", 0.87: "mask", 0.9: "dense"}),
        ("prime", {0.1: "delta8", 0.13: "mask", 0.9: "mask", 0.95: "mask", 0.97: "dense", 1.0: "dense"}),
    ],
)
def test_packed_matrices_take_the_index_that_is_smallest(manifold, expected):
    w = np.random.default_rng(0).normal(size=(64, 640)).astype(np.float32)
    for density, index in expected.items():
        found = encodings(density=density, manifold=manifold, pack=True)["model.layers.0.mlp.up_proj.weight"]
        assert found == Encoding(density, manifold, index)
        mask = np.random.default_rng(1).random(w.shape) < density
        sizes = {i: MdCSR.from_dense(w, mask=mask, manifold=manifold, index=i).nbytes for i in INDEXES}
        assert sizes[index] <= 1.02 * min(sizes.values())


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
    for embedding in ("int8", "float"):
        found = encodings(Rule(".", 0.25), embedding=embedding)
        assert found["lm_head.weight"] == Encoding(0.25, "unit")
        assert (found["model.embed_tokens.weight"] is None) == (embedding == "float")
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


def test_rule_that_matches_only_what_is_never_pruned_says_so():
    with pytest.raises(EncodingError, match="never pruned"):
        densities(Rule("embed_tokens", 0.5))
    assert encodings(Rule.keep_dense("embed_tokens"))["model.embed_tokens.weight"] is None


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
    with pytest.raises(EncodingError, match=r"must be one of magnitude, wanda, sparsegpt; got 'random'"):
        Settings(density=0.5, method="random")
    with pytest.raises(EncodingError, match="manifold must be one of"):
        Settings(density=0.5, manifold="real")
    with pytest.raises(EncodingError, match="embedding must be one of"):
        Settings(density=0.5, embedding="int4")
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
    by_mask = MdCSR.from_dense(w, mask=prune_mask(w, 0.3))
    np.testing.assert_array_equal(by_mask.to_dense(), MdCSR.from_dense(w, density=0.3).to_dense())


def test_unknown_method_is_refused():
    with pytest.raises(EncodingError, match="'random'"):
        prune_mask(np.ones((2, 2), np.float32), 0.5, "random")
