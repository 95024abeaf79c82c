"""Who may send requests: bearers of the key, programs that say JSON, and those that know the server's name."""

from __future__ import annotations

import pytest
from helpers.serving import serving

httpx = pytest.importorskip("httpx", reason='pip install "upg-jax[test]"')

SHORT = {"model": "small", "messages": [{"role": "user", "content": "he"}], "max_tokens": 1}
CHAT = "/v1/chat/completions"


def app_of(engine, name="small", **settings):
    from upg_jax.serve import create_app

    return create_app(engine, name=name, **settings)


@pytest.mark.parametrize(
    "kind",
    [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "json"],
)
def test_what_a_web_page_can_send_without_asking_is_no_request(url, kind):
    headers = {} if kind is None else {"Content-Type": kind}
    response = httpx.post(url + CHAT, content=b"{}", headers=headers)
    assert response.status_code == 415
    assert "Content-Type: application/json" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "kind", ["application/json", "Application/JSON; charset=utf-8", "application/ld+json"]
)
def test_json_may_be_declared_in_any_way(url, kind):
    response = httpx.post(url + CHAT, content=b"{}", headers={"Content-Type": kind})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "model")


@pytest.mark.parametrize(
    ("host", "allowed", "answered", "refused"),
    [
        (
            "127.0.0.1",
            [],
            ["127.0.0.1", "localhost:1", "LocalHost", "[::1]:8000"],
            ["page.example", "", "127.0.0.1.nip.io"],
        ),
        ("::1", [], ["[::1]", "localhost"], ["page.example:8000"]),
        ("127.0.0.1", ["chat.example"], ["Chat.example", "localhost"], ["page.example"]),
        ("0.0.0.0", [], ["127.0.0.1", "page.example"], []),
        ("0.0.0.0", ["chat.example"], ["chat.example:443", "127.0.0.1"], ["page.example"]),
        ("0.0.0.0", ["Chat.example:443"], ["chat.example"], ["page.example"]),
    ],
    ids=str,
)
def test_a_server_of_this_machine_has_no_other_names(engine, host, allowed, answered, refused):
    from upg_jax.serve._access import own_hosts

    with serving(app_of(engine, hosts=own_hosts(host, host, allowed))) as (address, port):
        for name in answered + refused:
            for path in ("/v1/models", "/health", "/metrics"):
                response = httpx.get(f"http://{address}:{port}{path}", headers={"Host": name})
                assert response.status_code == (200 if name in answered else 421)
    if refused:
        assert "--allow-host" in response.json()["error"]["message"]


@pytest.mark.parametrize("spelled", ["127.1", "2130706433", "localhost"])
def test_a_loopback_address_is_known_however_it_is_spelled(spelled):
    from upg_jax.serve import bind
    from upg_jax.serve._access import own_hosts

    with bind(spelled, 0) as listener:
        assert "localhost" in own_hosts(listener.getsockname()[0], spelled, ())


@pytest.mark.parametrize("host", ["http://chat.example", "chat.example/v1", "a b", ""])
def test_a_host_that_no_request_can_have_is_refused(host):
    from upg_jax.serve._access import Access

    with pytest.raises(ValueError, match="a host is a name or an address"):
        Access(None, [host])


def test_no_redirection_repeats_another_server_s_name(engine):
    with serving(app_of(engine, hosts=["localhost"])) as (address, port):
        response = httpx.get(f"http://{address}:{port}/health/", headers={"Host": "page.example"})
    assert response.status_code == 404
    assert "location" not in response.headers


@pytest.mark.parametrize("scheme", ["Bearer ", "bearer ", "BEARER  "])
def test_the_scheme_of_a_key_is_written_in_any_way(engine, scheme):
    with serving(app_of(engine, api_key="Key")) as (host, port):
        url = f"http://{host}:{port}/v1/models"
        assert httpx.get(url, headers={"Authorization": scheme + "Key"}).status_code == 200
        for wrong in (scheme + "key", scheme + "Keys", "Basic Key", "Key", scheme.strip()):
            assert httpx.get(url, headers={"Authorization": wrong}).status_code == 401


def test_every_path_of_the_interface_asks_for_the_key(engine):
    with serving(app_of(engine, api_key="Key")) as (host, port):
        for method, path in (
            ("POST", "/v1/chat/completions"),
            ("POST", "/v1/completions"),
            ("GET", "/v1/models"),
            ("GET", "/v1/models/small"),
        ):
            assert httpx.request(method, f"http://{host}:{port}{path}").status_code == 401


@pytest.mark.parametrize(
    ("host", "authority"), [("127.0.0.1", "127.0.0.1:80"), ("::1", "[::1]:80"), ("me", "me:80")]
)
def test_an_address_is_written_as_urls_have_it(host, authority):
    from upg_jax.serve._access import url_of

    assert url_of(host, 80) == f"http://{authority}"


def test_a_model_is_found_under_a_name_with_slashes_and_no_other(engine):
    with serving(app_of(engine, name="some/model/name")) as (host, port):
        url = f"http://{host}:{port}/v1/models/"
        for name in ("some/model/name", "some%2Fmodel%2Fname"):
            assert httpx.get(url + name).json()["id"] == "some/model/name"
        for name in ("", "some", "some/model/name/", "some//model/name"):
            response = httpx.get(url + name)
            assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("key", ["", "s\u00e9cret", "a b", "a\n"])
def test_a_key_that_no_client_can_send_is_refused(engine, key):
    with pytest.raises(ValueError, match="visible ASCII"):
        app_of(engine, api_key=key)
