"""One answer as it grows: its text, its stop strings, and why it ended. Host only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from upg_jax.inference._logprobs import TokenLogprobs
from upg_jax.inference._settings import GenerationSettings
from upg_jax.inference._tokenizer import TextStream, Tokenizer

FinishReason = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class Generation:
    """An answer.

    Attributes:
        ids: its tokens. An EOS token that ended it is not among them; the token that completed a stop text is.
        text: its text without special tokens, up to a stop text; None for a model without a tokenizer.
        prompt_tokens: how many tokens the prompt had.
        finish_reason: `"stop"` if an EOS token or a stop text ended it, `"length"` if `max_new_tokens` did.
        logprobs: those of each of `ids`; None if they were not asked for.
    """

    ids: list[int]
    text: str | None
    prompt_tokens: int
    finish_reason: FinishReason
    logprobs: list[TokenLogprobs] | None = None


@dataclasses.dataclass(frozen=True)
class StreamedToken:
    """One token of an answer as it comes.

    Attributes:
        id: the token; None in the last item, which brings what is left of the text.
        text: what can be shown now; empty while a character is incomplete or a stop text may have begun, and for a
            model without a tokenizer.
        finish_reason: set in the last item.
        logprobs: of the token, if they were asked for.
    """

    id: int | None
    text: str
    finish_reason: FinishReason | None = None
    logprobs: TokenLogprobs | None = None


class Answer:
    """Collects the tokens of one answer until it ends.

    Attributes:
        ids: its tokens so far.
        finish_reason: None until it has ended.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, settings: GenerationSettings, eos_token_ids: Sequence[int]
    ) -> None:
        if settings.stop_texts and tokenizer is None:
            raise ValueError("generate: stop texts need a tokenizer, which this model does not have")
        self.ids: list[int] = []
        self.finish_reason: FinishReason | None = "length" if settings.max_new_tokens == 0 else None
        self._settings = settings
        self._eos = frozenset(eos_token_ids if settings.stop_at_eos else ())
        self._text = None if tokenizer is None else TextStream(tokenizer)
        self._held = ""
        self._stopped = False

    def push(self, token: int, logprobs: TokenLogprobs | None = None) -> StreamedToken | None:
        """Adds a token; returns what it shows, None for one that is not part of the answer."""
        if token in self._eos:
            self.finish_reason = "stop"
            return None
        self.ids.append(token)
        text = "" if self._text is None else self._show(self._text.push(token))
        if self.finish_reason is None and len(self.ids) == self._settings.max_new_tokens:
            self.finish_reason = "length"
        return StreamedToken(token, text, logprobs=logprobs)

    def finish(self) -> StreamedToken:
        """The last item: what was held back, and the reason for ending."""
        text = ""
        if self._text is not None and not self._stopped:
            text = self._show(self._text.finish())
            if not self._stopped:
                text, self._held = text + self._held, ""
        assert self.finish_reason is not None
        return StreamedToken(None, text, self.finish_reason)

    def _show(self, text: str) -> str:
        """Passes on text up to a stop text, holding back what may be the beginning of one."""
        text = self._held + text
        found = [at for stop in self._settings.stop_texts if (at := text.find(stop)) >= 0]
        if found:
            self.finish_reason, self._stopped, self._held = "stop", True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._settings.stop_texts), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest beginning of `stop`, less than all of it, that `text` ends with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
