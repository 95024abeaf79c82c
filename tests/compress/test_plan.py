"""The size announced before any work is the size found after it."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from small_models import llama

from upg_jax import EncodingError
from upg_jax.compress import Rule, Settings, compress_checkpoint, plan
from upg_jax.io import open_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "hf"
    return llama.write_hugging_face(path, llama.weights(), dtype=ml_dtypes.bfloat16)


def run(source, tmp_path, **settings):
    checkpoint = open_checkpoint(source)
    settings = Settings(**settings)
    return plan(checkpoint, settings), compress_checkpoint(checkpoint, tmp_path / "out", settings)


@pytest.mark.parametrize("manifold", ["unit", "prime"])
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("density", [0.0, 0.5, 0.8])
def test_sizes_are_exact_where_no_kept_weight_rounds_to_zero(source, tmp_path, manifold, pack, density):
    planned, report = run(source, tmp_path, manifold=manifold, density=density, pack=pack)
    assert planned.file_bytes == report.file_bytes
    assert [(t.name, t.shape, t.nbytes) for t in planned.tensors] == [
        (t.name, t.shape, t.nbytes) for t in report.tensors
    ]
    assert planned.bits_per_weight == report.bits_per_weight


def test_weights_that_round_to_zero_make_the_file_a_little_smaller(source, tmp_path):
    planned, report = run(source, tmp_path, density=1.0)
    assert 0.95 * planned.file_bytes < report.file_bytes <= planned.file_bytes <= planned.max_file_bytes
    assert 0.98 < report.compressed[0].density < 1.0


def test_fillers_stay_within_the_announced_limit(tmp_path):
    wide = np.zeros((64, 4096), np.float32)
    wide[:, ::300] = 1.0  # gaps of 300: a filler for every entry but each row's first
    save_file({"wide.weight": wide}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    result = tmp_path.with_name(tmp_path.name + "-out")
    result.mkdir()
    density = float(np.count_nonzero(wide) / wide.size)
    planned, report = run(tmp_path, result, density=density)
    assert planned.file_bytes < report.file_bytes <= planned.max_file_bytes
    assert planned.tensors[0].nbytes < report.tensors[0].nbytes <= planned.tensors[0].max_nbytes


def test_the_embedding_as_int8_rows_takes_a_byte_a_weight_and_is_no_linear_layer(source, tmp_path):
    planned, report = run(source, tmp_path, density=0.5)
    linears = [t for t in planned.tensors if "_proj" in t.name]
    assert planned.bits_per_weight == 8 * sum(t.nbytes for t in linears) / sum(t.num_weights for t in linears)
    for tensors in (planned.tensors, report.tensors):
        embedding = next(t for t in tensors if "embed_tokens" in t.name)
        rows, columns = embedding.shape
        assert embedding.nbytes == rows * columns + 4 * rows + 4 * (rows + 1)


def test_bits_per_weight_count_every_byte(source):
    planned = plan(open_checkpoint(source), Settings(density=0.5))
    tensor = next(t for t in planned.tensors if t.name.endswith("0.mlp.down_proj.weight"))
    entries = tensor.num_weights // 2
    assert tensor.nbytes == 2 * -(-entries // 64) * 64 + 4 * tensor.shape[0] + 4 * (tensor.shape[0] + 1)
    assert tensor.bits_per_weight == 8 * tensor.nbytes / tensor.num_weights
    assert tensor.dtype == "bfloat16"
    assert planned.file_bytes > sum(t.nbytes for t in planned.tensors)


def test_planning_reads_no_weights(source, monkeypatch):
    checkpoint = open_checkpoint(source)
    monkeypatch.setattr(type(checkpoint), "read", lambda self, name: pytest.fail(f"read {name}"))
    plan(checkpoint, Settings(density=0.5))


@pytest.mark.parametrize(
    ("density", "manifold", "expected"),
    [
        (0.4, "unit", ["445 at density 0.5"]),
        (0.5, "unit", ["445 at density 0.5", "more than dense int8 (8)"]),
        (0.8, "unit", ["more than dense int8 (8)"]),
        (0.8, "prime", ["more than bfloat16 (16)"]),
        (1.0, "prime", ["more than float32 (32)"]),
    ],
)
def test_warnings_name_measured_quality_and_size(source, density, manifold, expected):
    warnings = plan(open_checkpoint(source), Settings(density=density, manifold=manifold)).warnings
    assert len(warnings) == len(expected)
    for warning, text in zip(warnings, expected, strict=True):
        assert text in warning


@pytest.mark.parametrize(
    ("density", "rule", "expected"),
    [
        (0.5, 0.5, "to density 0.5 ruins"),
        (0.7, 0.36, None),
        (0.9, 0.2, "to densities from 0.2, "),
        (0.4, 0.6, "to densities from 0.4, "),
    ],
)
def test_warning_of_harm_goes_by_the_average_and_the_lowest_density(source, density, rule, expected):
    rules = (Rule("down_proj", rule),)
    warnings = plan(open_checkpoint(source), Settings(density=density, rules=rules)).warnings
    harm = [w for w in warnings if "one-shot pruning" in w]
    assert len(harm) == (expected is not None)
    assert expected is None or expected in harm[0]


def test_nothing_to_compress_is_an_error(source):
    with pytest.raises(EncodingError, match="no tensor is left to compress"):
        plan(open_checkpoint(source), Settings(density=0.5, rules=(Rule.keep_dense("."),)))


def test_dtype_that_cannot_be_encoded_is_named(tmp_path):
    save_file({"a.weight": np.ones((4, 4), np.int8)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EncodingError, match=r"'a\.weight' is int8, which cannot be encoded"):
        plan(open_checkpoint(tmp_path), Settings(density=0.5))
