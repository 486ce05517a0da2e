"""`jepa ui` answers only requests with its token."""

import http.client
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

import pytest
import uvicorn
from testcluster import claim_ports

from jepa_cluster.report.mlflow_app import RequireToken

TOKEN = "a-random-token"
PATHS = ("/", "/scaling/app.js", "/ajax-api/2.0/mlflow/experiments/search?max_results=1", "/health")


async def greet(scope: Any, receive: Callable[..., Any], send: Callable[..., Any]) -> None:
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": scope["query_string"]})


@contextmanager
def served() -> Iterator[int]:
    (claim,) = claim_ports(1)
    port = claim.getsockname()[1]
    app = RequireToken(greet, TOKEN, port)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", lifespan="off"))
    thread = Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            thread.join(0.01)
        yield port
    finally:
        server.should_exit = True
        thread.join()
        claim.close()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with served() as port:
        yield port


def get(port: int, path: str, method: str = "GET", **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, headers=headers)
    return connection.getresponse()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD"])
def test_without_the_token_nothing_is_served(port: int, path: str, method: str):
    assert get(port, path, method).status == 401
    assert get(port, path, method, Cookie=f"jepa-ui-{port}=wrong").status == 401
    assert get(port, path, method, Authorization="Bearer wrong").status == 401
    assert get(port, f"{path}&token=" if "?" in path else f"{path}?token=").status == 401


def test_the_token_in_an_address_becomes_a_cookie_and_leaves_the_address(port: int):
    answer = get(port, "/scaling/?token=a-random-token&a=b")
    assert answer.status == 303
    assert answer.headers["Location"] == "/scaling/?a=b"
    cookie = answer.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    answer = get(port, "/scaling/?a=b", Cookie=cookie.partition(";")[0])
    assert answer.status == 200
    assert answer.read() == b"a=b"


def test_a_client_sends_the_token_as_mlflow_does(port: int):
    assert get(port, "/", Authorization=f"Bearer {TOKEN}").status == 200
