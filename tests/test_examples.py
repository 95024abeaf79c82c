"""The notebooks and scripts in examples/ do what they say, on small sizes."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def run(*arguments, standard_input: str | None = None, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        input=standard_input,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def cells(path: Path, kind: str) -> list[dict]:
    return [
        cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, gguf_model, tmp_path):
    for package in ("matplotlib", "optax"):
        pytest.importorskip(package, reason='pip install "upg-jax[notebook]"')
    script = tmp_path / f"{path.stem}.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in cells(path, "code")), encoding="utf-8")
    small = {"MPLBACKEND": "agg", "WIDTH": "256", "UPG_JAX_SMOLLM2_GGUF": str(gguf_model)}
    printed = run(script, TMPDIR=str(tmp_path), **small)
    assert "False" not in printed  # what the notebooks claim of their results, they check


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebooks_outputs_are_there_small_and_of_no_machine(path):
    assert path.stat().st_size < 100_000
    code = cells(path, "code")
    kinds = {output["output_type"] for cell in code for output in cell["outputs"]}
    assert "stream" in kinds
    assert "error" not in kinds
    # A plain run from top to bottom.
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    text = "".join(json.dumps(cell["outputs"]) for cell in code)
    assert not re.search(r"/(root|home|tmp|work|Users)/", text)


def test_a_conversation(gguf_model):
    printed = run(EXAMPLES / "chat.py", gguf_model, standard_input="hello\n")
    assert printed.startswith("> ")
    assert printed.endswith("\n> ")  # after the answer, the end of the input


def test_a_sharded_block_sends_one_sum_and_is_right():
    printed = run(EXAMPLES / "sharded_forward.py")
    assert "['all-reduce']" in printed
    assert "in 8 blocks" in printed
    assert float(re.search(r"one device: (\S+)", printed)[1]) < 1e-5


def test_phi_4_is_made_at_random_generates_and_loads(tmp_path, monkeypatch, capsys):
    """With few and narrow layers, in this process, since the shapes are no option."""
    directory, scripts = tmp_path / "phi4", {}
    for name in ("phi4_generate", "phi4_load"):
        specification = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        scripts[name] = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(scripts[name])

    def printed(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, str(directory), *arguments])
        scripts[name].main()
        return capsys.readouterr().out

    def interrupted(path, *arguments, **more):
        path.write_bytes(b"half of it")
        raise KeyboardInterrupt

    small = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    monkeypatch.setattr(scripts["phi4_generate"], "PHI_4", scripts["phi4_generate"].PHI_4 | small)
    options = ("--random", "--layers", "3", "--density", "0.25", "--tokens", "5", "--dtype", "float32")
    with monkeypatch.context() as patched:
        patched.setattr(scripts["phi4_generate"], "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            printed("phi4_generate", *options)
    assert list(tmp_path.iterdir()) == []
    capsys.readouterr()
    said = printed("phi4_generate", *options)
    assert said.count("making ") == 9  # a matrix of each shape, whatever the number of layers
    assert re.search(r"^5 tokens in \S+ s, the prompt included: \S+ tokens/s$", said, re.MULTILINE)
    assert "making" not in printed("phi4_generate", *options)
    said = printed("phi4_load", "--dtype", "float32")
    assert re.search(r"^layers +3 of width 64, Phi3ForCausalLM$", said, re.MULTILINE)
    layer = (64 + 2 * 32) * 64 + 64 * 64 + 2 * 80 * 64 + 64 * 80 + 2 * 64  # two norms
    assert f"weights               {3 * layer + 2 * 96 * 64 + 64:,}\n" in said
    nbytes = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    found = int(re.search(r"^bytes +([\d,]+) ", said, re.MULTILINE)[1].replace(",", ""))
    assert 0.5 * nbytes < found <= nbytes


def test_an_exported_program_runs_in_another_process(tmp_path):
    pytest.importorskip("flatbuffers", reason='pip install "upg-jax[test]"')
    files = (tmp_path / "program.bin", tmp_path / "layer.safetensors")
    saved = run(EXAMPLES / "export.py", "save", *files)
    assert run(EXAMPLES / "export.py", "run", *files).strip() == saved.splitlines()[-1]
