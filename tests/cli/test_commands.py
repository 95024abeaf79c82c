"""The commands, as a person types them, on a small model."""

from __future__ import annotations

import json

import numpy as np
import pytest
from oracle.mdcsr import decode_layer

from upg_jax import UPGDecompressor
from upg_jax.io import open_checkpoint


@pytest.fixture(scope="module")
def compressed(gguf_model, tmp_path_factory):
    """The model at density 0.5 through the command itself, in this process to save starting jax."""
    from typer.testing import CliRunner

    from upg_jax.cli._app import app

    destination = tmp_path_factory.mktemp("out") / "half"
    result = CliRunner().invoke(
        app, ["compress", str(gguf_model), str(destination), "--density", "0.5", "--json"]
    )
    assert result.exit_code == 0, result.output
    return destination, json.loads(result.stdout)


def test_compress_keeps_the_largest_half_of_every_linear_layer(compressed, gguf_model):
    destination, report = compressed
    source = open_checkpoint(gguf_model)
    name = "model.layers.1.mlp.up_proj.weight"
    w = source.read(name)
    with UPGDecompressor.from_safetensors(destination) as f:
        decoded = decode_layer(f.get_layer(name))
    threshold = np.sort(np.abs(w), axis=None)[w.size // 2]
    step = np.abs(w).max(axis=1, keepdims=True) / 127
    kept = np.abs(w) >= threshold
    np.testing.assert_array_less(np.abs(decoded - w)[kept], np.broadcast_to(step * 0.5001, w.shape)[kept])
    assert not decoded[~kept].any()
    assert report["file_bytes"] == (destination / "model.safetensors").stat().st_size


def test_a_dry_run_says_the_size_and_writes_nothing(upg_jax, gguf_model, tmp_path, compressed):
    result = upg_jax("compress", gguf_model, "out", "--density", "0.5", "--dry-run", "--json")
    assert result.returncode == 0
    assert not list(tmp_path.iterdir())
    planned = json.loads(result.stdout)
    assert compressed[1]["file_bytes"] <= planned["max_file_bytes"]
    assert "ruins most models" in result.stderr


def test_rules_reach_the_result(upg_jax, gguf_model):
    result = upg_jax(
        "compress",
        gguf_model,
        "out",
        "--density",
        "0.5",
        "--rule",
        "up_proj=0.25",
        "--keep-dense",
        "layers.0",
        "--json",
    )
    assert result.returncode == 0, result.stderr
    densities = {t["name"]: t["density"] for t in json.loads(result.stdout)["tensors"]}
    assert densities["model.layers.0.mlp.up_proj.weight"] is None
    assert densities["model.layers.1.mlp.up_proj.weight"] == pytest.approx(0.25, abs=0.01)
    assert densities["model.layers.1.mlp.down_proj.weight"] == pytest.approx(0.5, abs=0.01)


def test_inspect_lists_sizes(upg_jax, compressed):
    path, report = compressed
    result = upg_jax("inspect", path, "--json")
    summary = json.loads(result.stdout)["summary"]
    assert summary["compressed"] == 16
    linears, tokens = summary["by_index"]["delta8"], summary["by_index"]["dense"]
    assert linears["matrices"] == 14
    assert linears["bits_per_weight"] == pytest.approx(report["bits_per_weight"])
    assert tokens["matrices"] == 2
    assert tokens["density"] > 0.99
    assert "14 compressed with index delta8 at density 0.5" in upg_jax("inspect", path).stdout


def test_verify_accepts_a_whole_file_and_names_what_is_broken(upg_jax, compressed, tmp_path):
    path = compressed[0] / "model.safetensors"
    assert upg_jax("verify", path).returncode == 0
    broken = bytearray(path.read_bytes())
    with UPGDecompressor.from_safetensors(path) as f:
        layer = f.get_layer("model.layers.0.mlp.up_proj.weight", device=False)
        deltas = layer.delta_indices.tobytes()
    at = bytes(broken).index(deltas)
    broken[at : at + 40] = b"\xff" * 40
    (tmp_path / "broken.safetensors").write_bytes(broken)
    result = upg_jax("verify", "broken.safetensors")
    assert result.returncode == 1
    assert "broken.safetensors" in result.stderr
    assert "model.layers.0.mlp.up_proj.weight" in result.stderr
    assert "row 0" in result.stderr
    assert "Traceback" not in result.stderr


def test_generate_streams_what_the_model_answers(upg_jax, compressed):
    from upg_jax import UPGModel

    model = UPGModel.from_file(compressed[0])
    expected = model.generate("he says", max_new_tokens=6)
    result = upg_jax("generate", compressed[0], "he says", "--max-new-tokens", "6")
    assert result.stdout == expected.text + "\n"
    settings = {
        "max_new_tokens": 6,
        "temperature": 1.2,
        "seed": 3,
        "top_k": 50,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.2,
        "presence_penalty": 0.1,
    }
    options = [text for k, v in settings.items() for text in (f"--{k.replace('_', '-')}", v)]
    chat = ["--chat", "--system", "Be brief.", "--stop", "never", "--json"]
    as_json = json.loads(upg_jax("generate", compressed[0], "he says", *options, *chat).stdout)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "he says"}]
    assert as_json["ids"] == model.generate(model.tokenizer.encode_chat(messages), **settings).ids
    as_it_lies = upg_jax("generate", compressed[0], "he says", "--max-new-tokens", "6", "--no-pack")
    assert as_it_lies.stdout == expected.text + "\n"
    assert "with index delta8" in as_it_lies.stderr
    assert "with index dense" in as_it_lies.stderr


