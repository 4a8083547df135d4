"""What the fleet's clients see: run on one of its nodes while something is broken.

Reads its configuration as JSON from the file it is given, keeps `state` beside it up to date
(how long ago each kind of client last succeeded, in seconds) and `acknowledged` (how many writes
were), and writes `result` when it is told to end. The journal has what clients were told instead of an
answer. Times are milliseconds of the clock that /proc/uptime shows.
"""
import http.cookiejar
import json
import os
import signal
import socket
import ssl
import struct
import sys
import threading
import time
import urllib.error
import urllib.request

import psycopg2

with open(sys.argv[1]) as file:
    CONFIG = json.load(file)
HERE = os.path.dirname(sys.argv[1])
VIP = CONFIG["vip"]
CA = "/run/bakehouse/tls/ca.crt"
# How much slower the machines are than real ones: clients wait that much longer for an answer, and before they
# ask again, so that the load is a real one's.
PATIENCE = CONFIG["patience"]

seen = {"vip": [], "writes": [], "http": [], "errors": [], "logouts": [], "primaries": {}}
acknowledged = []
ended = threading.Event()


def now():
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * 1000)


def connect(host, port, database):
    return psycopg2.connect(
        host=host,
        port=port,
        dbname=database,
        user="odoo",
        password=CONFIG["password"],
        sslmode="verify-ca",
        sslrootcert=CA,
        connect_timeout=max(2, 2 * PATIENCE),
        tcp_user_timeout=1500 * PATIENCE,
        keepalives_idle=1,
        keepalives_interval=1,
        keepalives_count=2 * PATIENCE,
        options=f"-c statement_timeout={3000 * PATIENCE}",
    )


def ping():
    """An echo every 50 ms to the VIP."""
    line = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    line.settimeout(0.05)
    own = os.getpid() & 0xFFFF
    number = 0
    while not ended.is_set():
        number = (number + 1) & 0xFFFF
        head = struct.pack("!BBHHH", 8, 0, 0, own, number)
        total = sum(struct.unpack("!4H", head))
        total = (total >> 16) + (total & 0xFFFF)
        sent = time.monotonic()
        try:
            line.sendto(struct.pack("!BBHHH", 8, 0, ~total & 0xFFFF, own, number), (VIP, 0))
            while True:
                answer = line.recv(2048)
                kind, _, _, who, _ = struct.unpack("!BBHHH", answer[20:28])
                if kind == 0 and who == own:
                    seen["vip"].append(now())
                    break
        except OSError:
            pass
        time.sleep(max(0.0, 0.05 - (time.monotonic() - sent)))


def prepare():
    """A database of its own, which the one before may have left."""
    while True:
        try:
            line = connect(VIP, 5000, "postgres")
            line.autocommit = True
            with line.cursor() as cursor:
                cursor.execute("SELECT 1 FROM pg_database WHERE datname = 'rehearsal'")
                if not cursor.fetchone():
                    cursor.execute("CREATE DATABASE rehearsal")
            line.close()
            line = connect(VIP, 5000, "rehearsal")
            with line, line.cursor() as cursor:
                cursor.execute("CREATE TABLE IF NOT EXISTS ledger (run text, id bigint, PRIMARY KEY (run, id))")
            line.close()
            return
        except psycopg2.Error as e:
            print("prepare:", e, flush=True)
            time.sleep(1)


def write():
    """One row after the other; what was acknowledged must be there in the end."""
    line = None
    number = 0
    while not ended.is_set():
        number += 1
        try:
            if line is None:
                line = connect(VIP, 5000, "rehearsal")
                line.autocommit = True
            with line.cursor() as cursor:
                cursor.execute("INSERT INTO ledger VALUES (%s, %s)", (CONFIG["run"], number))
            acknowledged.append(number)
            seen["writes"].append(now())
            time.sleep(0.05 * PATIENCE)
        except psycopg2.Error as e:
            print("write:", e, flush=True)
            if line is not None:
                line.close()
                line = None
            time.sleep(0.1)


