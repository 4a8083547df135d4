"""The process that starts the workers."""

import logging

import psycopg2

from odoo.service.server import PreforkServer

_logger = logging.getLogger(__name__)


def patch():
    spawn = PreforkServer.process_spawn

    def process_spawn(self):
        # The websocket process is a service of its own, started and watched by systemd. Odoo asks the
        # database, at every look at its workers, whether it may start one, as long as there is none.
        self.long_polling_pid = True
        try:
            spawn(self)
        except psycopg2.OperationalError as error:
            # It asks before it starts a worker, and would end all of them.
            _logger.warning("no worker is started now: %s", error)
        finally:
            self.long_polling_pid = None

    PreforkServer.process_spawn = process_spawn
