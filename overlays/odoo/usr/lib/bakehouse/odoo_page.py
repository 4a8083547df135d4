"""The page that users get while this node updates the database and no other node serves.

Odoo does not run yet, so its port is free. Every response is 503 with the header HEADER, by which the hubs' HAProxy
recognises the page. It sends users here if no app node serves (backend odoo-update).
"""

import contextlib
import html
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import BoundedSemaphore, Thread
from typing import Any

HEADER = ("Bakehouse-Update", "running")
# Connections at the same time, and seconds for each request. Other nodes of the fleet may be hostile.
CONNECTIONS = 64
PATIENCE = 5
# Seconds after which browsers load the page again.
RELOAD = 10

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="refresh" content="{reload}">
<title>Odoo is being updated</title>
<style>
body {{ font: 1.1rem/1.5 system-ui, sans-serif; max-width: 34rem; margin: 15vh auto 0; padding: 0 1rem; color: #222; }}
progress {{ width: 100%; }}
@media (prefers-color-scheme: dark) {{ body {{ background: #1b1b1b; color: #ddd; }} }}
</style>
</head>
<body>
<h1>Odoo is being updated</h1>
<p>{expected}</p>
<progress></progress>
<p>It began {minutes}. Nothing is lost. This page opens Odoo when the update is complete.</p>
</body>
</html>
"""


class UpdatePage:
    """What the page says. `seconds`: how long the last update took."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.since = time.monotonic()

    def __str__(self) -> str:
        gone = time.monotonic() - self.since
        if self.seconds is None:
            expected = "This usually takes some minutes."
        elif gone > self.seconds:
            expected = f"The last update took {minutes(self.seconds)}. This one takes longer."
        else:
            expected = f"Expected to end in about {minutes(self.seconds - gone)}."
        began = "less than a minute ago" if gone < 60 else f"{minutes(gone)} ago"
        return PAGE.format(reload=RELOAD, expected=html.escape(expected), minutes=began)


def minutes(seconds: float) -> str:
    number = max(1, round(seconds / 60))
    return "1 minute" if number == 1 else f"{number} minutes"


class Server(ThreadingHTTPServer):
    """An HTTP server with a limit of its connections."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], page: UpdatePage) -> None:
        self.page = page
        self.free = BoundedSemaphore(CONNECTIONS)
        super().__init__(address, Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self.free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that disconnects is no fault of this node."""


class Handler(BaseHTTPRequestHandler):
    """Returns the page."""

    timeout = PATIENCE
    server: Server
    server_version = "Bakehouse"
    sys_version = ""

    def answer(self) -> None:
        body = str(self.server.page).encode()
        self.send_response(503)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Connection", "close")
        self.send_header("Retry-After", str(RELOAD))
        self.send_header(*HEADER)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = answer

    def log_message(self, format: str, *args: Any) -> None:
        """The hubs check every second, which would fill the journal."""


@contextlib.contextmanager
def serve_page(address: str, port: int, seconds: float | None) -> Iterator[None]:
    """Serves the page as long as the context lasts."""
    server = Server((address, port), UpdatePage(seconds))
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.2}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
