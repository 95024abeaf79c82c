"""Answers in OpenAI's shapes: whole, and in pieces."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from upg_jax.inference import Tokenizer, TokenLogprobs
from upg_jax.serve._requests import Job


class Writer:
    """Writes the answers to one job."""

    def __init__(self, job: Job, model_name: str, tokenizer: Tokenizer | None) -> None:
        self._job = job
        self._tokenizer = tokenizer
        kind = "chat.completion" if job.chat else "text_completion"
        self._kind = f"{kind}.chunk" if job.chat and job.stream else kind
        self._head = {
            "id": f"{'chatcmpl' if job.chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": self._kind,
            "created": int(time.time()),
            "model": model_name,
        }
        self._offsets = [len(self._prompt_text(choice)) for choice in range(len(job.prompts) * job.n)]

    def _prompt_text(self, choice: int) -> str:
        if not self._job.echo or self._tokenizer is None:
            return ""
        return self._tokenizer.decode(self._job.prompts[choice // self._job.n])

    def whole(
        self,
        texts: Sequence[str],
        reasons: Sequence[str],
        logprobs: Sequence[list[TokenLogprobs]],
        tokens: int,
    ) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        choices = []
        for i, (text, reason, entries) in enumerate(zip(texts, reasons, logprobs, strict=True)):
            said = (
                {"message": {"role": "assistant", "content": text, "refusal": None}}
                if self._job.chat
                else {"text": self._prompt_text(i) + text}
            )
            choices.append(self._choice(i, said, reason, entries))
        return {**self._head, "choices": choices, "usage": self._usage(tokens)}

    def beginnings(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        choices = range(len(self._job.prompts) * self._job.n)
        if self._job.chat:
            return [self._chunk(i, {"delta": {"role": "assistant", "content": ""}}) for i in choices]
        return [self._chunk(i, {"text": self._prompt_text(i)}) for i in choices] if self._job.echo else []

    def piece(
        self, choice: int, text: str, entries: list[TokenLogprobs], reason: str | None = None
    ) -> dict[str, Any]:
        """A part of an answer, or its end."""
        if not self._job.chat:
            return self._chunk(choice, {"text": text}, reason, entries)
        delta = {"content": text} if text or reason is None else {}
        return self._chunk(choice, {"delta": delta}, reason, entries)

    def usage(self, tokens: int) -> dict[str, Any]:
        """The last piece, where numbers of tokens are asked for."""
        return {**self._head, "choices": [], "usage": self._usage(tokens)}

    def _chunk(
        self,
        choice: int,
        said: dict[str, Any],
        reason: str | None = None,
        entries: Sequence[TokenLogprobs] = (),
    ) -> dict[str, Any]:
        usage = {"usage": None} if self._job.include_usage else {}
        return {**self._head, "choices": [self._choice(choice, said, reason, entries)], **usage}

    def _choice(
        self, index: int, said: dict[str, Any], reason: str | None, entries: Sequence[TokenLogprobs]
    ) -> dict[str, Any]:
        logprobs = None
        if entries:
            logprobs = self._chat_logprobs(entries) if self._job.chat else self._logprobs(index, entries)
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}

    def _usage(self, tokens: int) -> dict[str, int]:
        prompt = sum(map(len, self._job.prompts))
        return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}

    def _chat_logprobs(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        def of(token: int, logprob: float) -> dict[str, Any]:
            text, data = self._token(token)
            return {"token": text, "logprob": logprob, "bytes": None if data is None else list(data)}

        content = [
            {**of(entry.token, entry.logprob), "top_logprobs": [of(*pair) for pair in entry.top]}
            for entry in entries
        ]
        return {"content": content, "refusal": None}

    def _logprobs(self, choice: int, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        offsets = []
        for entry in entries:
            offsets.append(self._offsets[choice])
            self._offsets[choice] += len(self._token(entry.token)[0])
        return {
            "tokens": [self._name(entry.token) for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [{self._name(t): logprob for t, logprob in entry.top} for entry in entries],
            "text_offset": offsets,
        }

    def _name(self, token: int) -> str:
        """A token's text, or its bytes where they are part of a character."""
        text, data = self._token(token)
        known = "\ufffd" not in text or data is None
        return text if known else "bytes:" + "".join(f"\\x{byte:02x}" for byte in data or b"")

    def _token(self, token: int) -> tuple[str, bytes | None]:
        if self._tokenizer is None:
            return f"token_id:{token}", None
        return self._tokenizer.decode([token], skip_special_tokens=False), self._tokenizer.token_bytes(token)
