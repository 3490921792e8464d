"""Serves a report on this machine and renews it while the run goes on: ``report RUN_DIR --watch``."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ..moe.observe.metrics import METRICS_FILE
from .page import POLICY, page

HOST = "127.0.0.1"
#: drawing a page may take one of so many seconds, because the run may need this machine's cores
SPARE = 10
#: asks every two seconds whether there is a newer page, and takes its content without losing the place
SCRIPT = """
let version = document.documentElement.dataset.version;
async function renew() {
  try {
    const newest = await (await fetch("version", {cache: "no-store"})).text();
    if (newest !== version) {
      const text = await (await fetch("./", {cache: "no-store"})).text();
      const found = new DOMParser().parseFromString(text, "text/html");
      const x = window.scrollX, y = window.scrollY;
      document.querySelector("main").replaceWith(found.querySelector("main"));
      document.title = found.title;
      window.scrollTo(x, y);
      version = newest;
    }
    document.body.classList.remove("gone");
  } catch (error) {
    document.body.classList.add("gone");
  }
  setTimeout(renew, 2000);
}
setTimeout(renew, 2000);
"""
STYLE = """
.gone main::before { content: "The server has ended; this page is no longer renewed."; display: block;
  padding: 8px 14px; margin-bottom: 14px; border: 1px solid var(--line); border-radius: 10px; }
"""


class Live:
    """The newest page of some runs. ``build`` returns its title and parts; ValueError says why there is none yet."""

    def __init__(self, folders: Sequence[Path], build: Callable[[], tuple[str, list[str]]]) -> None:
        self._files = [folder / METRICS_FILE for folder in folders]
        self._build, self._made = build, ("", b"")
        #: before this moment no newer page is announced
        self._next = 0.0
        self._lock = threading.Lock()  # matplotlib draws one page at a time

    def version(self) -> str:
        """Return a text that changes with the records of the runs, but not sooner than the next page may be drawn."""
        return self._made[0] if time.monotonic() < self._next else self._current()

    def _current(self) -> str:
        return " ".join(map(_stamp, self._files))

    def page(self) -> bytes:
        """Return the page. It is drawn again if the records have changed."""
        with self._lock:
            version, began = self._current(), time.monotonic()
            if self._made[0] != version or not self._made[1]:
                try:
                    title, parts = self._build()
                except ValueError as reason:
                    title, parts = "waiting", [f"<p>{_escaped(str(reason))}</p>"]
                text = page(title, parts, f"<style>{STYLE}</style><script>{SCRIPT}</script>")
                text = text.replace('<html lang="en">', f'<html lang="en" data-version="{version}">', 1)
                self._made = (version, text.encode(errors="backslashreplace"))
                self._next = time.monotonic() + SPARE * (time.monotonic() - began)
            return self._made[1]


def _stamp(file: Path) -> str:
    """Return a text that changes with the file."""
    try:
        found = file.stat()
    except OSError:
        return "-"
    return f"{found.st_mtime_ns}-{found.st_size}-{found.st_ino}"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def serve(live: Live, port: int, ready: Callable[[int], None] = lambda _: None) -> None:
    """Serve the page until KeyboardInterrupt; ``ready`` gets the port. Raises OSError if the port is taken."""
    with ThreadingHTTPServer((HOST, port), _handler(live)) as server:
        server.daemon_threads = True
        ready(server.server_address[1])
        server.serve_forever()


def _handler(live: Live) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """Answers GET and HEAD for two addresses. No part of a request becomes a path of a file."""

        server_version, sys_version = "equimoe", ""

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def _answer(self, body: bool) -> None:
            host = (self.headers.get("Host") or "").rsplit(":", 1)[0]
            path = self.path.split("?")[0]
            if host not in (HOST, "localhost"):  # another site's name that leads here must not read the page
                self.send_error(HTTPStatus.FORBIDDEN)
            elif path == "/":
                self._send(live.page(), "text/html; charset=utf-8", body)
            elif path == "/version":
                self._send(live.version().encode(), "text/plain; charset=utf-8", body)
            else:
                self.send_error(HTTPStatus.NOT_FOUND)

        def _send(self, content: bytes, kind: str, body: bool) -> None:
            self.send_response(HTTPStatus.OK)
            headers = {
                "Content-Type": kind,
                "Content-Length": str(len(content)),
                "Cache-Control": "no-store",
                "X-Content-Type-Options": "nosniff",
                "Content-Security-Policy": f"{POLICY}; script-src 'unsafe-inline'; connect-src 'self'",
            }
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing on the terminal."""

    return Handler
