"""What the server refuses, and what it sends with every answer."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from patchclamp.atlas import Atlas
from patchclamp.explore import application

PATHS = (
    "/",
    "/neuron/mlp.0:7",
    "/static/app.js",
    "/static/style.css",
    "/api/atlas",
    "/api/neurons",
    "/openapi.json",
    "/none",
)


def _client(atlas: Atlas, *hosts: str) -> TestClient:
    return TestClient(application(atlas, hosts), base_url="http://localhost", raise_server_exceptions=False)


def _status(client: TestClient, host: str) -> int:
    return client.get("/api/atlas", headers={"Host": host}).status_code


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8765", "LOCALHOST", "127.0.0.1:1", "[::1]:8765", "[::1]", "localhost."]
)
def test_this_machine_is_answered(atlas: Atlas, host: str) -> None:
    assert _status(_client(atlas), host) == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8765", "localhost.evil.example", "127.0.0.1.evil.example",
     "192.168.1.7", "0.0.0.0", "", "[::2]", "localhost@evil.example", "evil.example#localhost",
     "[localhost", "localhost:80:80"],
)  # fmt: skip
def test_any_other_host_is_refused(atlas: Atlas, host: str) -> None:
    client = _client(atlas)
    for path in PATHS:
        answer = client.get(path, headers={"Host": host})
        assert answer.status_code == 400 and "mlp" not in answer.text, path


def test_two_hosts_are_refused(atlas: Atlas) -> None:
    assert (
        _client(atlas).get("/api/atlas", headers=[("Host", "localhost"), ("Host", "evil.example")]).status_code == 400
    )  # type: ignore[arg-type]


def test_the_given_host_is_answered(atlas: Atlas) -> None:
    client = _client(atlas, "lab-machine", "10.1.2.3")
    assert (
        _status(client, "lab-machine:8765") == _status(client, "10.1.2.3:8765") == _status(client, "localhost") == 200
    )
    assert _status(client, "10.1.2.4") == _status(client, "other") == 400


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_bound_to_every_address_numbers_are_answered_and_foreign_names_are_not(atlas: Atlas, host: str) -> None:
    client = _client(atlas, host)
    assert _status(client, "192.168.1.7:8765") == _status(client, "[fe80::1]:8765") == 200
    assert _status(client, socket.gethostname()) == 200
    assert _status(client, "evil.example") == 400


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "CONNECT", "ANY"])
def test_only_get_is_answered(atlas: Atlas, method: str) -> None:
    client = _client(atlas)
    for path in PATHS:
        assert client.request(method, path).status_code == 405, path


@pytest.mark.parametrize("path", PATHS)
def test_every_answer_shuts_the_page_in(atlas: Atlas, path: str) -> None:
    for answer in (_client(atlas).get(path), _client(atlas).get(path, headers={"Host": "evil.example"})):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    "path",
    [
        "/static/../application.py", "/static/..%2fapplication.py", "/static/%2e%2e/application.py",
        "/static/..%5capplication.py", "/static//etc/passwd", "/static/%2fetc%2fpasswd",
        "/static/....//....//etc/passwd", "/static/app.js%00.css", "/static/", "/static",
        "/static/index.html", "/manifest.json", "/neurons.parquet", "/../manifest.json",
        "/%2e%2e/manifest.json",
        "/recording/manifest.json", "/docs", "/redoc", "/api", "/api/neurons/..%2f..%2fmanifest.json",
    ],
)  # fmt: skip
def test_nothing_else_is_served(atlas: Atlas, path: str) -> None:
    answer = _client(atlas).get(path)
    assert answer.status_code == 404
    for secret in ("def application", "root:", "PAR1", "sha256"):
        assert secret not in answer.text


def test_the_page_of_an_unknown_neuron_is_the_page_and_not_found(atlas: Atlas) -> None:
    client = _client(atlas)
    known, unknown = client.get("/neuron/mlp.0:7"), client.get("/neuron/..%2f..%2fetc%2fpasswd")
    assert (known.status_code, unknown.status_code) == (200, 404)
    assert known.content == unknown.content and "text/html" in unknown.headers["content-type"]


def test_the_page_holds_nothing_inline_and_nothing_from_elsewhere(atlas: Atlas) -> None:
    import patchclamp.explore

    client, folder = _client(atlas), Path(patchclamp.explore.__file__).parent / "static"
    html = client.get("/").text
    assert "style=" not in html and "onclick" not in html and html.count("<script") == 1 and "></script>" in html
    for file in folder.iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text and "https:" not in text and "//cdn" not in text, file.name
        if file.suffix == ".js":
            for forbidden in (
                "innerHTML",
                "outerHTML",
                "insertAdjacentHTML",
                "document.write",
                "eval(",
                "Function(",
            ):
                assert forbidden not in text, (file.name, forbidden)


def test_files_say_what_they_are_and_are_not_sent_twice(atlas: Atlas) -> None:
    client = _client(atlas)
    kinds = {"app.js": "text/javascript", "style.css": "text/css", "icon.svg": "image/svg+xml"}
    for name, kind in kinds.items():
        answer = client.get(f"/static/{name}")
        assert answer.headers["content-type"].startswith(kind)
        again = client.get(f"/static/{name}", headers={"If-None-Match": answer.headers["etag"]})
        assert again.status_code == 304 and not again.content
