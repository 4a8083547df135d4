"""Messages between Odoo and the renderer of PDF files (odoo-print), and the client.

A message is one byte (its kind), the length of its content in four bytes (big-endian), and the content:

    renderer → client   READY                 the renderer reads the job
    client → renderer   JOB     JSON
    renderer → client   FETCH   URL           an image, a font or a style sheet of Odoo
    client → renderer   ASSET   media type, line feed, bytes; empty if the client refuses the URL
    renderer → client   RESULT  a PDF file or an image
    renderer → client   REFUSAL text for the user

The renderer has no network. It gets every file through this connection, and the client decides which.
"""

import random
import socket
import struct
import time
from collections.abc import Callable
from typing import BinaryIO

SOCKET = "/run/odoo-print/socket"
READY, JOB, FETCH, ASSET, RESULT, REFUSAL = b"R", b"J", b"F", b"A", b"P", b"E"

MAX_MESSAGE = 64 << 20
MAX_FETCHES = 2000
# All fetched files of one job, in bytes.
MAX_FETCHED = 128 << 20
# Seconds that a job waits for one of the renderers.
MAX_WAIT = 120
# Seconds of one job. odoo-print@.service has a limit that is a little longer.
MAX_SECONDS = 120
MAX_PAGES = 1000
MAX_MEMORY = "400 MB"

Fetch = Callable[[str], tuple[str, bytes] | None]


class PrintError(Exception):
    """The text is for the user who prints."""


def send(stream: BinaryIO, kind: bytes, content: bytes) -> None:
    stream.write(kind + struct.pack(">I", len(content)))
    stream.write(content)
    stream.flush()


def receive(stream: BinaryIO) -> tuple[bytes, bytes]:
    """Returns kind and content of the next message. Raises EOFError at the end of the connection."""
    head = stream.read(5)
    if len(head) < 5:
        raise EOFError
    (size,) = struct.unpack(">I", head[1:])
    if size > MAX_MESSAGE:
        raise EOFError
    content = stream.read(size)
    if len(content) < size:
        raise EOFError
    return head[:1], content


def connect(path: str, until: float) -> tuple[socket.socket, BinaryIO]:
    """Waits for a renderer. systemd closes connections beyond `MaxConnections=` of odoo-print.socket at once."""
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(max(until - time.monotonic(), 0.1))
            connection.connect(path)
            stream = connection.makefile("rwb")
            if receive(stream)[0] == READY:
                return connection, stream
        except (EOFError, OSError):
            pass
        connection.close()
        if time.monotonic() > until:
            raise PrintError(
                f"No renderer was free for {MAX_WAIT} seconds: other users print, or odoo-print.socket has failed. "
                "Print again in a few minutes."
            )
        time.sleep(random.uniform(0.05, 0.4))


def render(job: bytes, fetch: Fetch, path: str = SOCKET) -> bytes:
    """Returns the PDF file or the image of a job."""
    if len(job) > MAX_MESSAGE:
        raise PrintError(
            f"The document has {len(job) >> 20} MB of HTML. The limit is {MAX_MESSAGE >> 20} MB. "
            "Print fewer records at once."
        )
    connection, stream = connect(path, time.monotonic() + MAX_WAIT)
    fetched = fetches = 0
    with connection, stream:
        until = time.monotonic() + MAX_SECONDS
        try:
            send(stream, JOB, job)
            while True:
                connection.settimeout(max(until - time.monotonic(), 0.1))
                kind, content = receive(stream)
                if kind == RESULT:
                    return content
                if kind == REFUSAL:
                    raise PrintError(content.decode(errors="replace")[:2000])
                if kind != FETCH:
                    raise EOFError
                fetches += 1
                asset = fetch(content.decode()) if fetches <= MAX_FETCHES and fetched < MAX_FETCHED else None
                answer = b"\n".join((asset[0].encode(), asset[1])) if asset else b""
                fetched += len(answer)
                send(stream, ASSET, answer if len(answer) <= MAX_MESSAGE else b"")
        except (EOFError, OSError, ValueError) as error:
            raise PrintError(
                f"The PDF file was not made within {MAX_SECONDS} seconds and {MAX_MEMORY} of memory, which are the "
                "limits of one document. Print fewer records at once."
            ) from error
