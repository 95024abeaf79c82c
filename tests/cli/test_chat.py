"""The terminal chat, run as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from upg_jax import UPGModel


def test_answers_follow_from_the_conversation_and_commands_change_it(upg_jax, gguf_model, tmp_path):
    saved = tmp_path / "said.json"
    lines = [
        "he",
        "two\\",
        "lines",
        f"/save {saved}",
        "/undo",
        "/set max_new_tokens 3",
        "/again",
        "/set nonsense 1",
        "/set top_p 7",
        "/set max_new_tokens 0",
        "/set stop 5",
        "/sav",
        "/system Be brief.",
        "x",
        "/help",
        "y" * 200,
        f"/save {tmp_path / 'last.json'}",
        "/quit",
        "never",
    ]
    said = "\n".join(lines) + "\n"
    options = ("--temperature", "0", "--max-new-tokens", "6")
    result = upg_jax("chat", gguf_model, *options, said=said)
    assert result.returncode == 0
    model = UPGModel.from_file(gguf_model)

    def answer(messages, count):
        ids = model.tokenizer.encode_chat(messages)
        return {"role": "assistant", "content": model.generate(ids, max_new_tokens=count).text}

    messages = []
    for text in ("he", "two\nlines"):
        messages.append({"role": "user", "content": text})
        messages.append(answer(messages, 6))
    assert json.loads(saved.read_text()) == messages
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x"}]
    assert json.loads((tmp_path / "last.json").read_text()) == [*system, answer(system, 3)]
    assert "NAME must be one of" in result.stderr
    assert "top_p must be in (0, 1]; got 7" in result.stderr
    assert "max_new_tokens must be at least 1; got 0" in result.stderr
    assert "stop must be texts of at least one character; got 5" in result.stderr
    assert "there is no /sav\n" in result.stderr
    assert "Ctrl-C stops an answer" in result.stderr
    assert "with this message, which was not taken in, the conversation fills the context" in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="consoles of Windows have no SIGINT to send")
def test_ctrl_c_stops_the_answer_and_not_the_program(gguf_model):
    program = """
import sys, time
from upg_jax.cli import main
from upg_jax.inference import Engine
from upg_jax.inference._answer import Answer
push, submit = Answer.push, Engine.submit
def slowly(self, *arguments):
    time.sleep(0.2)  # for each of 110 tokens: no answer ends by itself before it is stopped
    return push(self, *arguments)
def said(self, requests):
    submit(self, requests)
    print("answering", file=sys.stderr, flush=True)
Answer.push, Engine.submit = slowly, said
main()
"""
    command = [sys.executable, "-c", program, "chat", str(gguf_model), "--max-new-tokens", "110"]
    with subprocess.Popen(
        [*command, "--seed", "1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    ) as process:
        try:
            assert "/help for help" in process.stderr.readline()
            for _ in range(2):  # the second at once
                process.stdin.write("he\n")
                assert process.stderr.readline() == "answering\n"
                process.send_signal(signal.SIGINT)
                assert "stopped" in process.stderr.readline()
            process.stdin.write("/quit\n")
            process.stdin.close()
            assert process.wait(120) == 0
        finally:
            process.kill()


def test_what_ctrl_c_leaves(upg_jax, gguf_model, tmp_path, monkeypatch):
    from upg_jax.cli import _output
    from upg_jax.inference import Engine

    say, submit, shown, submitted = _output.say, Engine.submit, [], []

    def stopped_in_the_middle(text):
        say(text)
        shown.append(text)
        if len(shown) == 4:
            raise KeyboardInterrupt

    def stopped_before_it_begins(self, requests):
        submitted.append(requests)
        if len(submitted) == 2:
            raise KeyboardInterrupt
        submit(self, requests)

    monkeypatch.setattr(_output, "say", stopped_in_the_middle)
    monkeypatch.setattr(Engine, "submit", stopped_before_it_begins)
    lines = ["he", f"/save {tmp_path / 'middle'}", "/again", f"/save {tmp_path / 'before'}", "/quit"]
    result = upg_jax(
        "chat", gguf_model, "--max-new-tokens", "20", "--seed", "1", said="\n".join(lines) + "\n"
    )
    assert result.returncode == 0
    assert "4 said" in result.stderr
    assert "".join(shown)
    expected = [{"role": "user", "content": "he"}, {"role": "assistant", "content": "".join(shown)}]
    assert json.loads((tmp_path / "middle").read_text()) == expected
    assert json.loads((tmp_path / "before").read_text()) == expected


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [("generate", "top-p", "7"), ("generate", "temperature", "-1"), ("chat", "top-k", "0")],
)
def test_settings_that_cannot_be_are_refused_before_a_model_is_opened(upg_jax, command, option, value):
    text = ["hello"] if command == "generate" else []
    result = upg_jax(command, "nothing", *text, f"--{option}", value)
    assert result.returncode == 2
    assert f"{option.replace('-', '_')} must be" in result.stderr
    assert "nothing" not in result.stderr


def test_a_key_that_no_client_can_send_is_refused_before_a_model_is_opened(upg_jax):
    result = upg_jax("serve", "nothing", "--api-key", "s\u00e9cret")
    assert result.returncode == 2
    assert "ASCII" in result.stderr
