"""A real HTTP server on loopback with byte ranges, which fails on request."""

from __future__ import annotations

import re
import socket
import struct
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class ShardServer(ThreadingHTTPServer):
    """Serves the files of a folder.

    `faults[name]` is a list of what the next GETs of that file meet: a status such as 500, `reset`
    or `stall` after half of the bytes, `cut` where the connection just closes there; None for
    nothing. `forever[name]` is met by every GET once `faults` are used up.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.faults: dict[str, list[Any]] = {}
        self.forever: dict[str, Any] = {}
        self.sent: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self.ranges = True
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ShardServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        path = self.server.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        self._head(200, path, path.stat().st_size)

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        path = self.server.folder / name
        self.server.requests[name] += 1
        queue = self.server.faults.get(name, [])
        fault = queue.pop(0) if queue else self.server.forever.get(name)
        if not name:
            names = sorted(entry.name for entry in self.server.folder.iterdir())
            self._page("".join(f'<a href="{entry}">{entry}</a>' for entry in names).encode())
            return
        if isinstance(fault, int) or not path.is_file():
            self.send_error(fault or 404)
            return
        data = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None or not self.server.ranges:
            self._head(200, path, len(data))
        else:
            first, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
            whole, data = len(data), data[first : last + 1]
            self._head(206, path, len(data), f"bytes {first}-{last}/{whole}")
        self._send(name, data, fault)

    def _page(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _head(self, status: int, path: Path, length: int, content_range: str = "") -> None:
        state = path.stat()
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.send_header("ETag", f'"{state.st_mtime_ns:x}-{state.st_size:x}"')
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()

    def _send(self, name: str, data: bytes, fault: Any) -> None:
        part = data if fault is None else data[: len(data) // 2]
        self.server.sent[name] += len(part)  # before the client has it, and may ask
        self.wfile.write(part)
        self.wfile.flush()
        if fault == "stall":
            self.server.released.wait(30)
        if fault == "reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
        if fault is not None:
            self.close_connection = True
