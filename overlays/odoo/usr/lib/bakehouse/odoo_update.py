"""Brings the database up to date with the image's add-ons, by Odoo's own update, and proves that users can log in.

odoo-init calls this with an advisory lock of PostgreSQL. In a rollout, only the node with the fleet's update lock
starts a newer version; the advisory lock also covers nodes that start together.
"""

import configparser
import contextlib
import os
import re
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg2
from psycopg2.extensions import connection as Connection

import odoo_addons
from odoo_addons import Record, Work
from odoo_page import serve_page

# Seconds for one run of Odoo. The limit of the health check (firstboot) is longer.
LIMIT = 2400
# Seconds for the login.
LOGIN_LIMIT = 600
# An open transaction of a user may block an update. Such an attempt is repeated.
ATTEMPTS = 3
BLOCKED = (
    "could not serialize access",
    "deadlock detected",
    "could not obtain lock",
    "due to lock timeout",
)
# Limits of PostgreSQL for the update, so that an add-on that waits or sleeps with locks does not stop the fleet: one
# statement, a wait for a lock, and the time between two statements.
OPTIONS = "-c statement_timeout=15min -c lock_timeout=60s -c idle_in_transaction_session_timeout=5min"
# Lines of Odoo's log that name the module that it loads. The journal has the whole log.
LOADING = re.compile(r"(?:Loading module|loading) (\w+)[ /]|[Mm]odule (\w+): creating or updating")
# The error at the end of a Python traceback. PostgreSQL's own lines, such as `DETAIL:`, have no lower-case letters.
ERROR = re.compile(r"^(?:\w+\.)*[A-Z]\w*[a-z]\w*: .+")
# What odoo-login prints last if it fails.
FAILED = "failed: "


class UpdateFailed(Exception):
    """The image's add-ons are at fault, so another attempt would fail too."""


@dataclass
class Outcome:
    """How a program has ended."""

    code: int
    # The module that Odoo loaded last.
    module: str
    # The last error in its output.
    error: str


def set_status(text: str) -> None:
    """Sets the status of the unit. The node's health check waits while it begins with `working:` (firstboot)."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.sendto(f"STATUS={text}".encode(), address.replace("@", "\0", 1))


def say(text: str) -> None:
    print(text, flush=True)
    set_status(f"working: {text}")


def read_output(line: str, outcome: Outcome) -> None:
    if found := LOADING.search(line):
        outcome.module = found[1] or found[2]
    if ERROR.match(line) or line.startswith(FAILED):
        outcome.error = line.removeprefix(FAILED).strip()[:400]


def run_watched(command: Sequence[str], limit: float, lock: Connection, **environment: str) -> Outcome:
    """Runs a program as long as the lock's connection lives. Without that connection, another node could have the lock,
    and update at the same time."""
    outcome = Outcome(-1, "", "")
    until = time.monotonic() + limit
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | environment,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        for line in lines_of(process.stdout.fileno(), until, lock):
            print(line, flush=True)
            read_output(line, outcome)
        outcome.code = process.wait(timeout=60)
    except (TimeoutError, subprocess.TimeoutExpired):
        outcome.error = f"it takes longer than {limit / 60:.0f} min"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()
    return outcome


def lines_of(pipe: int, until: float, lock: Connection) -> Iterator[str]:
    """Returns the lines of a pipe. Fails after the time limit, and when the lock's connection is lost."""
    rest = b""
    with selectors.DefaultSelector() as selector, lock.cursor() as cursor:
        selector.register(pipe, selectors.EVENT_READ)
        checked = time.monotonic()
        while True:
            now = time.monotonic()
            if now > until:
                raise TimeoutError
            if now - checked > 2:
                cursor.execute("SELECT 1")
                checked = now
            if not selector.select(1):
                continue
            data = os.read(pipe, 65536)
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                yield line.decode(errors="replace")
            if not data:
                if rest:
                    yield rest.decode(errors="replace")
                return


def require_primary(lock: Connection) -> None:
    """Raises an error if the primary was lost since this node has the lock. The image is not at fault then."""
    with lock.cursor() as cursor:
        cursor.execute("SELECT 1")


