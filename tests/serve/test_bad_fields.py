"""Every bad field is refused with an error of OpenAI's shape that names it."""

from __future__ import annotations

import json

import pytest

CHAT = {"model": "small", "messages": [{"role": "user", "content": "he"}], "max_tokens": 2}
COMPLETION = {"model": "small", "prompt": "he", "max_tokens": 2}
WRONG_TYPES = ["1", [], {}, True]

CHAT_CASES = [
    ("model", [None, 1, []]),
    ("messages", [None, [], "he", {}, [{"role": "user", "content": "x" * 200}]]),
    ("messages[0]", [["he"]]),
    (
        "messages[0].role",
        [
            [{"content": "he"}],
            [{"role": "root", "content": "he"}],
            [{"role": 1, "content": "he"}],
            [{"role": "tool", "content": "he", "tool_call_id": "x"}],
        ],
    ),
    ("messages[0].content", [[{"role": "user"}], [{"role": "user", "content": 1}]]),
    ("messages[0].content", [[{"role": "user", "content": "\ud800"}]]),
    ("messages[0].content[0]", [[{"role": "user", "content": ["he"]}]]),
    (
        "messages[0].content[0].type",
        [[{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]],
    ),
    ("messages[0].content[0].text", [[{"role": "user", "content": [{"type": "text"}]}]]),
    (
        "messages[0].content[0].evil",
        [[{"role": "user", "content": [{"type": "text", "text": "he", "evil": 1}]}]],
    ),
    *(
        (f"messages[0].{key}", [[{"role": "assistant", "content": "he", key: value}]])
        for key, value in {
            "name": "bob",
            "refusal": "no",
            "audio": {"id": "x"},
            "tool_calls": [{"id": "x"}],
            "function_call": {"name": "f"},
            "tool_call_id": "x",
            "evil": None,
        }.items()
    ),
    ("max_tokens", [0, -1, 1.5, 10**30, *WRONG_TYPES]),
    ("max_completion_tokens", [0, 129, *WRONG_TYPES]),
    ("temperature", [-0.1, 2.1, 10**400, *WRONG_TYPES]),
    ("top_p", [-0.1, 1.1, *WRONG_TYPES]),
    ("min_p", [-0.1, 1.1, *WRONG_TYPES]),
    ("top_k", [-2, 0.5, 2**40, *WRONG_TYPES]),
    ("repetition_penalty", [0, -1, *WRONG_TYPES]),
    ("presence_penalty", [-2.1, 2.1, *WRONG_TYPES]),
    ("frequency_penalty", [-2.1, 2.1, *WRONG_TYPES]),
    ("seed", [0.5, 2**63, -(2**64), *WRONG_TYPES]),
    ("n", [0, -1, 7, 10**10, 0.5, *WRONG_TYPES]),
    ("stop", ["", [""], [1], {}, True, ["x"] * 17, "x" * 129, ["x", "y" * 129]]),
    ("stream", [1, "true", []]),
    ("stream_options", [{"include_usage": True}, 1]),
    ("logprobs", [1, "true"]),
    ("top_logprobs", [3, -1, 21, "1"]),
    ("logit_bias", [[], {"a": 1}, {"-1": 1}, {"320": 1}, {"1": 101}, {"1": "1"}, {"1": True}, {"1" * 50: 1}]),
    ("logit_bias", [{f"{i % 300:0{3 + i // 300}}": 1 for i in range(1025)}]),
    ("tools", [[{"type": "function"}], 1]),
    ("response_format", [{"type": "json_object"}, 1]),
    ("nonsense", [1]),
]
COMPLETION_CASES = [
    ("prompt", [None, "", [], [""], [[]], [-1], [320], [1.5], [True], {}, 1, [["a"]], "x" * 200, [1] * 200]),
    ("max_tokens", [0, 129]),
    ("logprobs", [-1, 6, True, "1"]),
    ("echo", [1]),
    ("suffix", ["x"]),
    ("best_of", [3, True]),
]


def refused(http, path, body, param):
    response = http.post(path, json=body)
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["param"] == param
    assert len(error["message"]) < 400


def cases(listed):
    return [
        pytest.param(name, value, id=f"{name}-{i}")
        for name, values in listed
        for i, value in enumerate(values)
    ]


@pytest.mark.parametrize(("name", "value"), cases(CHAT_CASES))
def test_a_bad_field_of_a_chat_is_named(http, name, value):
    field = name.partition("[")[0]
    if name == "temperature" and value == 10**400:
        # httpx writes what JSON allows; Python itself refuses to read so long a number.
        response = http.post("/v1/chat/completions", content=b'{"temperature": 1' + b"0" * 5000 + b"}")
        assert response.status_code == 400
        return
    body = {**CHAT, field: value}
    if "\\ud800" in ascii(value):
        response = http.post("/v1/chat/completions", content=json.dumps(body))
        assert response.json()["error"]["param"] == name
        return
    refused(http, "/v1/chat/completions", body, name)


@pytest.mark.parametrize(("name", "value"), cases(COMPLETION_CASES))
def test_a_bad_field_of_a_completion_is_named(http, name, value):
    refused(http, "/v1/completions", {**COMPLETION, name: value}, name)


def test_a_field_whose_name_is_no_text_is_refused(http):
    response = http.post("/v1/chat/completions", content=b'{"model": "small", "\\ud800": 2}')
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")


def test_an_unknown_option_of_a_stream_is_named(http):
    body = {**CHAT, "stream": True, "stream_options": {"include_usage": True, "evil": 1}}
    refused(http, "/v1/chat/completions", body, "stream_options.evil")


@pytest.mark.parametrize(
    "name",
    ["max_tokens", "max_completion_tokens", "temperature", "top_p", "min_p", "top_k", "repetition_penalty", "seed", "n",
     "presence_penalty", "frequency_penalty", "top_logprobs", "stop", "stream", "logprobs"],
)  # fmt: skip
@pytest.mark.parametrize("number", ["1e999", "-1e999"])
def test_a_number_that_python_takes_for_infinity_is_refused(http, name, number):
    content = f'{{"{name}": {number}, "logprobs": true, {json.dumps(CHAT)[1:]}'
    if name in CHAT or name == "logprobs":
        content = content.replace(f'"{name}": {CHAT.get(name, "true")}', f'"{name}": {number}')
    response = http.post("/v1/chat/completions", content=content)
    assert (response.status_code, response.json()["error"]["param"]) == (400, name)


@pytest.mark.parametrize("value", ['{"1": 1e999}', '{"1": -1e999}'])
def test_an_infinite_bias_is_refused(http, value):
    response = http.post("/v1/chat/completions", content=f'{{"logit_bias": {value}, {json.dumps(CHAT)[1:]}')
    assert (response.status_code, response.json()["error"]["param"]) == (400, "logit_bias")


@pytest.mark.parametrize("value", ["1e999", "[1e999]", "[1, 1e999]", "[[1e999]]"])
def test_a_prompt_of_infinite_numbers_is_refused(http, value):
    content = f'{{"prompt": {value}, "model": "small"}}'
    response = http.post("/v1/completions", content=content)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")


def test_a_complaint_shows_the_number(http):
    for value, shown in ((1e9, "1000000000.0"), (-3, "-3")):
        response = http.post("/v1/completions", json={**COMPLETION, "max_tokens": value})
        assert response.json()["error"]["message"].endswith(f"; got {shown}")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"1",
        b'"x"',
        b"\xff\xfe",
        b'{"temperature": NaN}',
        b'{"temperature": Infinity}',
        b"[" * 19_000,
        b'{"a":' * 3000,
    ],
)
def test_what_is_no_json_object_is_refused(http, content):
    response = http.post("/v1/chat/completions", content=content)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_fields_that_change_nothing_are_accepted(http):
    neutral = {"user": "me", "metadata": {"a": "b"}, "tools": [], "tool_choice": "auto", "stop": None, "seed": None,
               "response_format": {"type": "text"}, "top_k": -1, "logit_bias": {}, "n": 1, "top_p": 0}  # fmt: skip
    assert http.post("/v1/chat/completions", json={**CHAT, **neutral}).status_code == 200
    parts = [
        {"role": "developer", "content": [{"type": "text", "text": "he"}, {"type": "text", "text": "x"}]}
    ]
    assert http.post("/v1/chat/completions", json={**CHAT, "messages": parts}).status_code == 200


