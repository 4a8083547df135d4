"""Verifies the certificate of the mail server in odoo.conf ([odoo.mail] in fleet.toml).

The keys of odoo.conf have no TLS from the start, and with `smtp_ssl` Odoo does not verify the certificate. A mail
server in Odoo's own settings has an encryption of its own, and its connections do not change.
"""

import os
import smtplib
import ssl
from contextvars import ContextVar
from typing import Any

from odoo.addons.base.models.ir_mail_server import IrMail_Server

# `starttls_strict`, `ssl_strict` or `none`; empty without [odoo.mail].
ENCRYPTION = os.environ.get("MAIL_ENCRYPTION", "")
CA = os.environ.get("MAIL_CA") or None

# Whether this thread connects to a server that Odoo chooses: that of odoo.conf, or one of its settings.
is_ours: ContextVar[bool] = ContextVar("is_ours", default=False)


def verified(context: ssl.SSLContext | None) -> ssl.SSLContext | None:
    """Returns the context of a connection. Odoo passes none for the server of odoo.conf."""
    return ssl.create_default_context(cafile=CA) if context is None and is_ours.get() else context


def patch() -> None:
    if not ENCRYPTION:
        return
    connect = IrMail_Server._connect__
    starttls = smtplib.SMTP.starttls
    init = smtplib.SMTP_SSL.__init__

    def _connect__(
        self: Any,
        host: str | None = None,
        port: int | None = None,
        user: str | None = None,
        password: str | None = None,
        encryption: str | None = None,
        **kwargs: Any,
    ) -> Any:
        if host:
            return connect(self, host, port, user, password, encryption, **kwargs)
        token = is_ours.set(True)
        try:
            # Odoo ignores the encryption if it finds a server in its settings.
            return connect(self, host, port, user, password, encryption or ENCRYPTION, **kwargs)
        finally:
            is_ours.reset(token)

    def verified_starttls(self: smtplib.SMTP, *, context: ssl.SSLContext | None = None) -> Any:
        return starttls(self, context=verified(context))

    def verified_init(self: smtplib.SMTP_SSL, *args: Any, context: ssl.SSLContext | None = None, **kwargs: Any) -> None:
        init(self, *args, context=verified(context), **kwargs)

    IrMail_Server._connect__ = _connect__
    smtplib.SMTP.starttls = verified_starttls
    smtplib.SMTP_SSL.__init__ = verified_init
