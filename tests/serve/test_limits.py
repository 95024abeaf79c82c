"""What no client can do: take its time with a body, or have any number of prompts tokenized; and a failed engine."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import socket
import threading
import time
import weakref

import pytest
from helpers.serving import serving

from upg_jax import UPGError
from upg_jax.inference import Engine
from upg_jax.inference._answer import Answer

httpx = pytest.importorskip("httpx", reason='pip install "upg-jax[test]"')

SHORT = {"model": "small", "messages": [{"role": "user", "content": "he"}], "max_tokens": 1}
CHAT = "/v1/chat/completions"
BEGUN = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"


def test_a_body_that_takes_too_long_is_refused(engine):
    from upg_jax.serve import Limits, create_app

    app = create_app(engine, name="small", limits=Limits(body_seconds=0.3))
    with serving(app) as address, socket.create_connection(address, timeout=20) as connection:
        connection.sendall(BEGUN)
        connection.settimeout(0.05)
        answer = b""
        for _ in range(40):  # of the 49 that are missing; none begins the time anew
            if answer:
                break
            connection.sendall(b" ")
            with contextlib.suppress(TimeoutError):
                answer = connection.recv(1000)
        connection.settimeout(20)
        with contextlib.suppress(ConnectionResetError):  # if a byte came after the answer
            while part := connection.recv(1000):
                answer += part
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"code":"timeout"' in answer


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


def test_more_prompts_than_answers_may_be_are_refused_before_any_is_tokenized(http, model, monkeypatch):
    def encode(self, *args, **more):
        raise AssertionError("tokenized")

    monkeypatch.setattr(type(model.tokenizer), "encode", encode)
    for prompts, n in ((1024, 1), (4, 2)):
        body = {"model": "small", "prompt": ["he"] * prompts, "n": n}
        response = http.post("/v1/completions", json=body)
        assert response.status_code == 400
        assert response.json()["error"]["message"] == (
            f"one request may ask for 6 answers; got {n} to each of {prompts} prompts"
        )


@pytest.fixture
def late(engine, model, monkeypatch):
    """The address of a server whose prompts take longer to be tokenized than requests may take."""
    from upg_jax.serve import Limits, create_app

    encode = type(model.tokenizer).encode

    def late(self, *args, **more):
        time.sleep(0.8)
        return encode(self, *args, **more)

    monkeypatch.setattr(type(model.tokenizer), "encode", late)
    with serving(create_app(engine, name="small", limits=Limits(seconds=0.6))) as (host, port):
        yield f"http://{host}:{port}"


def test_time_that_tokenizing_takes_counts(late, idle):
    assert httpx.post(late + CHAT, json=SHORT, timeout=60).status_code == 504
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


def test_a_body_may_take_no_longer_than_its_request(engine):
    from upg_jax.serve import Limits, create_app

    app = create_app(engine, name="small", limits=Limits(seconds=0.3))
    with serving(app) as address, socket.create_connection(address, timeout=10) as connection:
        connection.sendall(BEGUN)
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_more_bodies_than_may_be_on_their_way_are_refused_before_they_are_read(engine):
    from upg_jax.serve import Limits, create_app

    app = create_app(engine, name="small", limits=Limits(bodies=2))
    with serving(app) as address, contextlib.ExitStack() as opened:
        connections = [opened.enter_context(socket.create_connection(address, timeout=10)) for _ in range(3)]
        for connection in connections[:2]:
            connection.sendall(BEGUN)
        url = "http://{}:{}".format(*address)
        assert httpx.get(f"{url}/health").status_code == 200  # both have begun by now
        connections[2].sendall(BEGUN)
        answer = connections[2].recv(1000)
        assert answer.startswith(b"HTTP/1.1 429 ")
        assert b"retry-after: 1" in answer.lower()
        connections[0].close()
        deadline = time.monotonic() + 10
        while httpx.post(url + CHAT, json=SHORT, timeout=60).status_code != 200:
            assert time.monotonic() < deadline


def test_an_answer_that_took_too_long_is_not_asked_for_again(late, idle):
    openai = pytest.importorskip("openai", reason='pip install "upg-jax[test]"')
    with (
        openai.OpenAI(base_url=f"{late}/v1", api_key="none") as client,
        pytest.raises(openai.InternalServerError, match="took longer"),
    ):
        client.chat.completions.create(**SHORT)
    counted = httpx.get(f"{late}/metrics").text
    assert 'requests_total{path="/v1/chat/completions",status="504"} 1' in counted
    assert idle()


def test_what_a_client_does_not_read_is_kept_no_longer_than_a_request_may_take(engine, idle, monkeypatch):
    from upg_jax.serve import Limits, bind, create_app

    said, push = [], Answer.push

    def noted(self, *arguments):
        token = push(self, *arguments)
        said.append(weakref.ref(token))
        return token

    def held():
        return sum(token() is not None for token in said)

    monkeypatch.setattr(Answer, "push", noted)

    body = {**SHORT, "max_tokens": 100, "n": 6, "ignore_eos": True, "stream": True, "logprobs": True}
    data = json.dumps({**body, "top_logprobs": 20}).encode()
    head = BEGUN[:-1].replace(b"completions", b"chat/completions").replace(b"50", b"%d" % len(data))
    app = create_app(engine, name="small", limits=Limits(seconds=4))
    listener = bind("127.0.0.1", 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with serving(app, listener) as address, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(address)
        connection.sendall(head + data)
        began = time.monotonic()
        while held() < 50:  # which could not be sent
            assert time.monotonic() < began + 4
            time.sleep(0.05)
        while held():
            assert time.monotonic() < began + 15
            time.sleep(0.05)
        assert connection.recv(12) == b"HTTP/1.1 200"
    assert idle()


def test_no_request_asks_for_more_answers_than_the_engine_has_places_for(engine):
    from upg_jax.serve import Limits, create_app

    places = engine.slots + engine.max_waiting
    with serving(create_app(engine, name="small", limits=Limits(choices=100))) as (host, port):
        for n, status in ((places, 200), (places + 1, 400)):
            response = httpx.post(f"http://{host}:{port}{CHAT}", json={**SHORT, "n": n}, timeout=60)
            assert response.status_code == status


def test_what_a_client_sends_before_it_has_its_answer_is_not_all_read():
    from starlette.applications import Starlette
    from starlette.responses import Response
    from starlette.routing import Route

    from upg_jax.serve import bind

    asked, done = threading.Event(), threading.Event()

    async def answer_late(request):
        asked.set()
        while not done.is_set():
            await asyncio.sleep(0.01)
        return Response()

    listener = bind("127.0.0.1", 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    app = Starlette(routes=[Route("/", answer_late)])
    with serving(app, listener) as at, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        connection.connect(at)
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert asked.wait(20)
        connection.settimeout(2)
        try:
            with pytest.raises(TimeoutError):
                connection.sendall(bytes(1 << 19))
        finally:
            done.set()


def test_a_stream_has_a_moment_to_say_that_its_time_is_up():
    from upg_jax.serve._connection import EventStream

    sent = []

    async def events():
        for _ in range(10):
            await asyncio.sleep(0)
        yield "too late"

    async def receive():
        await asyncio.sleep(60)

    async def send(message):
        sent.append(message)

    async def run():
        await EventStream(events(), lambda: None, asyncio.get_running_loop().time())({}, receive, send)

    asyncio.run(run())
    assert [message.get("body") for message in sent] == [None, b"data: too late\n\n", b""]


def test_settings_are_checked_once_and_not_where_others_wait(http, engine, monkeypatch):
    from upg_jax.inference import GenerationSettings

    checked, check = [], GenerationSettings.__post_init__

    def noted(self):
        checked.append(asyncio._get_running_loop() is not None)
        check(self)

    monkeypatch.setattr(GenerationSettings, "__post_init__", noted)
    body = {**SHORT, "n": 3, "logit_bias": {str(token): 1 for token in range(300)}}
    assert http.post(CHAT, json=body).status_code == 200
    assert checked == [False]


def test_an_obstacle_that_fails_is_not_taken_for_one_that_came():
    from upg_jax.serve._connection import ClientGoneError, unless_gone

    async def receive():
        raise ZeroDivisionError

    async def asked(receive):
        return await unless_gone(receive, asyncio.sleep(10))

    with pytest.raises(ZeroDivisionError):
        asyncio.run(asked(receive))

    async def gone():
        return {"type": "http.disconnect"}

    with pytest.raises(ClientGoneError):
        asyncio.run(asked(gone))
