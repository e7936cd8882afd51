"""A worker's bridge for tests: real HTTP over a real Unix socket, its answers given by a plain object.

class Answers: fetch(message), send(message), report(message), telemetry(kind, body)     called from server threads
with FakeBridge(path, answers) as bridge: bridge.push(event) … bridge.hang_up()
"""

import queue
import socketserver
import threading
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, urlsplit

import msgspec

from hypha.protocol.bridge import BridgeError, Fetch, Report, Send

KINDS = {
    "/resources/fetch": ("fetch", Fetch),
    "/resources/send": ("send", Send),
    "/status/send": ("report", Report),
}


class Refusal(Exception):
    """Raised by answers: becomes a BridgeError."""

    def __init__(self, reason, *, retry=False):
        super().__init__(reason)
        self.error = BridgeError(reason=reason, retry=retry)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length", "0")))
        url = urlsplit(self.path)
        if url.path == "/resources/receive":
            return self.server.bridge.stream(self)
        if url.path == "/telemetry":
            self.server.bridge.answers.telemetry(parse_qs(url.query)["kind"][0], body)
            return self.reply(204, b"")
        name, kind = KINDS[url.path]
        try:
            answer = getattr(self.server.bridge.answers, name)(msgspec.json.decode(body, type=kind))
            return self.reply(200, msgspec.json.encode(answer))
        except Refusal as refusal:
            return self.reply(409, msgspec.json.encode(refusal.error))

    def reply(self, status, body):
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, *_):
        pass  # the executor hung up


class FakeBridge:
    """Serves until `hang_up` or the end of the `with`."""

    def __init__(self, path, answers):
        self.path, self.answers = path, answers
        self.events = queue.Queue()
        self.server = Server(str(path), Handler)
        self.server.bridge = self
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.hang_up()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def push(self, event):
        self.events.put(event)

    def hang_up(self):
        self.events.put(None)

    def stream(self, handler):
        handler.send_response(200)
        handler.send_header("content-type", "text/event-stream")
        handler.send_header("connection", "close")
        handler.end_headers()
        handler.wfile.write(b": subscribed\n\n")
        handler.wfile.flush()
        while (event := self.events.get()) is not None:
            handler.wfile.write(b"data: " + msgspec.json.encode(event) + b"\n\n")
            handler.wfile.flush()
        handler.close_connection = True
