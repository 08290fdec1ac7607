"""A file server with byte ranges on the loopback interface that can be told to misbehave."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

Kind = Literal["drop", "status", "ignore", "shift", "total", "length", "short", "flip", "encode", "slow"]


@dataclass
class Fault:
    """Misbehaviour for requests of files whose name holds ``name``, at most ``times`` times.

    drop: close in the middle of the body; status: answer ``status``; ignore: 200 with the whole file; shift: another
    range than asked; total: another file size; length: a Content-Length that contradicts Content-Range; short: promise
    all, send half, end in peace; flip: one wrong byte; encode: claim gzip; slow: ``pause`` seconds between pieces.
    """

    kind: Kind
    name: str = ""
    times: float = float("inf")
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    min_bytes: int = 2
    """Only requests for at least so many bytes."""
    max_bytes: float = float("inf")
    """Only requests for at most so many bytes."""
    pause: float = 0.01


@dataclass
class Request:
    path: str
    start: int
    end: int
    status: int = 0
    sent: int = 0
    at: float = field(default_factory=time.monotonic)


class RangeServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.url = root, f"http://127.0.0.1:{self.server_address[1]}"
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.connections = 0
        self.lock = threading.Lock()

    def fault(self, request: Request) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                fits = fault.min_bytes <= request.end - request.start <= fault.max_bytes
                if fits and fault.times > 0 and fault.name in request.path:
                    fault.times -= 1
                    return fault
        return None

    def forget(self) -> None:
        """Clear faults and the log."""
        self.faults, self.requests, self.connections = [], [], 0

    def sent(self) -> int:
        return sum(request.sent for request in self.requests)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is part of the tests."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: RangeServer

    def setup(self) -> None:
        super().setup()
        with self.server.lock:
            self.server.connections += 1

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, request: Request, status: int, headers: dict[str, str]) -> None:
        request.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def do_GET(self) -> None:
        path = self.server.root / self.path.lstrip("/")
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        request = Request(self.path, int(first), int(last) + 1)
        self.server.requests.append(request)
        fault = self.server.fault(request)
        kind = fault.kind if fault else None
        if not path.is_file():
            return self.answer(request, 404, {"Content-Length": "0"})
        if fault and kind == "status":
            return self.answer(request, fault.status, {"Content-Length": "0", **fault.headers})
        size = path.stat().st_size
        start, end = request.start, min(request.end, size)
        if kind == "ignore":
            start, end = 0, size
        elif start >= size:
            return self.answer(request, 416, {"Content-Length": "0", "Content-Range": f"bytes */{size}"})
        told = start + (kind == "shift")
        headers = {"Content-Length": str(end - start + 7 * (kind == "length"))}
        if kind != "ignore":
            headers["Content-Range"] = f"bytes {told}-{end - 1}/{size + (kind == 'total')}"
        if kind == "encode":
            headers["Content-Encoding"] = "gzip"
        self.answer(request, 200 if kind == "ignore" else 206, headers)
        self.send_body(path, start, end, fault, request)
        return None

    def send_body(self, path: Path, start: int, end: int, fault: Fault | None, request: Request) -> None:
        kind = fault.kind if fault else None
        stop = start + (end - start) // 2 if kind in ("drop", "short") else end
        with open(path, "rb") as file:
            file.seek(start)
            while start < stop:
                data = file.read(min(4096 if kind == "slow" else 1 << 16, stop - start))
                if kind == "flip":
                    data, kind = data[:-1] + bytes([data[-1] ^ 1]), None
                self.wfile.write(data)
                start += len(data)
                request.sent += len(data)
                if kind == "slow" and fault:
                    time.sleep(fault.pause)
        if kind in ("drop", "short"):
            self.wfile.flush()
            self.close_connection = True


@contextmanager
def serve(root: Path) -> Iterator[RangeServer]:
    server = RangeServer(root)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for a condition of another thread or process; fails when it does not come."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.01)
