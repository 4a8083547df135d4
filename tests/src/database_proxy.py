"""Clients of the database during a failover, through the image's HAProxy with the configuration of a node. The primary
and the path to it disappear without closing a connection, as in a power cut. Exits with 1 if a client hangs."""
import http.server
import os
import re
import socket
import subprocess
import sys
import threading
import time

from sandbox import loopback

OLD, NEW = "10.10.0.10", "10.10.0.11"
# Seconds after which each client has an answer or a closed connection.
LIMIT = 8
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


def answer(client):
    try:
        if client.recv(8):
            client.sendall(b"S")
            client.recv(1)
    except OSError:
        pass


def connect():
    client = socket.create_connection(("127.0.0.1", 5000))
    client.settimeout(3 * LIMIT)
    client.sendall(b"startup.")
    return client


results = []


def ask():
    begun = time.monotonic()
    try:
        with connect() as client:
            result = "answered" if client.recv(1) else "closed"
    except TimeoutError:
        result = "HANGS"
    except OSError as e:
        result = type(e).__name__
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
    haproxy = subprocess.Popen(["haproxy", "-db", "-f", "/tmp/haproxy.cfg"])
    time.sleep(3)
    waiting = connect()
    assert waiting.recv(1) == b"S", "no database before the failover"

    rules = "".join(f"add rule inet cut out ip {way} {OLD} drop\n" for way in ("daddr", "saddr"))
    cut = f"add table inet cut\nadd chain inet cut out {{ type filter hook output priority 0; }}\n{rules}"
    subprocess.run(["nft", "-f", "-"], input=cut, text=True, check=True)
    begun = time.monotonic()
    waited = []

    def wait():
        try:
            waited.append("closed" if not waiting.recv(1) else "answered")
        except OSError as e:
            waited.append(type(e).__name__)
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
    if longest > LIMIT or waited[1] > LIMIT or not counts.get("answered"):
        sys.exit(text)


main()