def test_eval_reports_perplexity_with_window_and_stride(upg_jax, compressed, tmp_path):
    (tmp_path / "text.txt").write_text("he says that he is here, and she says that she is there. " * 4)
    result = upg_jax(
        "eval", compressed[0], "--text", "text.txt", "--window", "64", "--stride", "32", "--json"
    )
    (row,) = json.loads(result.stdout)
    assert row["window"] == 64
    assert row["stride"] == 32
    assert row["perplexity"] == pytest.approx(np.exp(row["nll"]))


def test_convert_turns_an_old_file_into_a_new_one(upg_jax, tmp_path):
    import pickle

    q = np.array([3, -5, 127], np.int8)
    tensor = {
        "shape": (2, 9),
        "values": q,
        "indices": np.array([1, 8, 4], np.int32),
        "row_pointers": np.array([0, 2, 3], np.int64),
        "scales": np.array([0.5, 0.25], np.float32),
    }
    old = {
        "model_type": "llama",
        "source": "x",
        "compression_method": "prime_sparse_v1",
        "tensors": {"a": tensor},
    }
    (tmp_path / "old.upg").write_bytes(pickle.dumps(old))
    result = upg_jax("convert", "old.upg", "new.safetensors")
    assert result.returncode == 0, result.stderr
    with UPGDecompressor.from_safetensors(tmp_path / "new.safetensors") as f:
        dense = decode_layer(f.get_layer("a"))
    expected = np.zeros((2, 9), np.float32)
    expected[[0, 0, 1], [1, 8, 4]] = [1.5, -2.5, 31.75]
    np.testing.assert_array_equal(dense, expected)
    again = upg_jax("convert", "old.upg", "new.safetensors")
    assert again.returncode == 1
    assert "--force" in again.stderr
    assert upg_jax("convert", "old.upg", "new.safetensors", "--force").returncode == 0


def test_doctor_says_which_lowering_and_why(upg_jax):
    report = json.loads(upg_jax("doctor", "--json", UPG_JAX_BACKEND="reference").stdout)
    assert report["sparse_dense"]["lowering"] == "reference"
    assert "UPG_JAX_BACKEND" in report["sparse_dense"]["because"]
    assert report["jax"]["platform"] == "cpu"


