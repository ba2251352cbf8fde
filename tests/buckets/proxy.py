"""A server between clients and the server of buckets; it has faults, drawn or chosen ones."""

import contextlib
import http.client
import http.server
import random
import socket
import threading
import time
from collections.abc import Callable
from urllib.parse import urlsplit

ANSWERS = {
    "503": (503, {}, b"the service is busy"),
    "retry after": (503, {"Retry-After": "1"}, b"the service is busy"),
    "403": (
        403,
        {"Content-Type": "application/json"},
        b'{"error": {"code": 403, "message": "no"}}',
    ),
    "401": (
        401,
        {"Content-Type": "application/json"},
        b'{"error": {"code": 401, "message": "no"}}',
    ),
}
DROPPED = "dropped", "unanswered", "cut off"  # before, after and in the middle of the answer
OF_SERVERS = "503", "retry after", *DROPPED, "late"
LATE_SECONDS = 0.3

Request = tuple[str, str]  # method and path


class Proxy:
    """Passes requests on, but for the faults that `fault(method, path)` names; keeps both."""

    def __init__(self, upstream: str, fault: Callable[[str, str], str | None] = lambda *_: None):
        self.upstream, self.fault = upstream, fault
        self.faults: list[tuple[str, Request]] = []
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


def drawn(seed, share: float) -> Callable[[str, str], str | None]:
    """Faults of servers, drawn by a seed: this share of requests has one."""
    draw, lock = random.Random(seed), threading.Lock()

    def fault(method, path):
        with lock:
            return draw.choice(OF_SERVERS) if draw.random() < share else None

    return fault


def _handler(proxy: Proxy):
    host = urlsplit(proxy.upstream).netloc

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def handle(self):
            with contextlib.suppress(OSError):  # the client has gone
                super().handle()

        def pass_on(self):
            body = self._body()
            fault = proxy.fault(self.command, self.path)
            if fault:
                proxy.faults.append((fault, (self.command, self.path)))
            if fault in ANSWERS:
                return self._answer(*ANSWERS[fault])
            if fault == "late":
                time.sleep(LATE_SECONDS)
            if fault == "dropped":
                return self._hang_up()
            status, headers, content = self._ask(body)
            if fault == "unanswered":
                return self._hang_up()
            self._answer(status, headers, content, cut_off=fault == "cut off")

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = pass_on

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _ask(self, body: bytes) -> tuple[int, dict, bytes]:
            left_out = {"host", "connection", "transfer-encoding", "content-length"}
            headers = {n: v for n, v in self.headers.items() if n.lower() not in left_out}
            server = http.client.HTTPConnection(host)
            try:
                server.request(self.command, self.path, body, headers)
                answer = server.getresponse()
                left_out = {"connection", "transfer-encoding", "content-length", "date", "server"}
                told = {n: v for n, v in answer.getheaders() if n.lower() not in left_out}
                if "Location" in told:  # where a large upload goes on
                    told["Location"] = told["Location"].replace(proxy.upstream, proxy.url)
                return answer.status, told, answer.read()
            finally:
                server.close()

        def _answer(self, status: int, headers: dict, content: bytes, cut_off: bool = False):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if cut_off:
                self.wfile.write(content[: len(content) // 2])
                return self._hang_up()
            if self.command != "HEAD":
                self.wfile.write(content)

        def _hang_up(self):
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)

    return Handler
