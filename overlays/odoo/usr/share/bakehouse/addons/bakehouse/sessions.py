"""HTTP sessions in PostgreSQL instead of in files on one node, so that users stay logged in when their node fails."""

import json
import time
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import psycopg2

from odoo import http, sql_db
from odoo.tools import config

TABLE = """
    CREATE TABLE IF NOT EXISTS http_session (
        sid text PRIMARY KEY,
        data text NOT NULL,
        written double precision NOT NULL
    )
"""
# Errors during a failover of the database. The store retries on a new connection.
FAILOVER_ERRORS = (psycopg2.OperationalError, psycopg2.InterfaceError, psycopg2.errors.ReadOnlySqlTransaction)
ATTEMPTS = 3


class PostgresSessionStore(http.FilesystemSessionStore):
    """Odoo's session store, with every access to files replaced by a query."""

    def __init__(self, database: str, **kwargs: Any) -> None:
        super().__init__(path=config.session_dir, **kwargs)
        self.database = database
        self.has_table = False

    def _query(self, query: str, args: Sequence[Any] = (), fetch: bool = False) -> Sequence[tuple[Any, ...]] | None:
        for attempt in range(ATTEMPTS):
            try:
                with sql_db.db_connect(self.database).cursor() as cursor:
                    if not self.has_table:
                        cursor.execute(TABLE)
                        self.has_table = True
                    cursor.execute(query, args, log_exceptions=False)
                    return cursor.fetchall() if fetch else None
            except FAILOVER_ERRORS:
                if attempt == ATTEMPTS - 1:
                    raise
                sql_db.close_db(self.database)
                time.sleep(0.5)

    def get(self, sid: str) -> http.Session:
        if not self.is_valid_key(sid):
            return self.new()
        rows = self._query("SELECT data FROM http_session WHERE sid = %s", (sid,), fetch=True)
        # An unknown identifier gets a new one, so that a client cannot choose it (session fixation).
        return self.session_class(json.loads(rows[0][0]), sid, False) if rows else self.new()

    def save(self, session: http.Session) -> None:
        self._query(
            """
            INSERT INTO http_session VALUES (%s, %s, extract(epoch FROM now()))
            ON CONFLICT (sid) DO UPDATE SET data = excluded.data, written = excluded.written
            """,
            (session.sid, json.dumps(dict(session))),
        )

    def delete(self, session: http.Session) -> None:
        self._query("DELETE FROM http_session WHERE sid = %s", (session.sid,))

    def list(self) -> Collection[str]:
        return [row[0] for row in self._query("SELECT sid FROM http_session", fetch=True)]

    def vacuum(self, max_lifetime: float = http.SESSION_LIFETIME) -> None:
        self._query("DELETE FROM http_session WHERE written < extract(epoch FROM now()) - %s", (max_lifetime,))

    def get_missing_session_identifiers(self, identifiers: Iterable[str]) -> set[str]:
        missing = set(identifiers)
        if missing:
            present = self._query(
                "SELECT DISTINCT left(sid, %s) FROM http_session WHERE left(sid, %s) = ANY(%s)",
                (http.STORED_SESSION_BYTES, http.STORED_SESSION_BYTES, sorted(missing)),
                fetch=True,
            )
            missing -= {row[0] for row in present}
        return missing

    def delete_from_identifiers(self, identifiers: Collection[str]) -> None:
        for identifier in identifiers:
            if not http._session_identifier_re.match(identifier):
                raise ValueError("Identifier format incorrect, did you pass in a string instead of a list?")
        if identifiers:
            self._query(
                "DELETE FROM http_session WHERE left(sid, %s) = ANY(%s)",
                (http.STORED_SESSION_BYTES, [*identifiers]),
            )


def patch() -> None:
    def session_store(self: http.Application) -> PostgresSessionStore:
        if "_bakehouse_sessions" not in self.__dict__:
            self.__dict__["_bakehouse_sessions"] = PostgresSessionStore(
                config["db_name"][0], session_class=http.Session, renew_missing=True
            )
        return self.__dict__["_bakehouse_sessions"]

    http.Application.session_store = property(session_store)
