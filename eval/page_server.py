"""Serving the page from this machine, to this machine, without asking any other."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastapi import FastAPI

MAX_MESSAGE = 2 << 20  # bytes of a request that is no upload
# What the page asks for. gradio answers more: it forwards requests, redirects, converts films.
EXACT = {"/", "/config", "/theme.css", "/manifest.json", "/favicon.ico"} | {
    f"/gradio_api/{name}"
    for name in (
        "upload", "upload_progress", "reset", "theme.css", "startup-events", "info",
    )
}  # fmt: skip
PREFIXES = (
    "/assets/",
    "/static/",
    "/svelte/",
    "/gradio_api/file=/",
    "/gradio_api/heartbeat/",
    "/gradio_api/run/",
)
FORM = 64 << 10  # bytes of an upload beside its file
KEPT = 50  # uploads of the largest size; when more come, the oldest go
LOOPBACK = ["127.0.0.1", "localhost", "::1", "[::1]"]  # the last as requests write it
# A browser that holds to this asks nobody but us, whatever stands in the page. Inline scripts and
# eval are how gradio works.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:;"
    " style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:;"
    " worker-src 'self' blob:; frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
)


def keep_to_ourselves(files: Path) -> None:
    """Before gradio is imported: it sends no statistics and keeps uploads in `files`."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["GRADIO_TEMP_DIR"] = str(files)


def listen(host: str, port: int) -> socket.socket:
    """A socket that is connected to already, though not yet answered; port 0 takes a free one.

    Raises:
        ValueError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = socket.socket(family)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind((host, port))
        server.listen()
    except OSError as error:
        server.close()
        raise ValueError(
            f"{host}:{port} cannot be used ({error.strerror}): choose another --port or --host"
        ) from error
    return server


def web_app(mount: Callable[[FastAPI], None], host: str, max_upload: int, files: Path) -> FastAPI:
    """The web application around a page, with `Guard` and a check of whom requests are for.

    Args:
        mount: puts the page into the application.
        host: where it will listen; requests to a loopback address must name one.
        max_upload: bytes of an uploaded file.
        files: folder of uploads.
    """
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = FastAPI(openapi_url=None)
    # Otherwise any web page could reach us through a name of its own that leads here.
    names = LOOPBACK if host in LOOPBACK else ["*"]
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=names)
    app.add_middleware(Guard, max_upload=max_upload, files=files)
    mount(app)
    return app


def serve(app: FastAPI, server: socket.socket) -> None:
    """Answer requests at the socket of `listen` until interrupted."""
    import uvicorn

    # Open pages hold a connection, which must not keep us from ending.
    settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    uvicorn.Server(settings).run([server])


class Guard:
    """Adds the policy to every answer, and refuses what our page never sends.

    Messages that name a file by URL, which gradio would fetch from wherever it is; uploads of
    many files, of which gradio bounds each; long messages; and addresses the page does not need.
    Old uploads make room for new ones.
    """

    def __init__(self, app: Callable[..., Any], max_upload: int, files: Path) -> None:
        self.app, self.max_upload, self.files = app, max_upload, files

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", []),
                    (b"content-security-policy", POLICY.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                ]
            await send(message)

        status = 0 if scope["path"] in EXACT or scope["path"].startswith(PREFIXES) else 404
        if not status and scope["method"] == "POST":
            if scope["path"].endswith("/upload"):
                status = self._refuse_upload(dict(scope["headers"]))
            else:
                body = await _read_body(receive)
                status = 413 if body is None else 400 if _names_urls(body) else 0
                receive = _replay(body or b"", receive)
        if status:
            await guarded({"type": "http.response.start", "status": status, "headers": []})
            await guarded({"type": "http.response.body", "body": b""})
            return
        await self.app(scope, receive, guarded)

    def _refuse_upload(self, headers: dict[bytes, bytes]) -> int:
        """A status, or 0 for an upload that may go on."""
        length = headers.get(b"content-length", b"")
        if not length.isdigit():
            return 411
        if int(length) > self.max_upload + FORM:
            return 413
        make_room(self.files, KEPT * self.max_upload)
        return 0


def make_room(folder: Path, limit: int) -> None:
    """Remove the oldest files in a folder, at any depth, until they are at most `limit` bytes."""
    found = []
    for place, _, names in os.walk(folder):
        for path in (Path(place, name) for name in names):
            with suppress(OSError):  # gradio removes files, too
                known = path.stat()
                found.append((known.st_mtime_ns, path, known.st_size))
    total = sum(size for _, _, size in found)
    for _, path, size in sorted(found):
        if total <= limit:
            return
        path.unlink(missing_ok=True)
        total -= size


async def _read_body(receive: Any) -> bytes | None:
    """The whole body, or None when it is too long."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > MAX_MESSAGE:
            return None
    return body


def _replay(body: bytes, receive: Any) -> Callable[[], Any]:
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Any:
        return waiting.pop() if waiting else await receive()

    return replay


def _names_urls(body: bytes) -> bool:
    """Whether a JSON body has a `path` that is a URL, at any depth."""
    try:
        waiting = [json.loads(body)]
    except (ValueError, RecursionError):
        return False
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if str(value.get("path")).lstrip().lower().startswith(("http:", "https:")):
                return True
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return False
