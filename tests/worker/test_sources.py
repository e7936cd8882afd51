"""Model repositories, from a loopback server that speaks enough of the hub's API for snapshot_download."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from hypha.errors import RemoteProtocolError
from hypha.protocol.job import ModelSpec
from hypha.worker.sources import fetch_source

pytestmark = pytest.mark.slow

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": b"safe weights",
    "pytorch_model.bin": b"pickled weights",
    "modeling.py": b"import os",
    "nested/model.safetensors": b"more",
}


class Hub(ThreadingHTTPServer):
    """One repository, `org/model`, with a revision `main`; `requested` is what was downloaded."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = dict(FILES)
        self.requested: list[str] = []
        self.broken = False
        self.cache = Path()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/org/model"):
            self._info(path)
        elif path.startswith("/org/model/resolve/"):
            self._file(path.removeprefix("/org/model/resolve/").partition("/")[2], body=body)
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})

    def _info(self, path: str) -> None:
        if path.endswith(f"/tree/{COMMIT}"):
            entries = [
                {"type": "file", "path": n, "size": len(d), "oid": "0" * 40} for n, d in self.server.files.items()
            ]
            self._send(200, json.dumps(entries).encode())
            return
        if not path.endswith(("/org/model", "/revision/main", f"/revision/{COMMIT}")):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
            return
        siblings = [{"rfilename": name} for name in self.server.files]
        self._send(200, json.dumps({"id": "org/model", "sha": COMMIT, "siblings": siblings}).encode())

    def _file(self, name: str, *, body: bool) -> None:
        if self.server.broken:
            self._send(503, b"")
            return
        data = self.server.files[name]
        if body:
            self.server.requested.append(name)
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        self._send(200, data, headers, body=body)

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None, *, body: bool = True) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_arguments) -> None:
        """Say nothing."""


# huggingface_hub reads its environment when it is imported, so each hub wants a process of its own.
FETCH = """
import sys, msgspec
from hypha.errors import HyphaError
from hypha.protocol.job import ModelSpec, PreprocessorSpec
from hypha.worker.sources import fetch_source
kind = {"model": ModelSpec, "preprocessor": PreprocessorSpec}[sys.argv[1]]
try:
    print(fetch_source(msgspec.json.decode(sys.argv[2], type=kind)))
except HyphaError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture
def hub(tmp_path):
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.cache = tmp_path / "hub"
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def fetched(hub: Hub, what: str = "model", **spec: str) -> str:
    """The directory, or the kind and the words of the error."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(hub.cache), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", FETCH, what, json.dumps(spec)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()


def test_a_repository_comes_without_pickled_weights_and_without_code_and_only_once(hub):
    directory = Path(fetched(hub, repository="org/model", revision="main"))
    found = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    assert found == ["config.json", "model.safetensors", "nested/model.safetensors", "tokenizer.json"]
    assert (directory / "model.safetensors").read_bytes() == b"safe weights"
    assert sorted(hub.requested) == found
    hub.requested.clear()
    assert Path(fetched(hub, repository="org/model")) == directory
    assert hub.requested == []


def test_a_model_with_pickled_weights_alone_is_refused(hub):
    hub.files = {name: data for name, data in FILES.items() if not name.endswith(".safetensors")}
    said = "RemoteProtocolError hub: org/model: no safetensors weights; pickled ones are never loaded"
    assert fetched(hub, repository="org/model") == said
    assert Path(fetched(hub, "preprocessor", repository="org/model"), "tokenizer.json").is_file()
    assert "pytorch_model.bin" not in hub.requested


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"repository": "org/else"}, "RemoteProtocolError hub: org/else: "),
        ({"repository": "org/model", "revision": "v9"}, "RemoteProtocolError hub: org/model at revision v9: "),
        ({"repository": "a/b/c/.."}, "RemoteProtocolError hub: a/b/c/..: "),
    ],
)
def test_what_is_not_there_is_named(hub, spec, said):
    answer = fetched(hub, **spec)
    assert answer.startswith(said)
    assert "\n" not in answer


def test_a_hub_that_is_away_is_worth_another_attempt(hub):
    hub.server_close()
    assert fetched(hub, repository="org/model").startswith("PeerUnreachable hub: org/model: ")


def test_a_hub_that_is_overloaded_is_worth_another_attempt(hub):
    hub.broken = True
    assert fetched(hub, repository="org/model").startswith("PeerUnreachable hub: org/model: ")


def test_a_path_is_used_as_it_is_and_must_be_a_directory(tmp_path):
    assert fetch_source(ModelSpec(path=str(tmp_path))) == str(tmp_path.resolve())
    with pytest.raises(RemoteProtocolError, match="path '/no/such' is not a directory on this worker"):
        fetch_source(ModelSpec(path="/no/such"))
