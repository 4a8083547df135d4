"""A standby is made by Patroni's configuration, in the image's tree, while its machine stands still for longer than
a partner that streams may be silent. Ends with 1 when the copy does not."""
import fcntl
import os
import pwd
import signal
import socket
import struct
import subprocess
import sys
import time

import yaml

PLACE = "/tmp/copy"
POSTGRES = pwd.getpwnam("postgres")
# More than lies in sockets.
ROWS = "CREATE TABLE t AS SELECT i, md5(i::text) a, md5((i + 1)::text) b FROM generate_series(1, 1000000) i"

with open("/run/bakehouse/patroni.yml") as file:
    CONFIG = yaml.safe_load(file)["postgresql"]


def start(*command, **more):
    return subprocess.Popen(command, user=POSTGRES.pw_uid, group=POSTGRES.pw_gid, extra_groups=[], **more)


def run(*command):
    process = start(*command, stdout=subprocess.PIPE, text=True)
    said, _ = process.communicate()
    if process.returncode:
        sys.exit(f"{command[0]} ended with {process.returncode}")
    return said


def of(name):
    found = subprocess.run(["pgrep", "-x", name], stdout=subprocess.PIPE, text=True)
    return [int(pid) for pid in found.stdout.split()]


def main():
    # The sandbox's loopback is down.
    with socket.socket() as line:
        fcntl.ioctl(line, 0x8914, struct.pack("16sH14s", b"lo", 0x41, b""))
    os.makedirs(PLACE)
    os.chown(PLACE, POSTGRES.pw_uid, -1)
    programs = CONFIG["bin_dir"]
    run(f"{programs}/initdb", "-D", f"{PLACE}/data", "--no-sync", "--auth=trust", "--no-instructions")
    impatient = "".join(f"{name} = '{CONFIG['parameters'][name]}'\n" for name in ["wal_sender_timeout", "tcp_user_timeout"])
    with open(f"{PLACE}/data/postgresql.conf", "a") as file:
        file.write(f"unix_socket_directories = '{PLACE}'\nfsync = off\n{impatient}")
    run(f"{programs}/pg_ctl", "-D", f"{PLACE}/data", "-s", "-w", "-l", f"{PLACE}/log", "start")
    run(f"{programs}/psql", "-q", "-h", PLACE, "-d", "postgres", "-c", ROWS)

    # As Patroni calls it.
    (method,) = CONFIG["create_replica_methods"]
    line = "host=127.0.0.1 port=5432 user=postgres"
    words = ["--scope=x", "--role=replica", f"--datadir={PLACE}/standby", f"--connstring={line}"]
    copy = start(*CONFIG[method]["command"].split(), *words)
    # It copies, and a second one takes the WAL.
    while len(copies := of("pg_basebackup")) < 2:
        if copy.poll() is not None:
            sys.exit(f"the copy ended at once, with {copy.returncode}")
        time.sleep(0.001)
    for pid in copies:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(12)
    for pid in copies:
        os.kill(pid, signal.SIGCONT)
    if copy.wait():
        with open(f"{PLACE}/log") as log:
            sys.exit(f"the copy ended with {copy.returncode}:\n{log.read()[-2000:]}")
    if not os.path.exists(f"{PLACE}/standby/backup_label"):
        sys.exit("there is no copy")


main()
