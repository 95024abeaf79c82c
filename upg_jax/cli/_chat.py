"""`upg-jax chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import queue
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from upg_jax.cli._options import (
    DtypeOption,
    FrequencyOption,
    MinPOption,
    ModelArgument,
    PackOption,
    PresenceOption,
    RepetitionOption,
    SeedOption,
    StopOption,
    SystemOption,
    TopKOption,
    TopPOption,
    settings_among,
)

if TYPE_CHECKING:
    from upg_jax.inference import Engine

_HELP = """\
/help            this
/system [TEXT]   set the system message, or none, and begin again
/new             begin again
/undo            take back your last message and its answer
/again           answer your last message anew
/set NAME VALUE  change a setting: temperature, top_k, top_p, min_p, max_new_tokens, seed, ...
/save FILE       write the conversation as JSON
/quit            leave (also Ctrl-D)
Ctrl-C stops an answer. A line that ends with \\ goes on in the next."""


def chat(
    path: ModelArgument,
    system: SystemOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 1024,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token each time.")] = 0.7,
    top_k: TopKOption = None,
    top_p: TopPOption = 0.95,
    min_p: MinPOption = None,
    repetition_penalty: RepetitionOption = 1.0,
    frequency_penalty: FrequencyOption = 0.0,
    presence_penalty: PresenceOption = 0.0,
    seed: SeedOption = None,
    stop: StopOption = None,
    context: Annotated[int, typer.Option(min=8, help="Tokens of the whole conversation, at most.")] = 4096,
    dtype: DtypeOption = "float32",
    pack: PackOption = None,
) -> None:
    """Talks with a model; /help lists what can be said to the program instead."""
    settings = settings_among(locals())
    from upg_jax.cli._output import status, stderr
    from upg_jax.inference import Engine, UPGModel

    with status(f"opening {path}"):
        model = UPGModel.from_file(path, dtype=dtype, pack=pack)
        engine = Engine(model, slots=1, context=context)
    try:
        stderr.print(f"{path.name}, {engine.context} tokens of context; /help for help", style="dim")
        Conversation(engine, settings, system).run()
    finally:
        engine.close()


class Conversation:
    """A dialogue, and the commands in it."""

    def __init__(self, engine: Engine, settings: dict[str, Any], system: str | None) -> None:
        self._engine, self._settings = engine, settings
        self._system = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = []

    def run(self) -> None:
        """Reads lines until the user leaves."""
        from upg_jax._errors import UPGError
        from upg_jax.cli._interrupts import handled
        from upg_jax.cli._output import stderr

        _enable_line_editing()
        while True:
            try:
                handled()  # the next answer may be stopped as soon as it begins
                line = _read()
            except EOFError:
                return
            except KeyboardInterrupt:
                stderr.print()
                continue
            try:
                if line.startswith("/"):
                    if not self._command(*line[1:].split(maxsplit=1)):
                        return
                elif line.strip():
                    self._ask([*self.messages, {"role": "user", "content": line}])
            except KeyboardInterrupt:
                stderr.print("stopped", style="dim")
            except (UPGError, ValueError, OSError) as e:
                stderr.print(f"{e}", style="red")

    def _ask(self, messages: list[dict[str, str]]) -> None:
        """Answers messages; without an answer they were not said, since templates want one after each."""
        before, self.messages = self.messages, messages
        try:
            self._answer()
        finally:
            if self.messages[-1]["role"] == "user":
                self.messages = before

    def _command(self, name: str = "help", argument: str = "") -> bool:
        """Does what a line with a slash says; returns whether to go on."""
        from upg_jax.cli._output import stderr

        if name in ("quit", "exit", "q"):
            return False
        if name == "system":
            self._system = [{"role": "system", "content": argument}] if argument else []
            self.messages = []
        elif name == "new":
            self.messages = []
        elif name in ("undo", "again"):
            asked = self.messages[:-1]  # all but the last answer
            if name == "undo":
                self.messages = asked[:-1]
            elif asked:
                self._ask(asked)
        elif name == "set":
            self._set(*argument.split(maxsplit=1))
        elif name == "save":
            _save(argument, [*self._system, *self.messages])
        else:
            if name != "help":
                stderr.print(f"there is no /{name}", style="red")
            stderr.print(_HELP, style="dim")
        return True

    def _set(self, name: str = "", value: str = "") -> None:
        import json

        from upg_jax.cli._output import stderr
        from upg_jax.inference import GenerationSettings

        if name not in self._settings:
            raise ValueError(f"/set: NAME must be one of {', '.join(self._settings)}; got {name!r}")
        try:
            parsed = json.loads(value) if value else None
        except ValueError:
            parsed = value
        changed = {**self._settings, name: parsed}
        if GenerationSettings(**changed).max_new_tokens < 1:
            raise ValueError("/set: max_new_tokens must be at least 1; got 0")
        self._settings = changed
        stderr.print(f"{name} = {parsed!r}", style="dim")

    def _answer(self) -> None:
        """Answers the last message; Ctrl-C ends the answer, which stays as far as it came, if it has begun."""
        from upg_jax.cli._output import say, stderr, stdout
        from upg_jax.inference import GenerationSettings, Request

        tokenizer = self._engine.model.tokenizer
        if tokenizer is None:
            raise ValueError("chat: this model has no tokenizer")
        ids = tokenizer.encode_chat([*self._system, *self.messages])
        room = self._engine.context - len(ids)
        if room < 1:
            raise ValueError(
                f"with this message, which was not taken in, the conversation fills the context of "
                f"{self._engine.context} tokens; say less, /undo, /new, or begin with a larger --context"
            )
        settings = {**self._settings, "max_new_tokens": min(self._settings["max_new_tokens"], room)}
        events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        request = Request(ids, GenerationSettings(**settings), events.put)
        self._engine.submit([request])
        pieces, times, reason = list[str](), list[float](), None
        try:
            while reason is None:
                event = events.get()
                if isinstance(event, Exception):
                    raise event
                reason = event.finish_reason
                if event.id is not None:
                    times.append(time.perf_counter())
                pieces.append(event.text)
                say(event.text)
        except KeyboardInterrupt:
            reason = "stopped"
        finally:
            self._engine.cancel(request)
        stdout.print()
        text = "".join(pieces)
        if text or reason != "stopped":
            self.messages.append({"role": "assistant", "content": text})
        rate = (len(times) - 1) / max(times[-1] - times[0], 1e-9) if len(times) > 1 else 0.0
        ended = (
            "" if reason == "stop" else f", {'cut off by max_new_tokens' if reason == 'length' else reason}"
        )
        stderr.print(f"{len(ids)} tokens read, {len(times)} said, {rate:.1f} tokens/s{ended}", style="dim")


def _read() -> str:
    """A message, which may go on over lines that end with a backslash."""
    prompt = "> " if sys.stdin.isatty() else ""
    lines = [input(prompt)]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input("… " if prompt else ""))
    return "\n".join(lines)


def _save(file: str, messages: list[dict[str, str]]) -> None:
    import json

    from upg_jax.io._atomic import replacing

    if not file:
        raise ValueError("/save: needs a file name")
    with replacing(Path(file)) as temporary:
        temporary.write_text(json.dumps(messages, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _enable_line_editing() -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # importing it gives `input` editing and history
