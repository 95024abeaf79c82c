"""Checkpoints compressed to values of 4 and 3 bits: sizes, provenance, forms, and the model that comes out."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from oracle.mdcsr import decode_layer
from small_models import llama
from typer.testing import CliRunner

from upg_jax import EncodingError, MdCSR, UPGDecompressor
from upg_jax._encode import encode_levels
from upg_jax._quantize import scales_of
from upg_jax._validate import validate
from upg_jax.cli._app import app
from upg_jax.compress import Settings, compress_checkpoint, plan, sparsegpt
from upg_jax.compress._methods import compress_matrix
from upg_jax.compress._statistics import Inputs
from upg_jax.inference import UPGModel
from upg_jax.io import open_checkpoint
from upg_jax.models import forward
from upg_jax.models._packing import can_join, join_rows


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("narrow") / "hf"
    return llama.write_hugging_face(path, llama.weights(), dtype=ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def compressed(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("narrow") / "out"
    return compress_checkpoint(source, out, Settings(density=0.5, value_bits=4, group_size=32))


def run(*arguments):
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (3, 128)])
def test_sizes_are_exact_where_rows_are_equal_and_no_kept_weight_rounds_to_zero(
    source, tmp_path, bits, group_size
):
    checkpoint = open_checkpoint(source)
    settings = Settings(density=0.25, pattern="row", value_bits=bits, group_size=group_size)
    planned = plan(checkpoint, settings)
    report = compress_checkpoint(checkpoint, tmp_path / "out", settings)
    assert planned.file_bytes == report.file_bytes
    assert [(t.name, t.nbytes) for t in planned.tensors] == [(t.name, t.nbytes) for t in report.tensors]


@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("density", [0.02, 0.5, 1.0])
def test_no_result_is_larger_than_announced(source, tmp_path, bits, density):
    checkpoint = open_checkpoint(source)
    settings = Settings(density=density, value_bits=bits)
    planned = plan(checkpoint, settings)
    report = compress_checkpoint(checkpoint, tmp_path / "out", settings)
    assert report.file_bytes <= planned.max_file_bytes
    for ours, theirs in zip(planned.tensors, report.tensors, strict=True):
        assert theirs.nbytes <= 1.05 * ours.max_nbytes


@pytest.mark.parametrize(
    ("density", "bits", "index"),
    [(0.05, 4, "delta8"), (0.5, 4, "mask"), (1.0, 4, "dense"), (0.7, 3, "dense"), (0.6, 3, "mask")],
)
def test_the_smallest_form_is_chosen(density, bits, index):
    settings = Settings(density=density, value_bits=bits)
    (found,) = settings.encodings({"a_proj.weight": (8, 8)}).values()
    assert (found.index, found.value_bits, found.group_size) == (index, bits, 64)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"value_bits": 5}, "settings: value_bits must be one of"),
        ({"value_bits": 4, "manifold": "prime"}, "settings: values of 4 bits are for the unit manifold"),
        ({"value_bits": 4, "group_size": 16}, "settings: group_size must be one of"),
        ({"group_size": 64}, "settings: group_size is for values of 4 or 3 bits"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, said):
    with pytest.raises(EncodingError, match=said):
        Settings(density=0.5, **settings)


def test_a_file_says_how_it_was_made_and_what_it_holds(compressed, source):
    with UPGDecompressor.from_safetensors(compressed.path) as f:
        f.verify()
        settings = f.provenance["settings"]
        assert (settings["value_bits"], settings["group_size"]) == (4, 32)
        name = "model.layers.1.mlp.up_proj.weight"
        w = open_checkpoint(source).read(name)
        original = MdCSR.from_dense(w, density=0.5, value_bits=4, group_size=32, index="mask")
        np.testing.assert_array_equal(f.decompress_layer(name), original.to_dense())
        assert f.info("model.embed_tokens.weight").value_bits == 8


def test_the_model_computes_what_its_decoded_matrices_do(compressed):
    model = UPGModel.from_file(compressed.path)
    layers = {
        key: tuple(value.to_dense(jnp.float32)) if isinstance(value, MdCSR) else value
        for key, value in model.params["layers"].items()
    }
    assert any(
        isinstance(value, MdCSR) and value.value_bits == 4 for value in model.params["layers"].values()
    )
    ids = jnp.asarray(np.random.default_rng(0).integers(0, llama.VOCABULARY, (2, 9)))
    compute = jax.jit(forward, static_argnames="config")
    expected = compute({**model.params, "layers": layers}, model.config, ids)[0]
    np.testing.assert_allclose(compute(model.params, model.config, ids)[0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("index", ["delta8", "mask", "dense"])
def test_joined_rows_are_the_rows_in_order(index, bits):
    w = np.random.default_rng(0).normal(size=(18, 150)).astype(np.float32)
    options = {"value_bits": bits, "index": index, "capacity": 9600}
    parts = [MdCSR.from_dense(w[a:b], **options) for a, b in ((0, 9), (9, 10), (10, 18))]
    parts = [jax.tree.map(np.asarray, part) for part in parts]
    assert can_join(parts)
    joined = join_rows(parts).validate("full")
    np.testing.assert_array_equal(joined.to_dense(), MdCSR.from_dense(w, value_bits=bits).to_dense())


def activations() -> np.ndarray:
    rng = np.random.default_rng(1)
    return (
        rng.normal(size=(600, 40)) @ rng.normal(size=(40, 200)) + 0.3 * rng.normal(size=(600, 200))
    ).astype(np.float32)


@pytest.mark.parametrize(("density", "pattern", "bits"), [(1.0, "row", 4), (0.5, "row", 3), (0.5, "2:4", 4)])
def test_rounding_inside_sparsegpt_is_made_up_for_by_later_weights(density, pattern, bits):
    w = np.random.default_rng(0).normal(size=(48, 200)).astype(np.float32)
    x = activations()
    scales = scales_of(2 * np.abs(w).max(axis=1), "unit", value_bits=bits)
    options = {"scales": scales, "value_bits": bits, "group_size": 32}
    inside = sparsegpt(w, x.T @ x, density, pattern=pattern, **options)
    assert inside.levels is not None
    layer = encode_levels(
        inside.levels,
        scales,
        dtype=np.float32,
        value_bits=bits,
        group_scales=inside.multipliers,
        group_size=32,
    )
    validate(layer, "full")
    np.testing.assert_array_equal(decode_layer(layer), inside.weights)
    assert not inside.weights[~inside.mask].any()
    pruned = sparsegpt(w, x.T @ x, density, pattern=pattern)
    after = MdCSR.from_dense(pruned.weights, mask=pruned.mask, value_bits=bits, group_size=32).to_dense()
    lost, lost_after = (np.square((d - w) @ x.T).sum() for d in (inside.weights, np.asarray(after)))
    assert lost < lost_after


def test_patterns_may_cut_groups():
    w = np.random.default_rng(3).normal(size=(4, 125)).astype(np.float32)
    x = activations()[:, :125]
    scales = scales_of(2 * np.abs(w).max(axis=1), "unit", value_bits=4)
    found = sparsegpt(w, x.T @ x, 0.6, pattern="3:5", scales=scales, value_bits=4, group_size=64)
    assert (found.mask.reshape(4, 25, 5).sum(axis=2) == 3).all()
    assert found.multipliers.shape == (4, 2)


def gptq(w, hessian, kept, units, largest):
    """One column after the other by explicit inverses, those of the largest inputs first; float64."""
    w, left = w.astype(np.float64), list(np.argsort(-np.diag(hessian), kind="stable"))
    dampened = hessian + 0.01 * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    while left:
        j = left[0]
        inverse = np.linalg.inv(dampened[np.ix_(left, left)])
        q = np.clip(np.rint(w[:, j] / units[:, j]), -largest, largest)
        error = w[:, j] - np.where(kept[:, j], q * units[:, j], 0)
        w[:, left] -= error[:, None] * inverse[0] / inverse[0, 0]
        left = left[1:]
    return w


@pytest.mark.parametrize(("density", "bits"), [(1.0, 4), (0.5, 4), (0.7, 3)])
def test_few_bits_are_chosen_column_by_column_the_largest_inputs_first(density, bits):
    w = np.random.default_rng(4).normal(size=(24, 200)).astype(np.float32)
    x = activations() * np.random.default_rng(5).lognormal(size=200).astype(np.float32)
    hessian = (x.T @ x).astype(np.float64)
    scales = scales_of(2 * np.abs(w).max(axis=1), "unit", value_bits=bits)
    got = sparsegpt(w, hessian, density, scales=scales, value_bits=bits, group_size=32)
    pruned = sparsegpt(w, hessian, density)
    np.testing.assert_array_equal(got.mask, pruned.mask)
    units = np.repeat(got.multipliers, 32, axis=1)[:, :200] * scales[:, None].astype(np.float64)
    expected = gptq(pruned.weights, hessian, got.mask, units, 2 ** (bits - 1) - 1)
    # A rounding that is nearly a tie may fall the other way in float32, and changes what follows in its row.
    same = (np.abs(got.weights - expected) < 0.5 * units).all(axis=1)
    assert same.mean() > 0.7
    bits_of_rounding = 2.0**-23 * np.abs(expected).max()
    np.testing.assert_allclose(got.weights[same], expected[same], rtol=0, atol=bits_of_rounding)


def test_a_matrix_is_stored_as_sparsegpt_chose_it():
    w = np.random.default_rng(0).normal(size=(48, 200)).astype(np.float32)
    settings = Settings(density=0.5, method="sparsegpt", value_bits=4, group_size=32)
    (encoding,) = settings.encodings({"a_proj.weight": w.shape}).values()
    x = activations()
    layer = compress_matrix(w, encoding, settings, Inputs([jnp.asarray(x)]))
    validate(layer, "full")
    assert (layer.index, layer.value_bits, layer.group_size) == ("mask", 4, 32)
    lost, lost_by_magnitude = (
        np.square((decode_layer(d) - w) @ x.T).sum()
        for d in (layer, MdCSR.from_dense(w, density=0.5, value_bits=4, group_size=32))
    )
    assert lost < lost_by_magnitude


def test_the_commands_know_them(source, tmp_path):
    options = ("--density", "0.5", "--value-bits", "4", "--group-size", "32", "--json")
    planned = json.loads(run("compress", source, tmp_path / "out", *options, "--dry-run"))
    made = json.loads(run("compress", source, tmp_path / "out", *options))
    assert made["file_bytes"] <= planned["max_file_bytes"]
    matrix = next(t for t in made["tensors"] if t["name"].endswith("0.mlp.up_proj.weight"))
    assert (matrix["index"], matrix["value_bits"], matrix["group_size"]) == ("mask", 4, 32)
    listed = json.loads(run("inspect", tmp_path / "out", "--json"))
    summary = listed["summary"]["by_index"]
    assert summary.keys() == {"dense", "mask and 4 bits in groups of 32"}
    assert summary["mask and 4 bits in groups of 32"]["bits_per_weight"] == made["bits_per_weight"]
    assert "4 bits in groups of 32" in " ".join(run("inspect", tmp_path / "out").split())
    assert "tensors are valid" in " ".join(run("verify", tmp_path / "out").split())
