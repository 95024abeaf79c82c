"""Chat templates: the checkpoint's Jinja program, run in a sandbox with what Hugging Face's templates expect."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from upg_jax._errors import CheckpointError, MissingDependencyError

Message: TypeAlias = Mapping[str, Any]
"""One turn of a conversation: `{"role": "user", "content": "Hello"}`."""


class ChatTemplate:
    """A compiled template.

    Templates come with models and are programs of strangers: they run in Jinja's immutable sandbox, which reaches
    neither Python's internals nor files, and cannot change the messages.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._template: Any = None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Renders a conversation.

        Raises:
            CheckpointError: if the template is malformed or refuses the messages, with its reason.
            MissingDependencyError: if jinja2 is not installed.
        """
        try:
            import jinja2  # noqa: F401
        except ImportError as e:
            raise MissingDependencyError('chat template: needs jinja2; pip install "upg-jax[hf]"') from e
        try:
            if self._template is None:
                self._template = _environment().from_string(self.source)
            return self._template.render(
                # Plain data only: methods of richer objects would be within the template's reach.
                messages=json.loads(json.dumps(list(messages))),
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except Exception as e:  # a stranger's program may fail in any way
            raise CheckpointError(f"chat template: {e}") from e


def _environment() -> Any:
    import jinja2
    import jinja2.exceptions
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox
    import jinja2.utils

    class GenerationBlock(jinja2.ext.Extension):
        """`{% generation %}` marks the assistant's words for training; here it only passes them on."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    def refuse_underscore(name: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace must not hold names like {name!r}")

    class Namespace(jinja2.utils.Namespace):
        """Jinja's own, less the names through which a template could reach Python's internals."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            values = dict(*args, **kwargs)
            for name in values:
                refuse_underscore(name)
            super().__init__(values)

        def __setitem__(self, name: str, value: Any) -> None:
            refuse_underscore(name)
            super().__setitem__(name, value)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    environment.globals["namespace"] = Namespace
    return environment
