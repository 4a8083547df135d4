"""What makes Odoo's database: when the image is built (odoo-make), and on a node (odoo-init)."""
import contextlib
import os
import shutil
import subprocess
import tempfile

POSTGRES = "/usr/lib/postgresql/17/bin"
# Installed in what is made with the image; `base` comes with it.
MADE = ["web"]
# Its place in the image.
SEED = "/usr/share/bakehouse/odoo.sql.gz"


def run(*command, **more):
    subprocess.run(command, text=True, check=True, **more)


def has_primary(given):
    """Whether there is a primary; not whether it takes this node's password."""
    asked = [f"{POSTGRES}/pg_isready", "-q", "-t", "10", "-h", given["db_host"], "-p", given["db_port"]]
    return subprocess.run(asked).returncode == 0


@contextlib.contextmanager
def postgres(data_dir):
    """A PostgreSQL that only this process reaches, and that keeps nothing; its socket's folder."""
    # What an attempt left that was cut off.
    for left in os.scandir(data_dir):
        if left.name.startswith("making-"):
            shutil.rmtree(left.path)
    with tempfile.TemporaryDirectory(prefix="making-", dir=data_dir) as place:
        data = f"{place}/data"
        run(
            f"{POSTGRES}/initdb", "-D", data, "-U", "odoo", "-E", "UTF8", "--locale=C", "--no-sync", "--auth=trust",
            "--no-instructions", stdout=subprocess.DEVNULL,
        )
        with open(f"{data}/postgresql.conf", "a") as f:
            # Nothing of it outlives this process.
            f.write(
                f"listen_addresses = ''\nunix_socket_directories = '{place}'\nfsync = off\nfull_page_writes = off\n"
                "synchronous_commit = off\nautovacuum = off\nwal_level = minimal\nmax_wal_senders = 0\n"
                "log_min_messages = fatal\n"
            )
        control = [f"{POSTGRES}/pg_ctl", "-D", data, "-s", "-w", "-t", "600"]
        run(*control, "start")
        try:
            yield place
        finally:
            run(*control, "-m", "immediate", "stop")


def create(name, socket):
    run(f"{POSTGRES}/createdb", "-h", socket, "-U", "odoo", "-T", "template0", name)


def odoo(command, *words, name, socket, config, **more):
    """Odoo on the database of that name in this process's PostgreSQL."""
    here = ["-c", config, "-d", name, f"--db_host={socket}", "--db_port=5432", "--db_user=odoo"]
    quiet = ["--workers=0", "--max-cron-threads=0", "--no-http"]
    run("/usr/bin/odoo", command, *here, *quiet, *words, **more)


def dump(name, socket):
    """The database as SQL, on a pipe."""
    command = [f"{POSTGRES}/pg_dump", "-h", socket, "-U", "odoo", "--no-owner", "--no-privileges", "--restrict-key=bakehouse", name]
    return subprocess.Popen(command, stdout=subprocess.PIPE)
