"""Which add-ons the image has, and which of them the database still has to install or update.

The database records the hashes of the add-ons with which it was last brought up to date. An update first marks what it
is going to change, and writes the new hashes at the end. If it is interrupted, the next start therefore does it again.
"""

import hashlib
import json
import os
import subprocess
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Odoo's own add-ons, and those of Bakehouse and of the fleet.
ODOO = "/usr/lib/python3/dist-packages/odoo/addons"
OWN = "/usr/share/bakehouse/addons"
# The list of the image's add-ons: name → hash.
HASHES = "/usr/share/bakehouse/addons.json"
# Folders whose content is not in the database: browsers load assets from files, and Odoo notices that these changed.
NOT_IN_DATABASE = ("__pycache__", "static", "tests")
# Name of the add-on that Odoo loads in every process. It is never installed in the database.
BAKEHOUSE = "bakehouse"
# Seconds for which a failed update is not tried again: the node's next boots try the same version.
FAILURE_LASTS = 900

TABLES = """
CREATE TABLE IF NOT EXISTS bakehouse_addon (
    name text PRIMARY KEY,
    hash text NOT NULL,
    named boolean NOT NULL
);
CREATE TABLE IF NOT EXISTS bakehouse_database (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    version text NOT NULL,
    pending text,
    failed text,
    failed_at timestamptz,
    failure text,
    seconds double precision
);
"""


@dataclass
class Work:
    """What an update of the database has to do."""

    install: list[str]
    update: list[str]

    def __str__(self) -> str:
        parts = [("installs", self.install), ("updates", self.update)]
        return "; ".join(f"{verb} {shorten(names)}" for verb, names in parts if names)


@dataclass
class Record:
    """What the database says about itself."""

    # Version of the image whose add-ons the database has; empty if no image has proven itself with it.
    version: str
    # Version of the image whose update has begun and not succeeded.
    pending: str | None
    # Failure of the version `failed`, if that is not long ago.
    failed: str | None
    failure: str | None
    # How long the last update took.
    seconds: float | None


def shorten(names: Collection[str]) -> str:
    """Lists names, and only the number of those after the eighth."""
    first = sorted(names)[:8]
    more = len(names) - len(first)
    return ", ".join(first) + (f" and {more} more" if more > 0 else "")


def files_of(folder: str, translations: bool) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in NOT_IN_DATABASE]
        if not translations:
            folders[:] = [name for name in folders if name not in ("i18n", "i18n_extra")]
        for name in files:
            if not name.endswith((".pyc", ".pot")):
                yield os.path.relpath(f"{parent}/{name}", folder)


def hash_addon(folder: str, translations: bool) -> str:
    """Hashes an add-on's files. Translations of Odoo's own add-ons do not count, because which of them are in the image
    depends on the fleet's languages, and Odoo loads them when a language is activated."""
    total = hashlib.sha256()
    for path in sorted(files_of(folder, translations)):
        with open(f"{folder}/{path}", "rb") as file:
            total.update(f"{path}\0{hashlib.sha256(file.read()).hexdigest()}\n".encode())
    return total.hexdigest()[:32]


def image_addons() -> dict[str, str]:
    with open(HASHES) as file:
        hashes: dict[str, str] = json.load(file)
    hashes.pop(BAKEHOUSE, None)
    return hashes


def image_version() -> str:
    with open("/usr/lib/os-release") as file:
        lines = dict(line.rstrip("\n").split("=", 1) for line in file if "=" in line)
    return lines["IMAGE_VERSION"].strip("\"'")


def is_older(version: str, other: str) -> bool:
    return subprocess.run(["systemd-analyze", "compare-versions", version, "lt", other]).returncode == 0


def create_tables(cursor: Any) -> None:
    cursor.execute(TABLES)


def read_record(cursor: Any) -> Record:
    cursor.execute(
        "SELECT version, pending, CASE WHEN failed_at > now() - make_interval(secs => %s) THEN failed END, failure, "
        "seconds FROM bakehouse_database",
        [FAILURE_LASTS],
    )
    row = cursor.fetchone()
    return Record(*row) if row else Record("", None, None, None, None)


def find_work(cursor: Any, image: Mapping[str, str], named: Collection[str]) -> Work:
    """Compares the image's add-ons with the database. `named`: the modules that fleet.toml names."""
    cursor.execute("SELECT name, hash, named FROM bakehouse_addon")
    rows = cursor.fetchall()
    recorded = {name: value for name, value, _ in rows}
    named_before = {name for name, _, was_named in rows if was_named}
    cursor.execute("SELECT name, state FROM ir_module_module WHERE state IN ('installed', 'to upgrade', 'to remove')")
    installed = {name for name, _ in cursor.fetchall()}
    # An operator may have uninstalled a module that was named before.
    install = [name for name in named if name not in installed and name not in named_before]
    update = [name for name in installed if name in image and recorded.get(name) != image[name]]
    return Work(sorted(install), sorted(update))


def missing_addons(cursor: Any, image: Mapping[str, str]) -> list[str]:
    """Returns the installed add-ons that the image does not have."""
    cursor.execute("SELECT name FROM ir_module_module WHERE state = 'installed' ORDER BY name")
    return [name for (name,) in cursor.fetchall() if name not in image and name != BAKEHOUSE]


def begin(cursor: Any, version: str, work: Work) -> None:
    """Marks what an update is going to change."""
    cursor.execute(
        "INSERT INTO bakehouse_database (version, pending) VALUES ('', %s) "
        "ON CONFLICT (one) DO UPDATE SET pending = excluded.pending",
        [version],
    )
    cursor.execute("UPDATE bakehouse_addon SET hash = '' WHERE name = ANY(%s)", [work.update])
    cursor.execute("UPDATE bakehouse_addon SET named = false WHERE name = ANY(%s)", [work.install])


def finish(
    cursor: Any, version: str, image: Mapping[str, str], named: Collection[str], seconds: float | None = None
) -> None:
    """Records that the database has the image's add-ons."""
    cursor.execute("DELETE FROM bakehouse_addon")
    rows = [(name, value, name in named) for name, value in sorted(image.items())]
    cursor.executemany("INSERT INTO bakehouse_addon (name, hash, named) VALUES (%s, %s, %s)", rows)
    cursor.execute(
        "INSERT INTO bakehouse_database (version, seconds) VALUES (%s, %s) ON CONFLICT (one) DO UPDATE SET "
        "version = excluded.version, pending = NULL, failed = NULL, failed_at = NULL, failure = NULL, "
        "seconds = coalesce(excluded.seconds, bakehouse_database.seconds)",
        [version, seconds],
    )


def fail(cursor: Any, version: str, why: str) -> None:
    cursor.execute(
        "INSERT INTO bakehouse_database (version, failed, failed_at, failure) VALUES ('', %s, now(), %s) "
        "ON CONFLICT (one) DO UPDATE SET failed = excluded.failed, failed_at = excluded.failed_at, "
        "failure = excluded.failure",
        [version, why],
    )


def forget_interrupted(cursor: Any) -> None:
    """Resets the states of modules that an interrupted update of another version left. Odoo runs no scheduled jobs
    while there are such states. Odoo does the same after an update that fails."""
    cursor.execute("UPDATE ir_module_module SET state = 'installed' WHERE state IN ('to upgrade', 'to remove')")
    cursor.execute("UPDATE ir_module_module SET state = 'uninstalled' WHERE state = 'to install'")
