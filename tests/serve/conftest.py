"""A server on loopback with a small model, and clients for it."""

from __future__ import annotations

import time

import pytest
from helpers.serving import serving

from upg_jax import UPGModel
from upg_jax.inference import Engine

SLOTS = 3


@pytest.fixture(scope="session")
def model(gguf_model):
    return UPGModel.from_file(gguf_model)


@pytest.fixture(scope="session")
def engine(model):
    engine = Engine(model, slots=SLOTS, context=128, chunk=32, max_waiting=4)
    engine.warm_up()
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def address(engine):
    for package in ("starlette", "uvicorn", "jinja2"):
        pytest.importorskip(package, reason='pip install "upg-jax[serve]"')
    from upg_jax.serve import Limits, create_app

    with serving(create_app(engine, name="small", limits=Limits(body_bytes=20_000, choices=6))) as address:
        yield address


@pytest.fixture(scope="session")
def url(address):
    return f"http://{address[0]}:{address[1]}"


@pytest.fixture(scope="session")
def http(url):
    httpx = pytest.importorskip("httpx", reason='pip install "upg-jax[test]"')
    with httpx.Client(base_url=url, timeout=60, headers={"Content-Type": "application/json"}) as client:
        yield client


@pytest.fixture(scope="session")
def client(url):
    openai = pytest.importorskip("openai", reason='pip install "upg-jax[test]"')
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def idle(engine):
    """Waits until no slot is used; says whether that happened."""

    def wait(seconds=20.0):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if engine.running == engine.waiting == 0:
                return True
            time.sleep(0.01)
        return False

    return wait
