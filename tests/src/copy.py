"""Creates a standby with the command of Patroni's configuration, in the image's tree, and stops the copying processes
for longer than the timeouts of streaming replication. Exits with 1 if the copy fails."""

import os
import signal
import subprocess
import sys
import time

import yaml
from sandbox import Account, loopback

PLACE = "/tmp/copy"
# More data than the socket buffers hold, so that the stopped receiver blocks the sender.
ROWS = "CREATE TABLE t AS SELECT i, md5(i::text) a, md5((i + 1)::text) b FROM generate_series(1, 1000000) i"

with open("/run/bakehouse/patroni.yml") as file:
    CONFIG = yaml.safe_load(file)["postgresql"]
LIMITS = {name: CONFIG["parameters"][name] for name in ["wal_sender_timeout", "tcp_user_timeout"]}


def of(name):
    found = subprocess.run(["pgrep", "-x", name], stdout=subprocess.PIPE, text=True)
    return [int(pid) for pid in found.stdout.split()]


def main():
    loopback()
    postgres = Account("postgres", PLACE)
    programs = CONFIG["bin_dir"]
    postgres.run(f"{programs}/initdb", "-D", f"{PLACE}/data", "--no-sync", "--auth=trust", "--no-instructions")
    impatient = "".join(f"{name} = '{limit}'\n" for name, limit in LIMITS.items())
    with open(f"{PLACE}/data/postgresql.conf", "a") as file:
        file.write(f"unix_socket_directories = '{PLACE}'\nfsync = off\n{impatient}")
    postgres.run(f"{programs}/pg_ctl", "-D", f"{PLACE}/data", "-s", "-w", "-l", f"{PLACE}/log", "start")
    postgres.run(f"{programs}/psql", "-q", "-h", PLACE, "-d", "postgres", "-c", ROWS)

    # The arguments that Patroni passes.
    (method,) = CONFIG["create_replica_methods"]
    line = "host=127.0.0.1 port=5432 user=postgres"
    words = ["--scope=x", "--role=replica", f"--datadir={PLACE}/standby", f"--connstring={line}"]
    copy = postgres.start(*CONFIG[method]["command"].split(), *words)
    # pg_basebackup runs a second process that receives the WAL.
    while len(copies := of("pg_basebackup")) < 2:
        if copy.poll() is not None:
            sys.exit(f"the copy ended with {copy.returncode} before it could be stopped")
        time.sleep(0.001)
    for pid in copies:
        os.kill(pid, signal.SIGSTOP)
    # Longer than either timeout, after which the server would end a streaming connection.
    time.sleep(max(int(limit.removesuffix("s")) for limit in LIMITS.values()) + 4)
    for pid in copies:
        os.kill(pid, signal.SIGCONT)
    if copy.wait():
        with open(f"{PLACE}/log") as log:
            sys.exit(f"the copy ended with {copy.returncode}:\n{log.read()[-2000:]}")
    if not os.path.exists(f"{PLACE}/standby/backup_label"):
        sys.exit("the copy has no backup_label")


main()
