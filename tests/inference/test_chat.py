"""Chat templates render as in `transformers`, and cannot leave their sandbox."""

from __future__ import annotations

import contextlib
import datetime
import sys

import pytest

from upg_jax import CheckpointError, MissingDependencyError
from upg_jax.inference import Tokenizer
from upg_jax.inference._chat import ChatTemplate

pytest.importorskip("jinja2", reason='pip install "upg-jax[hf]"')

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'What is <b>"é"</b>?'},
    {"role": "assistant", "content": " A letter. "},
    {"role": "user", "content": "Thanks\n"},
]
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
        " + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
        "{% set system = false %}{% endif %}{% for m in loop_messages %}"
        "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
        "{% endif %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "json and whitespace": (
        "{%- for m in messages %}\n    {% if loop.last %}\n  {{ m | tojson }}\n  {% endif %}\n"
        "{%- endfor %}\n{{ messages | tojson(indent=2) }}"
    ),
    "loop controls and generation": (
        "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% if loop.index0 == 2 %}{% break %}{% endif %}"
        "{% endfor %}"
    ),
    "namespace": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + m.content|length %}"
        "{% endfor %}{{ ns.n }}{{ dict(a=1)['a'] }}"
    ),
    "tools": "{% if tools is defined and tools %}yes{% else %}no{% endif %}{{ documents is none }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_templates_render_as_in_transformers(name, add_generation_prompt):
    utils = pytest.importorskip(
        "transformers.utils.chat_template_utils", reason='pip install "upg-jax[oracle]"'
    )
    rendered, _ = utils.render_jinja_template(
        conversations=[MESSAGES],
        chat_template=TEMPLATES[name],
        add_generation_prompt=add_generation_prompt,
        **SPECIAL,
    )
    template = ChatTemplate(TEMPLATES[name], SPECIAL)
    assert template.render(MESSAGES, add_generation_prompt=add_generation_prompt) == rendered[0]


def test_the_date_can_be_written():
    template = ChatTemplate("{{ strftime_now('%Y') }}", {})
    assert template.render([]) in {str(datetime.datetime.now().year - k) for k in (0, 1)}


def test_a_refusal_of_the_template_is_passed_on():
    with pytest.raises(CheckpointError, match="chat template: roles must alternate"):
        ChatTemplate(TEMPLATES["llama2"], SPECIAL).render(MESSAGES[1:2] * 2)


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        ("{% for", []),
        ("{{ messages[0]['content'] + 1 }}", [{"content": "a"}]),
        ("{{ 1 // 0 }}", []),
        ("{{ messages }}", [{"content": object()}]),
    ],
    ids=["syntax", "type", "arithmetic", "not plain data"],
)
def test_a_template_that_fails_is_an_error_of_the_checkpoint(source, messages):
    with pytest.raises(CheckpointError, match="chat template: "):
        ChatTemplate(source, {}).render(messages)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__code__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ ''.__class__ }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ self.__init__.__globals__ }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source):
    messages = [{"role": "user", "content": "Hi"}]
    # What is out of bounds counts as undefined: it prints as nothing, and any use of it is an error.
    with contextlib.suppress(CheckpointError):
        assert ChatTemplate(source, {}).render(messages) == ""
    assert messages == [{"role": "user", "content": "Hi"}]


def test_a_model_without_a_template_says_so():
    with pytest.raises(CheckpointError, match="this model has no chat template"):
        Tokenizer(None).render_chat(MESSAGES)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "upg-jax\[hf\]"'):
        ChatTemplate("x", {}).render([])