def lost():
    """Acknowledged rows that are not there, asked of whoever is the primary now."""
    while True:
        try:
            line = connect(VIP, 5000, "rehearsal")
            with line, line.cursor() as cursor:
                cursor.execute("SELECT id FROM ledger WHERE run = %s", (CONFIG["run"],))
                there = {row[0] for row in cursor.fetchall()}
            line.close()
            return [number for number in acknowledged if number not in there]
        except psycopg2.Error:
            time.sleep(1)


def watch(name, address):
    """Whether a database server says that it takes writes, asked of itself."""
    spans = seen["primaries"].setdefault(name, [])
    line = None
    while not ended.is_set():
        asked = now()
        try:
            if line is None:
                line = connect(address, 5432, "rehearsal")
                line.autocommit = True
            with line.cursor() as cursor:
                # Not what it says of itself alone: it has to take a write.
                cursor.execute("SELECT pg_is_in_recovery() OR current_setting('transaction_read_only') = 'on'")
                if not cursor.fetchone()[0]:
                    spans.append([asked, now()])
        except psycopg2.Error:
            if line is not None:
                line.close()
                line = None
        time.sleep(0.3)


class User:
    """Somebody who is logged in to Odoo and looks at it all the time."""

    def __init__(self):
        tls = ssl.create_default_context(cafile=CA)
        jar = urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar())
        self.web = urllib.request.build_opener(urllib.request.HTTPSHandler(context=tls), jar)
        self.who = None

    def call(self, path, seconds, **params):
        body = json.dumps({"jsonrpc": "2.0", "method": "call", "params": params}).encode()
        request = urllib.request.Request(f"https://{VIP}{path}", body, {"Content-Type": "application/json"})
        with self.web.open(request, timeout=seconds * PATIENCE) as answer:
            return json.load(answer)

    def enter(self):
        while self.who is None:
            try:
                # It is not measured, and long: a password is hashed 600,000 times.
                answer = self.call("/web/session/authenticate", 25, db="odoo", login="admin", password=CONFIG["admin"])
                self.who = answer["result"]["uid"]
            except (OSError, KeyError, ValueError) as e:
                print("login:", repr(e), flush=True)
                time.sleep(1)

    def look(self):
        while not ended.is_set():
            try:
                answer = self.call("/web/session/get_session_info", 5)
                if answer.get("result", {}).get("uid") == self.who:
                    seen["http"].append(now())
                elif answer.get("error", {}).get("code") == 100:
                    # "Odoo Session Expired": logged out.
                    seen["logouts"].append(now())
                else:
                    print("page:", answer, flush=True)
                    seen["errors"].append(now())
            except (OSError, ValueError) as e:
                print("page:", e, flush=True)
                seen["errors"].append(now())
            time.sleep(0.2 * PATIENCE)


def age(kind):
    return (now() - seen[kind][-1]) / 1000 if seen[kind] else 1e6


def put(name, value):
    with open(f"{HERE}/{name}.new", "w") as file:
        json.dump(value, file)
    os.rename(f"{HERE}/{name}.new", f"{HERE}/{name}")


def main():
    prepare()
    jobs = [ping, write]
    kinds = ["vip", "writes"]
    jobs += [lambda n=n, a=a: watch(n, a) for n, a in CONFIG["databases"].items()]
    if CONFIG["apps"]:
        users = [User(), User()]
        for user in users:
            user.enter()
        jobs += [user.look for user in users]
        kinds.append("http")
    # Before there is anything to tell, the signal ends it at once.
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    threads = [threading.Thread(target=job, daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    while not ended.wait(1):
        put("acknowledged", len(acknowledged))
        put("state", {kind: age(kind) for kind in kinds})
    seen["lost"] = lost()
    put("result", seen)
    # Clients that wait for a dead peer are not waited for.
    os._exit(0)


main()
