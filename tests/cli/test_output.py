"""What the commands print: names out of files are data, pipes get whole lines, JSON is JSON, errors one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from upg_jax import MdCSR
from upg_jax.io import save

NAMES = ("a[/b]", ":smile:[red]", "esc\x1b[31m\nnext", "model.layers.0." + "x" * 150)


@pytest.fixture
def weird(tmp_path):
    directory = tmp_path / "x[" / "y]"
    directory.mkdir(parents=True)
    layer = MdCSR.from_dense(np.eye(3, dtype=np.float32))
    save(directory / "m.safetensors", dict.fromkeys(NAMES, layer))
    return directory / "m.safetensors"


def test_names_are_printed_as_they_are_and_never_reach_the_terminal_as_commands(
    upg_jax, upg_jax_alone, weird
):
    result = upg_jax_alone("inspect", weird, COLUMNS="300")
    assert result.returncode == 0, result.stderr
    assert "\x1b" not in result.stdout
    for shown in ("a[/b]", ":smile:[red]", r"esc\x1b[31m\nnext", NAMES[3]):
        assert shown in result.stdout
    verified = upg_jax("verify", weird)
    assert verified.returncode == 0, verified.stderr
    assert str(weird) in verified.stdout


def test_a_pipe_without_a_width_gets_whole_names(upg_jax_alone, weird):
    result = upg_jax_alone("inspect", weird, COLUMNS="")
    assert "…" not in result.stdout


def test_an_answer_keeps_its_tabs_and_reaches_a_terminal_without_commands(capsys, monkeypatch):
    from upg_jax.cli import _output

    answer = "all:\n\tcc 🧑\u200d🚀 :smile: [b]\r\x1b[31m\x9b2J"
    _output.say(answer)
    assert capsys.readouterr().out == answer
    monkeypatch.setattr(_output.stdout, "_force_terminal", True)
    _output.say(answer)
    assert capsys.readouterr().out == answer.replace("\r\x1b", r"\x0d\x1b").replace("\x9b", r"\x9b")


def test_infinity_in_a_file_does_not_make_invalid_json(capsys):
    from upg_jax.cli._output import print_json

    def refuse(constant):
        raise AssertionError(constant)

    print_json({"perplexity": float("inf"), "rows": [float("nan"), 1.5], "shape": (2, 3)})
    shown = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert shown == {"perplexity": None, "rows": [None, 1.5], "shape": [2, 3]}


def test_an_answer_that_the_encoding_cannot_hold_is_escaped(upg_jax_alone, gguf_model):
    result = upg_jax_alone("generate", gguf_model, "hé", "--max-new-tokens", "8", PYTHONIOENCODING="ascii")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--temperature", "-1"], 2, "temperature"),  # before the model is opened, as other wrong usage
        (["--dtype", "float64"], 1, "dtype"),
    ],
)
def test_impossible_options_are_told_without_a_traceback(upg_jax, gguf_model, arguments, code, said):
    result = upg_jax("generate", gguf_model, "he", *arguments)
    assert result.returncode == code
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_a_text_that_is_not_utf8_is_named(upg_jax, gguf_model, tmp_path):
    (tmp_path / "text.bin").write_bytes(b"\xff\xfe")
    result = upg_jax("eval", gguf_model, "--text", "text.bin")
    assert result.returncode == 1
    assert "text.bin" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full (Linux)")
def test_a_full_disk_is_one_line_that_says_what_to_do(weird, tmp_path):
    command = [sys.executable, "-m", "upg_jax.cli", "inspect", str(weird)]
    with open("/dev/full", "w", encoding="utf-8") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 1
    assert "No space left on device; make room there and run the same command again" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_a_file_of_others_is_one_line_that_says_what_to_do(upg_jax, weird):
    weird.chmod(0)
    result = upg_jax("inspect", weird)
    assert result.returncode == 1
    assert "Permission denied" in result.stderr
    assert "owner and mode" in result.stderr


def test_doctor_reports_a_jax_that_does_not_start(upg_jax_alone):
    result = upg_jax_alone("doctor", "--json", JAX_PLATFORMS="bogus")
    assert result.returncode == 1, result.stderr
    report = json.loads(result.stdout)
    assert "does not start" in report["jax"]["devices"]
    assert report["jax"]["JAX_PLATFORMS"] == "bogus"


@pytest.mark.skipif(sys.platform == "win32", reason="consoles of Windows have no SIGINT to send")
def test_ctrl_c_exits_with_130_and_says_how_to_go_on(gguf_model, tmp_path):
    command = [sys.executable, "-m", "upg_jax.cli", "compress", gguf_model, "out", "--density", "1.0"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        while not (tmp_path / "out.partial").exists() and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    # On a fast machine the run may be past its last interruptible step, or the process about to end.
    assert process.returncode in (0, 130, -signal.SIGINT)
    assert b"Traceback" not in said
    if process.returncode == 130:
        assert b"the same command continues where this run stopped" in said


@pytest.mark.skipif(sys.platform == "win32", reason="consoles of Windows have no SIGINT to send")
def test_ctrl_c_while_modules_are_imported_is_no_traceback():
    # The first module that main imports stands for all of them.
    interrupted = (
        "import importlib.abc, signal, sys\n"
        "class Interrupt(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'upg_jax.cli._app':\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "import upg_jax.cli\n"
        "upg_jax.cli.main()\n"
    )
    result = subprocess.run([sys.executable, "-c", interrupted], capture_output=True, text=True, check=False)
    assert result.returncode == 130
    assert result.stderr == "interrupted\n"


def test_an_interrupted_command_says_so_in_one_line(upg_jax, weird, monkeypatch):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("upg_jax.io.UPGDecompressor.from_safetensors", interrupted)
    result = upg_jax("verify", weird)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "interrupted\n")


@pytest.mark.skipif(sys.platform == "win32", reason="consoles of Windows have no SIGINT to send")
def test_ctrl_c_while_xla_compiles_does_not_crash():
    compiling = (
        "import os, signal, sys, threading, time\n"
        "import jax, jax.numpy as jnp\n"
        "from upg_jax.cli import main\n"
        "from upg_jax.cli._app import app\n"
        "def long(x):\n"
        "    for i in range(400):\n"
        "        x = jnp.sin(x) @ x + i\n"
        "    return x\n"
        "@app.command('compile')\n"
        "def compile():\n"
        "    lowered = jax.jit(long).lower(jnp.ones((8, 8)))\n"
        "    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "    lowered.compile()\n"
        "    time.sleep(60)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "print('said before', end='')\n"
        "sys.argv = ['upg-jax', 'compile']\n"
        "main()\n"
    )
    result = subprocess.run([sys.executable, "-c", compiling], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (130, "said before", "interrupted\n")


@pytest.mark.skipif(os.name != "posix", reason="needs a shell that closes streams")
def test_closed_streams_are_as_empty_ones(weird):
    closed = (
        "import sys\n"
        "from upg_jax.cli import run\n"
        "try:\n"
        "    run()\n"
        "except SystemExit as end:\n"
        "    assert sys.stdin.read() == ''\n"
        "    sys.exit(end.code)\n"
    )
    command = [sys.executable, "-c", closed, "inspect", str(weird)]
    for streams in ("<&- >&-", "<&- >&- 2>&-"):
        shell = ["sh", "-c", f'exec "$@" {streams}', "sh", *command]
        result = subprocess.run(shell, stderr=subprocess.PIPE, text=True, check=False)
        assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.skipif(os.name != "posix", reason="only there a directory goes while a process is in it")
def test_a_current_directory_that_was_removed_is_named_as_the_cause(gguf_model, tmp_path):
    (tmp_path / "removed").mkdir()
    script = 'cd removed && rmdir ../removed && exec "$@"'
    command = [sys.executable, "-c", "from upg_jax.cli import main; main()", "compress", gguf_model, "out"]
    result = subprocess.run(
        ["sh", "-c", script, "sh", *command, "--density", "1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "the current directory has been removed" in result.stderr


@pytest.mark.parametrize("columns", [40, 200])
def test_a_table_is_printed_in_whole_words_on_terminals_of_any_width(capsys, monkeypatch, columns):
    from rich.table import Table

    from upg_jax.cli import _output

    monkeypatch.setattr(_output.stdout, "width", columns)
    table = Table("tensor", "bits per weight")
    table.add_row("model.layers.0.mlp.down_proj.weight", "16.58")
    _output.print_table(table)
    lines = capsys.readouterr().out.splitlines()
    assert any("tensor" in line and "bits per weight" in line for line in lines)
    assert any("model.layers.0.mlp.down_proj.weight" in line and "16.58" in line for line in lines)
    assert max(map(len, lines)) < 70
    assert _output.stdout.width == columns