class Database:
    """Odoo's database, and the image's add-ons."""

    def __init__(
        self, config: configparser.SectionProxy, path: str, named: Sequence[str], name: str | None = None
    ) -> None:
        self.config = config
        self.path = path
        self.named = [module for module in named if module != "base"]
        self.name = name or config["db_name"]
        self.image = odoo_addons.image_addons()
        self.version = odoo_addons.image_version()

    def connect(self) -> Connection:
        names = {"host": "db_host", "port": "db_port", "user": "db_user", "password": "db_password"}
        options = {name: self.config[key] for name, key in names.items()}
        return psycopg2.connect(**options, sslmode=self.config["db_sslmode"], dbname=self.name, connect_timeout=5)

    @contextlib.contextmanager
    def cursor(self) -> Iterator[Any]:
        """Yields a cursor of one transaction."""
        with contextlib.closing(self.connect()) as connection, connection, connection.cursor() as cursor:
            yield cursor

    def bring_up_to_date(self, lock: Connection) -> None:
        """Installs and updates what the image has and the database has not, and proves that users can log in. `lock`:
        the connection with the advisory lock.

        Raises:
            UpdateFailed: The image is at fault.
            psycopg2.Error: There is no primary, or it was lost meanwhile.
        """
        with self.cursor() as cursor:
            odoo_addons.create_tables(cursor)
            record = odoo_addons.read_record(cursor)
            if newer := self.newer_version(record):
                print(f"the database is of version {newer}, which is newer than {self.version}", flush=True)
                if newer == record.pending:
                    odoo_addons.forget_interrupted(cursor)
                return
            missing = odoo_addons.missing_addons(cursor, self.image)
            work = odoo_addons.find_work(cursor, self.image, self.named)
        if missing:
            print(f"installed in the database, and not in the image: {odoo_addons.shorten(missing)}", flush=True)
        if unknown := [name for name in work.install if name not in self.image]:
            raise UpdateFailed(f"[odoo] modules names {unknown[0]}, and the image has no add-on of this name")
        if record.version == self.version and not record.pending and not work.install and not work.update:
            return
        if record.failed == self.version:
            raise UpdateFailed(f"{record.failure} (some minutes ago; it is not tried again yet)")
        with serve_page(self.config["http_interface"], int(self.config["http_port"]), record.seconds):
            self.change(work, lock)

    def newer_version(self, record: Record) -> str | None:
        """Returns the newer version that has updated the database, or tried to. This node's code is older, and must not
        update the add-ons back: it serves until the rollout continues, or another version comes."""
        versions = [version for version in (record.pending, record.version) if version]
        return next((version for version in versions if odoo_addons.is_older(self.version, version)), None)

    def change(self, work: Work, lock: Connection) -> None:
        seconds = None
        try:
            if work.install or work.update:
                with self.cursor() as cursor:
                    odoo_addons.begin(cursor, self.version, work)
                began = time.monotonic()
                self.update(work, lock)
                seconds = time.monotonic() - began
            self.log_in(lock)
            with self.cursor() as cursor:
                if absent := self.absent(cursor):
                    raise UpdateFailed(f"Odoo did not install {absent}")
                odoo_addons.finish(cursor, self.version, self.image, self.named, seconds)
        except UpdateFailed as error:
            with self.cursor() as cursor:
                odoo_addons.fail(cursor, self.version, str(error))
            raise
        took = f" in {seconds:.0f} s" if seconds is not None else ""
        print(f"the database has the add-ons of version {self.version}{took}", flush=True)

    def update(self, work: Work, lock: Connection) -> None:
        # Odoo updates the add-ons that depend on these, too.
        command = ["/usr/bin/odoo", "server", "-c", self.path, "--stop-after-init", "--no-http", "--workers=0"]
        command += ["--max-cron-threads=0", "--log-handler=odoo.modules:INFO", "--log-level=warn"]
        for option, names in (("-i", work.install), ("-u", work.update)):
            if names:
                command += [option, ",".join(names)]
        for attempt in range(ATTEMPTS):
            say(f"version {self.version} {work}")
            outcome = run_watched(command, LIMIT, lock, PGOPTIONS=OPTIONS)
            if outcome.code == 0:
                return
            require_primary(lock)
            if attempt + 1 < ATTEMPTS and any(text in outcome.error for text in BLOCKED):
                print(f"blocked by another transaction: {outcome.error}", flush=True)
                time.sleep(5 * (attempt + 1))
                continue
            break
        module = f"the add-on {outcome.module} fails" if outcome.module else "Odoo fails"
        raise UpdateFailed(f"{module}: {outcome.error or f'exit status {outcome.code}'}")

    def log_in(self, lock: Connection) -> None:
        say(f"version {self.version} logs in")
        command = ["/usr/bin/python3", "/usr/lib/bakehouse/odoo-login", self.path]
        outcome = run_watched(command, LOGIN_LIMIT, lock)
        if outcome.code:
            require_primary(lock)
            raise UpdateFailed(f"no user can log in: {outcome.error or f'exit status {outcome.code}'}")

    def absent(self, cursor: Any) -> str | None:
        """Returns a module that fleet.toml newly names and that is not installed."""
        work = odoo_addons.find_work(cursor, self.image, self.named)
        return odoo_addons.shorten(work.install) if work.install else None