@pytest.mark.parametrize("backend", ["cuda", "nonsense"])
def test_doctor_says_all_else_where_the_backend_is_impossible(upg_jax, backend):
    usual = json.loads(upg_jax("doctor", "--json").stdout)
    result = upg_jax("doctor", "--json", UPG_JAX_BACKEND=backend)
    assert result.returncode == 1
    assert result.stderr == ""
    report = json.loads(result.stdout)
    choice = report.pop("sparse_dense")
    assert choice["lowering"] == "none"
    assert choice["UPG_JAX_BACKEND"] == backend
    assert backend in choice["because"]
    assert choice["native backend"] == usual.pop("sparse_dense")["native backend"]
    assert report == usual
    as_tables = upg_jax("doctor", UPG_JAX_BACKEND=backend)
    assert as_tables.returncode == 1
    assert "jaxlib" in as_tables.stdout
    assert choice["because"].split(":")[0] in as_tables.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", "nothing"], "nothing"),
        (["compress", "nothing", "out", "--density", "0.5"], "does not exist"),
        (["generate", "nothing", "hello"], "nothing"),
        (["convert", "nothing.upg", "new.safetensors"], "nothing.upg"),
    ],
)
def test_a_missing_file_is_named_without_a_traceback(upg_jax, arguments, said):
    result = upg_jax(*arguments)
    assert result.returncode == 1
    assert said in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "arguments", [["compress", "a"], ["nonsense"], ["generate", "a", "b", "--top-k", "x"]]
)
def test_wrong_usage_exits_with_2(upg_jax, arguments):
    assert upg_jax(*arguments).returncode == 2


def test_help_does_not_import_jax(upg_jax_alone):
    result = upg_jax_alone("--help", PYTHONPROFILEIMPORTTIME="1")
    assert result.returncode == 0
    assert "compress" in result.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines()}
    assert "typer" in imported
    assert "jax" not in imported


def test_compress_calibrates_on_a_text(upg_jax, gguf_model, tmp_path):
    (tmp_path / "book.txt").write_text("he said that she said that he was there, and so on. " * 40)
    result = upg_jax(
        "compress", gguf_model, "out", "--density", "0.5", "--method", "wanda", "--calibration", "book.txt",
        "--windows", "8", "--window", "100", "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "one-shot pruning by wanda to density 0.5" in result.stderr
    with UPGDecompressor.from_safetensors(tmp_path / "out") as model:
        settings = model.provenance["settings"]
    assert (settings["method"], settings["pattern"]) == ("wanda", "row")
    assert settings["calibration"]["source"] == "book.txt"
    assert (settings["calibration"]["windows"], settings["calibration"]["tokens"]) == (8, 100)


@pytest.fixture
def allocating(tmp_path):
    """Options of `compress` that share the density out by a text in the directory."""
    (tmp_path / "book.txt").write_text("he said that she said that he was there, and so on. " * 40)
    text = ["--calibration", "book.txt", "--windows", "8", "--window", "100"]
    return ["--density", "0.4", "--allocate", *text]


def test_compress_shares_the_density_out(upg_jax, gguf_model, tmp_path, allocating):
    planned = upg_jax("compress", gguf_model, "out", *allocating, "--dry-run", "--json")
    assert planned.returncode == 0, planned.stderr
    made = upg_jax("compress", gguf_model, "out", *allocating, "--json")
    assert made.returncode == 0, made.stderr
    with UPGDecompressor.from_safetensors(tmp_path / "out") as model:
        rules = dict(model.provenance["settings"]["rules"])
    densities = [t["density"] for t in json.loads(planned.stdout)["tensors"] if t["index"] == "delta8"]
    assert sorted(rules.values()) == sorted(densities)
    assert min(densities) < 0.4 < max(densities)


def test_measuring_begins_only_where_the_result_can_go_and_may_be_interrupted(
    upg_jax, gguf_model, tmp_path, monkeypatch, allocating
):
    def interrupted(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr("upg_jax.compress.allocate", interrupted)
    (tmp_path / "taken").mkdir()
    refused = upg_jax("compress", gguf_model, "taken", *allocating)
    assert refused.returncode == 1
    assert "exists and is not a compressed model" in refused.stderr
    stopped = upg_jax("compress", gguf_model, "out", *allocating)
    assert stopped.returncode == 130
    assert "interrupted while measuring; the same command measures again" in stopped.stderr
    assert not list(tmp_path.glob("out*"))


def test_calibration_without_a_method_for_it_is_refused(upg_jax, gguf_model):
    result = upg_jax("compress", gguf_model, "out", "--density", "0.5", "--calibration", "book.txt")
    assert result.returncode == 1
    assert "is for wanda and sparsegpt and --allocate; got method magnitude" in result.stderr
