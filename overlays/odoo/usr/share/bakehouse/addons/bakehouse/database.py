"""The database's primary changes while people work: who asks in between waits for the next one, and
who was cut off asks again, unless some of what he asked for may have been done already."""

import logging
import os
import threading
import time

import psycopg2
from psycopg2.extensions import TRANSACTION_STATUS_IDLE, TRANSACTION_STATUS_INTRANS

from odoo import http, sql_db
from odoo.exceptions import AccessDenied
from odoo.http import RegistryError

_logger = logging.getLogger(__name__)

# Seconds from a primary's end to the next one's beginning, where that is planned.
WAIT = float(os.environ["DATABASE_WAIT"])
ATTEMPTS = 3
# The connection is gone, or the server is about to end it.
GONE = (None, "57P01", "57P02", "57P03")


def is_gone(error):
    if isinstance(error, RegistryError):
        error = error.__cause__
    return isinstance(error, (psycopg2.OperationalError, psycopg2.InterfaceError)) and error.pgcode in GONE


def has_written(connection):
    """Whether a transaction that is about to be committed has changed anything; it may have if it has failed."""
    state = connection.info.transaction_status
    if state != TRANSACTION_STATUS_INTRANS:
        return state != TRANSACTION_STATUS_IDLE
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_current_xact_id_if_assigned()")
        return cursor.fetchone() != (None,)


class Connections:
    """How psycopg2 connects; in a longer outage it is told at once, and not all workers are kept waiting."""

    def __init__(self, connect):
        self.connect = connect
        self.away_since = None

    def __call__(self, *args, **kwargs):
        while True:
            try:
                connection = self.connect(*args, **kwargs)
            except psycopg2.OperationalError:
                now = time.monotonic()
                self.away_since = self.away_since or now
                if now - self.away_since > WAIT:
                    raise
                time.sleep(0.2)
            else:
                self.away_since = None
                return connection


def patch():
    psycopg2.connect = Connections(psycopg2.connect)

    commit = sql_db.Cursor.commit

    def commit_noted(self):
        self.flush()
        # The server may have done it, and its answer is what gets lost.
        if has_written(self._cnx):
            threading.current_thread().may_have_committed = True
        return commit(self)

    answer = http.Request._serve_ir_http

    def answer_or_say_why_not(self, rule, args):
        try:
            return answer(self, rule, args)
        except AccessDenied as error:
            # Odoo says that of whatever went wrong while it looked who asks.
            if is_gone(error.__context__):
                raise error.__context__ from None
            raise

    serve = http.Request._serve_db

    def serve_again(self):
        thread = threading.current_thread()
        for attempt in range(ATTEMPTS):
            thread.may_have_committed = False
            try:
                return serve(self)
            except (psycopg2.Error, RegistryError) as error:
                if not is_gone(error) or thread.may_have_committed or attempt == ATTEMPTS - 1:
                    raise
                _logger.info("asked again: %s", error)
            # As Odoo does before it repeats a transaction.
            self.session = self._get_session_and_dbname()[0]
            for file in self.httprequest.files.values():
                file.seek(0)

    sql_db.Cursor.commit = commit_noted
    http.Request._serve_ir_http = answer_or_say_why_not
    http.Request._serve_db = serve_again
