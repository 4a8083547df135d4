"""The websocket process is a service of its own, started and watched by systemd: the one that
serves pages must not start another on the same port."""

from odoo.service.server import PreforkServer


def patch():
    PreforkServer.long_polling_spawn = lambda self: None
