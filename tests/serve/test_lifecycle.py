"""Requests that come and go: slots are freed at once, limits hold, and a server ends cleanly."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from helpers.serving import serving

from upg_jax.inference._answer import Answer

httpx = pytest.importorskip("httpx", reason='pip install "upg-jax[test]"')

JSON = "Content-Type: application/json\r\n"
LONG = {"model": "small", "prompt": "he", "max_tokens": 120, "ignore_eos": True}


@contextlib.contextmanager
def raw_post(address, body, path="/v1/completions"):
    """A request by hand; yields its socket."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\n{JSON}Content-Length: {len(data)}\r\n\r\n".encode()
    with socket.create_connection(address, timeout=60) as connection:
        connection.sendall(head + data)
        yield connection


@pytest.fixture
def server_errors(caplog):
    """What the server's libraries log as errors, tracebacks for example; to be asked after one more request."""
    logger = logging.getLogger("uvicorn")
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.ERROR, "uvicorn.error"):
        yield lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    logger.removeHandler(caplog.handler)


@pytest.fixture
def cancelled(http):
    """Counts requests whose clients went away."""
    return lambda: int(re.search(r"upg_jax_cancelled_total (\d+)", http.get("/metrics").text)[1])


@pytest.fixture
def held(engine, monkeypatch):
    """Holds the engine up as soon as all slots are used, until this event is set; has the tokens said so far."""
    go_on, push = threading.Event(), Answer.push
    go_on.tokens = 0

    def later(self, *arguments):
        if engine.running == engine.slots:
            assert go_on.wait(60)
        go_on.tokens += 1
        return push(self, *arguments)

    monkeypatch.setattr(Answer, "push", later)
    yield go_on
    go_on.set()


def wait_until(true):
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_slots_at_once(address, engine, cancelled, idle, stream, held):
    before = cancelled()
    prompts = {**LONG, "prompt": ["he", "x", "y", "z"], "stream": stream}
    with raw_post(address, prompts) as connection:
        wait_until(lambda: engine.running == 3)
        if stream:
            assert connection.recv(1000)
    wait_until(lambda: cancelled() == before + 1)
    said = held.tokens
    held.set()
    assert idle()
    assert held.tokens <= said + 1  # the one that was held up


def test_a_client_that_sends_more_and_goes_away_frees_its_slots_at_once(
    address, engine, cancelled, idle, held
):
    before = cancelled()
    with raw_post(address, {**LONG, "prompt": ["he", "x", "y", "z"]}) as connection:
        wait_until(lambda: engine.running == 3)
        connection.sendall(b"G")
        time.sleep(0.02)
    wait_until(lambda: cancelled() == before + 1)
    held.set()
    assert idle()


def test_a_slow_reader_holds_no_slot(address, idle, http):
    with raw_post(address, {**LONG, "stream": True, "logprobs": 5}) as connection:
        connection.recv(10)
        assert idle()
        assert http.get("/health").status_code == 200
        said = b""
        while b"[DONE]" not in said:
            said += connection.recv(100_000)
    assert said.count(b"data: {") == 121  # the last says why it ended


def test_a_stream_that_nobody_reads_is_cut_off_without_an_error_in_the_log(server_errors, caplog):
    from starlette.applications import Starlette
    from starlette.routing import Route

    from upg_jax.serve._connection import EventStream

    ended = threading.Event()

    async def more_than_any_buffer_holds():
        while True:
            yield "x" * 1_000_000

    async def endless(request):
        deadline = asyncio.get_running_loop().time() - 0.5  # a moment is left for what is said last
        return EventStream(more_than_any_buffer_holds(), ended.set, deadline)

    with (
        serving(Starlette(routes=[Route("/", endless)])) as address,
        socket.create_connection(address, timeout=20) as connection,
    ):
        # This server's configuration has just replaced the handlers and the level.
        logging.getLogger("uvicorn").addHandler(caplog.handler)
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert ended.wait(20)
        with contextlib.suppress(ConnectionResetError):  # by how much of it was still on its way
            while connection.recv(1_000_000):
                pass
    assert server_errors() == []


