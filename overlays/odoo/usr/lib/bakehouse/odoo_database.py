"""What odoo-make (when the image is built) and odoo-init (on a node) share: Odoo's initial database."""

import configparser
import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

POSTGRES = "/usr/lib/postgresql/17/bin"
# The modules of the initial database, besides `base`.
SEED_MODULES = ["web"]
# The initial database in the image: a compressed dump in SQL.
SEED = "/usr/share/bakehouse/odoo.sql.gz"


def run(*command: str, **options: Any) -> None:
    subprocess.run(command, text=True, check=True, **options)


def has_primary(config: configparser.SectionProxy) -> bool:
    """Returns whether a primary accepts connections. Whether it accepts this node's password does not matter."""
    command = [f"{POSTGRES}/pg_isready", "-q", "-t", "10", "-h", config["db_host"], "-p", config["db_port"]]
    return subprocess.run(command).returncode == 0


@contextlib.contextmanager
def temporary_postgres(data_dir: str) -> Iterator[str]:
    """Runs a PostgreSQL that only this process uses and that leaves no data; yields the folder of its socket."""
    # An attempt that was interrupted leaves its folder.
    for entry in os.scandir(data_dir):
        if entry.name.startswith("making-"):
            shutil.rmtree(entry.path)
    with tempfile.TemporaryDirectory(prefix="making-", dir=data_dir) as folder:
        data = f"{folder}/data"
        options = ["-U", "odoo", "-E", "UTF8", "--locale=C", "--no-sync", "--auth=trust", "--no-instructions"]
        run(f"{POSTGRES}/initdb", "-D", data, *options, stdout=subprocess.DEVNULL)
        with open(f"{data}/postgresql.conf", "a") as file:
            # Durability is off, because the data does not outlive this process.
            file.write(
                f"listen_addresses = ''\nunix_socket_directories = '{folder}'\nfsync = off\nfull_page_writes = off\n"
                "synchronous_commit = off\nautovacuum = off\nwal_level = minimal\nmax_wal_senders = 0\n"
                "log_min_messages = fatal\n"
            )
        control = [f"{POSTGRES}/pg_ctl", "-D", data, "-s", "-w", "-t", "600"]
        run(*control, "start")
        try:
            yield folder
        finally:
            run(*control, "-m", "immediate", "stop")


def create_database(name: str, socket: str) -> None:
    run(f"{POSTGRES}/createdb", "-h", socket, "-U", "odoo", "-T", "template0", name)


def run_odoo(command: str, *arguments: str, name: str, socket: str, config: str, **options: Any) -> None:
    """Runs a command of Odoo on the database `name` of the temporary PostgreSQL."""
    database = ["-c", config, "-d", name, f"--db_host={socket}", "--db_port=5432", "--db_user=odoo"]
    single = ["--workers=0", "--max-cron-threads=0", "--no-http"]
    run("/usr/bin/odoo", command, *database, *single, *arguments, **options)


def dump_database(name: str, socket: str) -> subprocess.Popen[bytes]:
    """Starts a dump of the database in SQL; the dump is the process's output."""
    # A fixed restrict key, because pg_dump would choose one at random and the output would differ each time.
    options = ["--no-owner", "--no-privileges", "--restrict-key=bakehouse"]
    return subprocess.Popen([f"{POSTGRES}/pg_dump", "-h", socket, "-U", "odoo", *options, name], stdout=subprocess.PIPE)
