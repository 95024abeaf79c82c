"""The terminal chat, run as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

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
    assert "stop must be texts of at least one character; got 5" in result.stderr
    assert "there is no /sav\n" in result.stderr
    assert "Ctrl-C stops an answer" in result.stderr
    assert "with this message, which was not taken in, the conversation fills the context" in result.stderr


def test_ctrl_c_stops_the_answer_and_not_the_program(gguf_model, tmp_path):
    saved = tmp_path / "said.json"
    command = [sys.executable, "-m", "upg_jax.cli", "chat", str(gguf_model), "--max-new-tokens", "110"]
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
            process.stdin.write("he\n")
            time.sleep(0.5)  # it compiles, which takes longer
            process.send_signal(signal.SIGINT)
            assert "stopped" in process.stderr.readline()
            process.stdin.write(f"/save {saved}\n/quit\n")
            process.stdin.close()
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert json.loads(saved.read_text())[0] == {"role": "user", "content": "he"}