def test_an_answer_that_its_handler_left_unfinished_is_an_error_in_the_log(server_errors, caplog):
    async def unfinished(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    with serving(unfinished) as address, socket.create_connection(address, timeout=20) as connection:
        # This server's configuration has just replaced the handlers and the level.
        logging.getLogger("uvicorn").addHandler(caplog.handler)
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        while connection.recv(1000):
            pass
    assert server_errors() == ["ASGI callable returned without completing response."]


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\xff\x17garbage\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{JSON}Transfer-Encoding: chunked\r\n\r\nZZ\r\n".encode(),
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{JSON}Content-Length: 500\r\n\r\n{{".encode(),
        b"POST /v1/completions HTTP/1.1\r\n" + b"A: b\r\n" * 20_000 + b"\r\n",
        b"GET /v1/models/../../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
        # Answered at once, and then malformed.
        b"POST /nowhere HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
    ],
    ids=range(10),
)
def test_malformed_http_is_refused_and_the_server_lives_on(address, http, server_errors, data):
    with socket.create_connection(address, timeout=5) as connection, contextlib.suppress(OSError):
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(1000)
        assert answer == b"" or answer.split()[1][:1] == b"4"
        assert b"root:" not in answer
    assert http.get("/health").json() == {"status": "ok"}
    assert server_errors() == []


def test_a_body_that_goes_wrong_after_the_answer_ends_its_connection(address, http, server_errors):
    with socket.create_connection(address, timeout=5) as connection:
        connection.sendall(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        answer = connection.recv(1000)
        while not answer.endswith(b"}}"):
            answer += connection.recv(1000)
        assert answer.split()[1] == b"404"
        connection.sendall(b"ZZ\r\n")
        assert connection.recv(1000) == b""
    assert http.get("/health").json() == {"status": "ok"}
    assert server_errors() == []


def test_a_body_may_have_as_many_bytes_as_the_limit_and_no_more(http):
    for length, status in ((20_000, 200), (20_001, 413)):
        body = json.dumps({**LONG, "max_tokens": 1}).ljust(length)
        assert http.post("/v1/completions", content=body).status_code == status


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_refused(http, chunked):
    content = b" " * 30_000
    response = http.post("/v1/completions", content=iter([content]) if chunked else content)
    assert response.status_code == 413
    assert "may have 20000 bytes" in response.json()["error"]["message"]


def test_more_requests_than_may_wait_are_told_to_come_again(http, engine, idle, held):
    assert idle()
    # Three slots and four places to wait.
    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        jobs = [pool.submit(http.post, "/v1/completions", json=LONG) for _ in range(9)]
        wait_until(lambda: sum(job.done() for job in jobs) == 2)
        held.set()
        responses = [job.result() for job in jobs]
    busy = [r for r in responses if r.status_code == 429]
    assert [r.headers["retry-after"] for r in busy] == ["1", "1"]
    assert busy[0].json()["error"]["type"] == "rate_limit_error"
    assert sorted(r.status_code for r in responses) == [200] * 7 + [429] * 2
    assert idle()
    assert http.post("/v1/completions", json={**LONG, "n": 6, "max_tokens": 1}).status_code == 200


def test_a_server_of_its_own_has_a_key_a_time_limit_and_origins(engine, idle, held):
    from upg_jax.serve import Limits, create_app

    app = create_app(
        engine, name="small", limits=Limits(seconds=1), api_key="se~cret", cors_origins=["https://page"]
    )
    endless = {**LONG, "n": engine.slots}
    with serving(app) as (host, port), httpx.Client(base_url=f"http://{host}:{port}", timeout=60) as http:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            response = http.post("/v1/completions", json=endless, headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["type"] == "authentication_error"
        assert http.get("/health").status_code == 200
        key = {"Authorization": "Bearer se~cret", "Origin": "https://page"}
        response = http.post("/v1/completions", json=endless, headers=key)
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "timeout"
        assert response.headers["access-control-allow-origin"] == "https://page"
        response = http.post("/v1/completions", json={**endless, "stream": True}, headers=key)
        assert '"code": "timeout"' in response.text
        assert response.text.endswith("data: [DONE]\n\n")
    held.set()
    assert idle()


def test_no_page_of_another_origin_may_use_it_by_default(http):
    response = http.get("/v1/models", headers={"Origin": "https://page"})
    assert "access-control-allow-origin" not in response.headers


def test_metrics_are_what_prometheus_reads(http, idle):
    parser = pytest.importorskip("prometheus_client.parser", reason='pip install "upg-jax[test]"')

    def samples():
        families = parser.text_string_to_metric_families(http.get("/metrics").text)
        return {(s.name, *sorted(s.labels.items())): s.value for family in families for s in family.samples}

    before = samples()
    response = http.post("/v1/completions", json={**LONG, "max_tokens": 7})
    assert response.json()["usage"]["completion_tokens"] == 7
    assert idle()
    after = samples()
    prompt = response.json()["usage"]["prompt_tokens"]
    assert after["upg_jax_generated_tokens_total",] - before["upg_jax_generated_tokens_total",] == 7
    assert after["upg_jax_prompt_tokens_total",] - before["upg_jax_prompt_tokens_total",] == prompt
    assert after["upg_jax_first_token_seconds_count",] - before["upg_jax_first_token_seconds_count",] == 1
    assert after["upg_jax_slots",] == 3
    assert after["upg_jax_slots_used",] == 0
    key = ("upg_jax_requests_total", ("path", "/v1/completions"), ("status", "200"))
    assert after[key] - before.get(key, 0) == 1


def test_the_command_serves_and_finishes_its_streams_when_told_to_end(tmp_path):
    from small_models import byte_level

    path = byte_level.write(tmp_path / "small.gguf")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "upg_jax.cli", "serve", str(path), "--port", str(port), "--slots", "2",
               "--chunk", "16", "--context", "128"]  # fmt: skip
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            said = process.stderr.readline()
            assert "serving small.gguf on http://127.0.0.1" in said
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
                deadline = time.monotonic() + 20
                while True:
                    with contextlib.suppress(httpx.ConnectError):
                        if http.get("/health").status_code == 200:
                            break
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
                body = {**LONG, "model": "small.gguf", "stream": True}
                half_sent = socket.create_connection(("127.0.0.1", port), timeout=20)
                head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n{JSON}Content-Length: 50\r\n\r\n"
                half_sent.sendall(head.encode() + b"{")
                with half_sent, http.stream("POST", "/v1/completions", json=body) as response:
                    lines = response.iter_lines()
                    next(lines)
                    process.send_signal(signal.SIGTERM)
                    rest = [line for line in lines if line]
                    assert half_sent.recv(1000).startswith(b"HTTP/1.1 503 ")
            assert rest[-1] == "data: [DONE]"
            assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
            assert process.wait(20) in (0, -signal.SIGTERM)
        finally:
            process.kill()


def test_a_signal_ends_the_command_while_the_model_loads():
    """By a handler of its own: the first process of a container has no other way of being ended by SIGTERM."""
    program = """
import os, signal, sys, time
from upg_jax.cli import main
from upg_jax.inference import UPGModel
def from_file(*args, **more):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
UPGModel.from_file = from_file
sys.argv = ["upg-jax", "serve", "model", "--port", sys.argv[1]]
main()
"""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ended = subprocess.run([sys.executable, "-c", program, str(port)], timeout=50, check=False)
    assert ended.returncode == 130


def test_a_port_that_is_taken_is_refused_before_a_model_loads_and_nobody_connects_before_it_has():
    from upg_jax import UPGError
    from upg_jax.serve import bind

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            UPGError, match=f"cannot listen on 127.0.0.1, port {port}: .*; choose another --port"
        ):
            bind("127.0.0.1", port)
    with bind("127.0.0.1", port), pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_threads_end_with_their_servers():
    names = [thread.name for thread in threading.enumerate()]
    assert names.count("upg-jax engine") == 1