def test_values_at_their_limits_are_accepted(http):
    biases = {f"{i % 300:0{3 + i // 300}}": 100 * (-1) ** i for i in range(1024)}
    stops = [chr(ord("a") + i) * 128 for i in range(16)]
    body = {**CHAT, "logit_bias": biases, "stop": stops, "n": 6, "top_k": 0}
    assert http.post("/v1/chat/completions", json=body).status_code == 200


def test_a_prompt_and_its_answer_may_fill_the_context_and_no_more(http):
    body = {**COMPLETION, "prompt": [[70], [70] * 126], "ignore_eos": True}
    response = http.post("/v1/completions", json=body)
    assert [choice["finish_reason"] for choice in response.json()["choices"]] == ["length"] * 2
    response = http.post("/v1/completions", json={**body, "max_tokens": 3})
    assert response.json()["error"]["code"] == "context_length_exceeded"
    chat = {key: CHAT[key] for key in ("model", "messages")}
    response = http.post("/v1/chat/completions", json={**chat, "ignore_eos": True})
    assert response.json()["usage"]["total_tokens"] == 128


def test_unknown_paths_and_methods_have_errors_of_the_same_shape(http):
    for method, path, status in [
        ("GET", "/nowhere", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/health", 405),
    ]:
        response = http.request(method, path)
        assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"
