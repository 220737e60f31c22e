"""A web server on 127.0.0.1 that serves what a test gives it, well or badly."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Union

Content = Union[bytes, Path]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        site = self.server.site
        self.path = re.sub(r"^http://[^/]+", "", self.path)  # what a proxy is asked for
        site.requests.append((self.path, self.headers.get("Range", "")))
        trick = site.tricks.get(self.path)
        try:
            if trick is None or not trick(self):
                self.serve()
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client has ended

    do_HEAD = do_GET

    def do_CONNECT(self) -> None:
        """As a proxy for https: bytes to and fro, to whichever host was named on 127.0.0.1."""
        self.server.site.requests.append((self.path, ""))
        with socket.create_connection(("127.0.0.1", int(self.path.rpartition(":")[2]))) as far:
            self.send_response(200)
            self.end_headers()
            back = threading.Thread(target=pump, args=(far, self.connection))
            back.start()
            pump(self.connection, far)
            back.join()
        self.close_connection = True

    def serve(self, ranges: bool = True, count: int = -1, kind: str = "application/octet-stream") -> None:
        """The file; `count`: break off after so many bytes of it."""
        content = self.server.site.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")) if ranges else None
        start = int(asked.group(1)) if asked else 0
        if start >= size > 0:
            self.answer(416, 0, [("Content-Range", f"bytes */{size}")])
            return
        more = [("Content-Range", f"bytes {start}-{size - 1}/{size}")] if asked else []
        self.answer(206 if asked else 200, size - start, [("Content-Type", kind), *more])
        end = 0 if self.command == "HEAD" else size if count < 0 else min(size, start + count)
        if isinstance(content, bytes):
            self.wfile.write(content[start:end])
            return
        with content.open("rb") as file:
            file.seek(start)
            while file.tell() < end:
                self.wfile.write(file.read(min(1 << 20, end - file.tell())))

    def answer(self, code: int, length: int, headers: list[tuple[str, str]]) -> None:
        self.send_response(code)
        for name, value in [("Content-Length", str(length)), *headers]:
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def pump(source: socket.socket, sink: socket.socket) -> None:
    """All that comes from one socket goes to the other, until the end of either."""
    with contextlib.suppress(OSError):
        for piece in iter(lambda: source.recv(65536), b""):
            sink.sendall(piece)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    site: Site

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that refuses our certificate, or was killed


Trick = Callable[[Handler], bool]


class Site:
    """Files by path, and what to do instead of serving them: a trick says whether it has answered."""

    def __init__(self, certificate: tuple[Path, Path] | None = None) -> None:
        self.files: dict[str, Content] = {}
        self.tricks: dict[str, Trick] = {}
        self.requests: list[tuple[str, str]] = []
        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.site = self
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.base = f"http{'s' if certificate else ''}://127.0.0.1:{self.server.server_address[1]}"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))

    def asked(self, path: str) -> list[str]:
        """The Range headers of the requests for a path, '' where there was none."""
        return [asked for name, asked in self.requests if name == path]

    def __enter__(self) -> Site:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """(certificate, key) of 127.0.0.1, signed by itself."""
    certificate, key = folder / "cert.pem", folder / "key.pem"
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    words += ["-addext", "subjectAltName=IP:127.0.0.1", "-out", str(certificate), "-keyout", str(key)]
    subprocess.run(words, check=True, capture_output=True)
    return certificate, key


# Tricks ##############################################################################################


def break_off(*counts: int, ranges: bool = True) -> Trick:
    """The first requests get so many bytes each, though more are announced; later ones get all."""
    left = list(counts)

    def trick(handler: Handler) -> bool:
        handler.serve(ranges=ranges, count=left.pop(0) if left else -1)
        return True

    return trick


def status(code: int, times: int = 1 << 30, **headers: str) -> Trick:
    """Nothing but a status, so many times."""
    left = [times]

    def trick(handler: Handler) -> bool:
        left[0] -= 1
        if left[0] < 0:
            return False
        handler.answer(code, 0, [(name.replace("_", "-"), value) for name, value in headers.items()])
        return True

    return trick


def redirect(target: str, code: int = 302) -> Trick:
    return status(code, Location=target)


def page(text: str = "<html><body>Please log in</body></html>", kind: str = "text/html") -> Trick:
    def trick(handler: Handler) -> bool:
        handler.answer(200, len(text), [("Content-Type", kind)])
        handler.wfile.write(text.encode())
        return True

    return trick


def announce(length: int) -> Trick:
    """Says that the file is longer, or shorter, than it is."""

    def trick(handler: Handler) -> bool:
        content = handler.server.site.files[handler.path]
        assert isinstance(content, bytes)
        handler.answer(200, length, [])
        handler.wfile.write(content)
        return True

    return trick


def drip(stop: threading.Event) -> Trick:
    """A byte of the body now and then, for ever."""

    def trick(handler: Handler) -> bool:
        handler.answer(200, 1 << 30, [])
        while not stop.wait(0.1):
            handler.wfile.write(b"x")
        return True

    return trick


def hold(count: int, gate: threading.Event, reached: threading.Event | None = None) -> Trick:
    """So many bytes, and the rest when the gate opens."""

    def trick(handler: Handler) -> bool:
        content = handler.server.site.files[handler.path]
        assert isinstance(content, bytes)
        if handler.headers.get("Range") or gate.is_set():
            return False
        handler.answer(200, len(content), [])
        handler.wfile.write(content[:count])
        if reached:
            reached.set()
        gate.wait(60)
        handler.wfile.write(content[count:])
        return True

    return trick
