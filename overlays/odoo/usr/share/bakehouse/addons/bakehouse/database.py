"""Hides a change of the database's primary from users.

New connections wait for the next primary. A request that loses its connection is repeated, unless one of its
transactions may have committed changes.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import psycopg2
from psycopg2.extensions import TRANSACTION_STATUS_IDLE, TRANSACTION_STATUS_INTRANS
from psycopg2.extensions import connection as Connection

from odoo import http, sql_db
from odoo.exceptions import AccessDenied
from odoo.http import RegistryError

_logger = logging.getLogger(__name__)

# Seconds that a switchover may take.
WAIT = float(os.environ["DATABASE_WAIT"])
ATTEMPTS = 3
# SQLSTATEs of a lost connection: none if the connection is closed, or the server shuts down or starts.
CONNECTION_LOST = (None, "57P01", "57P02", "57P03")


def is_connection_loss(error: BaseException | None) -> bool:
    if isinstance(error, RegistryError):
        error = error.__cause__
    return isinstance(error, (psycopg2.OperationalError, psycopg2.InterfaceError)) and error.pgcode in CONNECTION_LOST


def has_written(connection: Connection) -> bool:
    """Returns whether the open transaction may have changed data. A failed transaction counts as one that has."""
    state = connection.info.transaction_status
    if state != TRANSACTION_STATUS_INTRANS:
        return state != TRANSACTION_STATUS_IDLE
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_current_xact_id_if_assigned()")
        return cursor.fetchone() != (None,)


class Connector:
    """Replaces psycopg2.connect: retries until a primary accepts the connection.

    After WAIT seconds without a primary, each call fails at the first error, so that a long outage does not block all
    workers.
    """

    def __init__(self, connect: Callable[..., Connection]) -> None:
        self.connect = connect
        self.down_since: float | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Connection:
        while True:
            try:
                connection = self.connect(*args, **kwargs)
            except psycopg2.OperationalError:
                now = time.monotonic()
                self.down_since = self.down_since or now
                if now - self.down_since > WAIT:
                    raise
                time.sleep(0.2)
            else:
                self.down_since = None
                return connection


def patch() -> None:
    psycopg2.connect = Connector(psycopg2.connect)

    commit = sql_db.Cursor.commit

    def commit_tracking_writes(self: sql_db.Cursor) -> None:
        self.flush()
        # If the connection is lost during COMMIT, the server may still have committed.
        if has_written(self._cnx):
            threading.current_thread().may_have_committed = True
        return commit(self)

    serve_ir_http = http.Request._serve_ir_http

    def reraise_connection_loss(self: http.Request, rule: Any, args: Any) -> Any:
        try:
            return serve_ir_http(self, rule, args)
        except AccessDenied as error:
            # Odoo raises AccessDenied for any error during authentication. Only the original error is retried.
            if is_connection_loss(error.__context__):
                raise error.__context__ from None
            raise

    serve_db = http.Request._serve_db

    def retry_on_connection_loss(self: http.Request) -> Any:
        thread = threading.current_thread()
        for attempt in range(ATTEMPTS):
            thread.may_have_committed = False
            try:
                return serve_db(self)
            except (psycopg2.Error, RegistryError) as error:
                if not is_connection_loss(error) or thread.may_have_committed or attempt == ATTEMPTS - 1:
                    raise
                _logger.info("repeating a request that lost its connection to the database: %s", error)
            # Odoo does the same before it repeats a transaction.
            self.session = self._get_session_and_dbname()[0]
            for file in self.httprequest.files.values():
                file.seek(0)

    sql_db.Cursor.commit = commit_tracking_writes
    http.Request._serve_ir_http = reraise_connection_loss
    http.Request._serve_db = retry_on_connection_loss
