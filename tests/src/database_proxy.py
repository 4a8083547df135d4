"""Clients of the database during a failover: libpq with Odoo's settings, through the image's HAProxy with the
configuration of a node. The primary and the path to it disappear without closing a connection, as in a power cut. Exits
with 1 if a client hangs."""

import http.server
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time

import psycopg2
from sandbox import loopback

OLD, NEW = "10.10.0.10", "10.10.0.11"
# Seconds after which each client has a connection or an error.
LIMIT = 8
PARAMETERS = {
    "server_version": "17.0",
    "client_encoding": "UTF8",
    "DateStyle": "ISO, MDY",
    "standard_conforming_strings": "on",
}
primary = OLD


class Health(http.server.BaseHTTPRequestHandler):
    def do_OPTIONS(self):
        self.send_response(200 if self.server.server_address[0] == primary else 503)
        self.end_headers()

    def log_message(self, *_):
        pass


def serve(address):
    """Serves health checks like Patroni, and answers each database client's first message."""
    health = http.server.ThreadingHTTPServer((address, 8008), Health)
    threading.Thread(target=health.serve_forever, daemon=True).start()
    database = socket.create_server((address, 5432))
    held = []

    def accept():
        while True:
            client, _ = database.accept()
            held.append(client)
            threading.Thread(target=answer, args=(client,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


def message(kind, content):
    return kind + struct.pack("!I", 4 + len(content)) + content


def answer(client):
    """Lets a client of PostgreSQL log in, and answers none of its queries."""
    try:
        if client.recv(1024):
            texts = [f"{name}\0{value}\0".encode() for name, value in PARAMETERS.items()]
            settings = b"".join(message(b"S", text) for text in texts)
            client.sendall(message(b"R", struct.pack("!I", 0)) + settings + message(b"Z", b"I"))
        while client.recv(1024):
            pass
    except OSError:
        pass


def connect():
    return psycopg2.connect(
        host="127.0.0.1", port=5000, dbname="odoo", user="odoo", sslmode="disable", target_session_attrs="any"
    )


results = []


def ask():
    begun = time.monotonic()
    try:
        connect().close()
        result = "connected"
    except psycopg2.Error as e:
        result = "timed out" if "timeout" in str(e) else "refused"
    results.append((result, time.monotonic() - begun))


def main():
    global primary
    loopback()
    for address in OLD, NEW:
        subprocess.run(["ip", "address", "add", address, "dev", "lo"], check=True)
        serve(address)
    with open(os.path.join(os.path.dirname(__file__), "haproxy.cfg")) as file:
        config = file.read()
    # The stand-ins of the databases have no certificates.
    config = re.sub(r" check-ssl verify required ca-file \S+ crt \S+| verifyhost \S+", "", config)
    config = re.sub(r"(?m)^ *(ca-base|crt-base|user|group) .*\n", "", config)
    config = re.sub(r"(?ms)^frontend stats\n.*?(?=^\S)", "", config)
    with open("/tmp/haproxy.cfg", "w") as file:
        file.write(config)
    with open(os.path.join(os.path.dirname(__file__), "odoo.env")) as file:
        limit = re.search(r"(?m)^PGCONNECT_TIMEOUT=(\d+)", file.read())
    # Without Odoo's limit, connections that hang end after more than LIMIT.
    os.environ["PGCONNECT_TIMEOUT"] = limit[1] if limit else str(3 * LIMIT)
    haproxy = subprocess.Popen(["haproxy", "-db", "-f", "/tmp/haproxy.cfg"])
    time.sleep(3)
    waiting = connect()

    rules = "".join(f"add rule inet cut out ip {way} {OLD} drop\n" for way in ("daddr", "saddr"))
    cut = f"add table inet cut\nadd chain inet cut out {{ type filter hook output priority 0; }}\n{rules}"
    subprocess.run(["nft", "-f", "-"], input=cut, text=True, check=True)
    begun = time.monotonic()
    waited = []

    def wait():
        try:
            waiting.cursor().execute("SELECT 1")
            waited.append("answered")
        except psycopg2.Error:
            waited.append("closed")
        waited.append(time.monotonic() - begun)

    threads = [threading.Thread(target=wait)]
    threads[0].start()
    while time.monotonic() < begun + 7:
        threads.append(threading.Thread(target=ask))
        threads[-1].start()
        time.sleep(0.15)
        if time.monotonic() > begun + 3:
            primary = NEW
    for thread in threads:
        thread.join()
    haproxy.kill()
    counts = {result: sum(r == result for r, _ in results) for result, _ in results}
    longest = max(seconds for _, seconds in results)
    text = f"{counts}, longest {longest:.1f} s; the client that waited for a reply: {waited[0]} after {waited[1]:.1f} s"
    print(text)
    if longest > LIMIT or waited[1] > LIMIT or not counts.get("connected"):
        sys.exit(text)


main()
