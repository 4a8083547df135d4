"""Clients of a fleet: one writes to the primary, and one reads from Odoo, both through the VIP.

Appends to files in /run/clients: `acknowledged` has the number of each acknowledged write, `failed` the error of each
failed read. On SIGTERM, writes the acknowledged numbers that the database does not have to `lost`, and exits.
"""

import configparser
import http.client
import signal
import threading
import time

import psycopg2

VIP = "10.10.0.100"
FOLDER = "/run/clients"
ended = threading.Event()


def connect(database):
    config = configparser.RawConfigParser()
    config.read("/run/bakehouse/odoo.conf")
    connection = psycopg2.connect(
        host=VIP,
        port=5000,
        dbname=database,
        user="odoo",
        password=config["options"]["db_password"],
        sslmode="verify-ca",
        sslrootcert="/run/bakehouse/tls/ca.crt",
        connect_timeout=3,
        tcp_user_timeout=3000,
        options="-c statement_timeout=5000",
    )
    connection.autocommit = True
    return connection


def until_done(work):
    """Repeats `work` until it succeeds. Returns its result."""
    while True:
        try:
            return work()
        except psycopg2.Error as error:
            print(error, flush=True)
            time.sleep(0.5)


def create():
    connection = connect("postgres")
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1 FROM pg_database WHERE datname = 'clients'")
        if not cursor.fetchone():
            cursor.execute("CREATE DATABASE clients")
    connection.close()
    connection = connect("clients")
    with connection.cursor() as cursor:
        cursor.execute("CREATE TABLE IF NOT EXISTS ledger (id bigint PRIMARY KEY)")
    connection.close()


def write():
    number = 0
    connection = None
    with open(f"{FOLDER}/acknowledged", "a", buffering=1) as acknowledged:
        while not ended.is_set():
            number += 1
            try:
                connection = connection or connect("clients")
                with connection.cursor() as cursor:
                    cursor.execute("INSERT INTO ledger VALUES (%s)", (number,))
                acknowledged.write(f"{number}\n")
                time.sleep(0.05)
            except psycopg2.Error as error:
                print(error, flush=True)
                connection = None
                time.sleep(0.2)


def read():
    with open(f"{FOLDER}/failed", "a", buffering=1) as failed:
        while not ended.is_set():
            try:
                connection = http.client.HTTPConnection(VIP, 80, timeout=30)
                connection.request("GET", "/web/health")
                response = connection.getresponse()
                response.read()
                if response.status != 200:
                    failed.write(f"{time.time():.1f} status {response.status}\n")
                connection.close()
            except (OSError, http.client.HTTPException) as error:
                failed.write(f"{time.time():.1f} {error!r}\n")
            time.sleep(0.1)


def kept():
    connection = connect("clients")
    with connection.cursor() as cursor:
        cursor.execute("SELECT id FROM ledger")
        return {row[0] for row in cursor.fetchall()}


def main():
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    until_done(create)
    threads = [threading.Thread(target=target) for target in (write, read)]
    for thread in threads:
        thread.start()
    ended.wait()
    for thread in threads:
        thread.join()
    found = until_done(kept)
    with open(f"{FOLDER}/acknowledged") as file:
        lost = [line for line in file if int(line) not in found]
    with open(f"{FOLDER}/lost", "w") as file:
        file.writelines(lost)


if __name__ == "__main__":
    main()
