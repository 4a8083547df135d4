"""Runs clients of the fleet on one of its nodes during a rehearsal, and records their successes and errors.

Reads its configuration (JSON) from the file in the first argument. Every second, writes two files beside it: `state`
has the seconds since the last success of each kind of client, `acknowledged` has the number of acknowledged writes. On
SIGTERM, writes `result` and exits. Prints the clients' errors to the journal. Times are milliseconds of the clock that
/proc/uptime shows (CLOCK_BOOTTIME).
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
# How many times slower the machines are than real ones. Clients multiply their timeouts and their intervals by it, so
# that the load is in proportion to the machines' speed.
TIMEOUT_SCALE = CONFIG["patience"]

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
        connect_timeout=max(2, 2 * TIMEOUT_SCALE),
        tcp_user_timeout=1500 * TIMEOUT_SCALE,
        keepalives_idle=1,
        keepalives_interval=1,
        keepalives_count=2 * TIMEOUT_SCALE,
        options=f"-c statement_timeout={3000 * TIMEOUT_SCALE}",
    )


def ping():
    """Sends an ICMP echo request to the VIP every 50 ms."""
    connection = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    connection.settimeout(0.05)
    own = os.getpid() & 0xFFFF
    number = 0
    while not ended.is_set():
        number = (number + 1) & 0xFFFF
        head = struct.pack("!BBHHH", 8, 0, 0, own, number)
        total = sum(struct.unpack("!4H", head))
        total = (total >> 16) + (total & 0xFFFF)
        sent = time.monotonic()
        try:
            connection.sendto(struct.pack("!BBHHH", 8, 0, ~total & 0xFFFF, own, number), (VIP, 0))
            while True:
                reply = connection.recv(2048)
                kind, _, _, identifier, _ = struct.unpack("!BBHHH", reply[20:28])
                if kind == 0 and identifier == own:
                    seen["vip"].append(now())
                    break
        except OSError:
            pass
        time.sleep(max(0.0, 0.05 - (time.monotonic() - sent)))


def prepare():
    """Creates the database `rehearsal`, unless an earlier rehearsal created it."""
    while True:
        try:
            connection = connect(VIP, 5000, "postgres")
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1 FROM pg_database WHERE datname = 'rehearsal'")
                if not cursor.fetchone():
                    cursor.execute("CREATE DATABASE rehearsal")
            connection.close()
            connection = connect(VIP, 5000, "rehearsal")
            with connection, connection.cursor() as cursor:
                cursor.execute("CREATE TABLE IF NOT EXISTS ledger (run text, id bigint, PRIMARY KEY (run, id))")
            connection.close()
            return
        except psycopg2.Error as e:
            print("prepare:", e, flush=True)
            time.sleep(1)


def write():
    """Inserts one row after the other, and records the acknowledged ones."""
    connection = None
    number = 0
    while not ended.is_set():
        number += 1
        try:
            if connection is None:
                connection = connect(VIP, 5000, "rehearsal")
                connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute("INSERT INTO ledger VALUES (%s, %s)", (CONFIG["run"], number))
            acknowledged.append(number)
            seen["writes"].append(now())
            time.sleep(0.05 * TIMEOUT_SCALE)
        except psycopg2.Error as e:
            print("write:", e, flush=True)
            if connection is not None:
                connection.close()
                connection = None
            time.sleep(0.1)


def lost():
    """Returns the acknowledged rows that are missing on the current primary."""
    while True:
        try:
            connection = connect(VIP, 5000, "rehearsal")
            with connection, connection.cursor() as cursor:
                cursor.execute("SELECT id FROM ledger WHERE run = %s", (CONFIG["run"],))
                found = {row[0] for row in cursor.fetchall()}
            connection.close()
            return [number for number in acknowledged if number not in found]
        except psycopg2.Error:
            time.sleep(1)


def watch(name, address):
    """Records when a database server reports that it accepts writes. Connects to the server directly."""
    spans = seen["primaries"].setdefault(name, [])
    connection = None
    while not ended.is_set():
        started = now()
        try:
            if connection is None:
                connection = connect(address, 5432, "rehearsal")
                connection.autocommit = True
            with connection.cursor() as cursor:
                # A server that is not in recovery may still be read-only.
                cursor.execute("SELECT pg_is_in_recovery() OR current_setting('transaction_read_only') = 'on'")
                if not cursor.fetchone()[0]:
                    spans.append([started, now()])
        except psycopg2.Error:
            if connection is not None:
                connection.close()
                connection = None
        time.sleep(0.3)


class User:
    """User of Odoo, who logs in once and then sends one request after the other."""

    def __init__(self):
        tls = ssl.create_default_context(cafile=CA)
        jar = urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar())
        self.web = urllib.request.build_opener(urllib.request.HTTPSHandler(context=tls), jar)
        self.uid = None

    def call(self, path, seconds, **params):
        body = json.dumps({"jsonrpc": "2.0", "method": "call", "params": params}).encode()
        request = urllib.request.Request(f"https://{VIP}{path}", body, {"Content-Type": "application/json"})
        with self.web.open(request, timeout=seconds * TIMEOUT_SCALE) as response:
            return json.load(response)

    def log_in(self):
        while self.uid is None:
            try:
                # A long timeout, because Odoo hashes the password 600,000 times. The rehearsal does not measure it.
                reply = self.call("/web/session/authenticate", 25, db="odoo", login="admin", password=CONFIG["admin"])
                self.uid = reply["result"]["uid"]
            except (OSError, KeyError, ValueError) as e:
                print("login:", repr(e), flush=True)
                time.sleep(1)

    def browse(self):
        while not ended.is_set():
            try:
                reply = self.call("/web/session/get_session_info", 5)
                if reply.get("result", {}).get("uid") == self.uid:
                    seen["http"].append(now())
                elif reply.get("error", {}).get("code") == 100:
                    # "Odoo Session Expired"
                    seen["logouts"].append(now())
                else:
                    print("page:", reply, flush=True)
                    seen["errors"].append(now())
            except (OSError, ValueError) as e:
                print("page:", e, flush=True)
                seen["errors"].append(now())
            time.sleep(0.2 * TIMEOUT_SCALE)


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
            user.log_in()
        jobs += [user.browse for user in users]
        kinds.append("http")
    # Until here, SIGTERM ends the probe without a result.
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    threads = [threading.Thread(target=job, daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    while not ended.wait(1):
        put("acknowledged", len(acknowledged))
        put("state", {kind: age(kind) for kind in kinds})
    seen["lost"] = lost()
    put("result", seen)
    # Does not wait for threads, which may wait for a dead peer.
    os._exit(0)


main()
