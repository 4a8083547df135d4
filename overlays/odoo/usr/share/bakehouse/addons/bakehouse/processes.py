"""Adapts the process that starts Odoo's workers to systemd and to an unreachable database."""

import logging

import psycopg2

from odoo.service.server import PreforkServer

_logger = logging.getLogger(__name__)


def patch() -> None:
    spawn = PreforkServer.process_spawn

    def process_spawn(self: PreforkServer) -> None:
        # systemd runs the websocket process as a separate service (odoo-websocket.service). Without a pid here, Odoo
        # would query the database on each check of its workers whether it may start that process.
        self.long_polling_pid = True
        try:
            spawn(self)
        except psycopg2.OperationalError as error:
            # Odoo queries the database before it starts a worker. An error would end the process and all its workers.
            _logger.warning("cannot start a worker: %s", error)
        finally:
            self.long_polling_pid = None

    PreforkServer.process_spawn = process_spawn
