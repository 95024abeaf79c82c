"""What no client can do: take its time with a body, or have any number of prompts tokenized; and a failed engine."""

from __future__ import annotations

import concurrent.futures
import contextlib
import socket
import threading
import time

import pytest
from helpers.serving import serving

from upg_jax import UPGError
from upg_jax.inference import Engine

httpx = pytest.importorskip("httpx", reason='pip install "upg-jax[test]"')

SHORT = {"model": "small", "messages": [{"role": "user", "content": "he"}], "max_tokens": 1}
CHAT = "/v1/chat/completions"


def test_a_body_that_takes_too_long_is_refused(engine):
    from upg_jax.serve import Limits, create_app

    app = create_app(engine, name="small", limits=Limits(body_seconds=0.3))
    with serving(app) as address, socket.create_connection(address, timeout=20) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
        time.sleep(0.2)
        connection.sendall(b" ")  # which does not begin the time anew
        began, answer = time.monotonic(), b""
        while part := connection.recv(1000):
            answer += part
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"code":"timeout"' in answer
        assert time.monotonic() - began < 10


@pytest.fixture
def slow_tokenizer(model, monkeypatch):
    """Nothing is tokenized before this event is set."""
    go_on, encode = threading.Event(), type(model.tokenizer).encode

    def waits(self, *args, **more):
        assert go_on.wait(60)
        return encode(self, *args, **more)

    monkeypatch.setattr(type(model.tokenizer), "encode", waits)
    yield go_on
    go_on.set()


def test_prompts_that_are_tokenized_take_places_to_wait(http, engine, idle, slow_tokenizer):
    assert idle()
    places = engine.slots + engine.max_waiting
    with concurrent.futures.ThreadPoolExecutor(places + 2) as pool:
        jobs = {pool.submit(http.post, CHAT, json=SHORT) for _ in range(places + 2)}
        refused, others = concurrent.futures.wait(
            jobs, timeout=30, return_when=concurrent.futures.FIRST_COMPLETED
        )
        while len(refused) < 2:
            more, others = concurrent.futures.wait(others, 30, concurrent.futures.FIRST_COMPLETED)
            assert more
            refused |= more
        assert {job.result().status_code for job in refused} == {429}
        assert {job.result().headers["retry-after"] for job in refused} == {"1"}
        slow_tokenizer.set()
        assert [job.result().status_code for job in others] == [200] * places


def test_time_that_tokenizing_takes_counts(engine, idle, slow_tokenizer):
    from upg_jax.serve import Limits, create_app

    with serving(create_app(engine, name="small", limits=Limits(seconds=0.2))) as (host, port):
        timer = threading.Timer(0.4, slow_tokenizer.set)
        timer.start()
        assert httpx.post(f"http://{host}:{port}{CHAT}", json=SHORT, timeout=60).status_code == 504
        timer.join()
    assert idle()


def test_a_failed_engine_is_unhealthy_logged_and_ends_the_server_with_an_error(model, monkeypatch, caplog):
    from upg_jax.inference import _slots
    from upg_jax.serve import Limits, bind, create_app, run

    engine = Engine(model, slots=1, context=64, chunk=16)
    monkeypatch.setattr(_slots, "advance", lambda *args: 1 / 0)
    listener = bind("127.0.0.1", 0)
    url = "http://{}:{}".format(*listener.getsockname())
    with (
        serving(create_app(engine, name="small")) as (host, port),
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        ended = pool.submit(run, create_app(engine, name="small"), engine, listener, Limits())
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(httpx.ConnectError):
                assert httpx.get(f"{url}/health").json() == {"status": "ok"}
                break
            assert time.monotonic() < deadline
        response = httpx.post(url + CHAT, json={**SHORT, "max_tokens": 4}, timeout=60)
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "server_error"
        with pytest.raises(UPGError, match=r"the engine failed: ZeroDivisionError\(.*start the server again"):
            ended.result(timeout=20)
        other = f"http://{host}:{port}"  # one that does not end by itself
        assert httpx.get(f"{other}/health").status_code == 503
        assert httpx.post(other + CHAT, json=SHORT, timeout=60).status_code == 503
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ZeroDivisionError]


@pytest.mark.parametrize("key", ["", "s\u00e9cret", "a b", "a\n"])
def test_a_key_that_no_client_can_send_is_refused(engine, key):
    from upg_jax.serve import create_app

    with pytest.raises(ValueError, match="visible ASCII"):
        create_app(engine, name="small", api_key=key)
