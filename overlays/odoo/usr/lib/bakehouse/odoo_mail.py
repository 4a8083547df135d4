"""What odoo-init and odoo-mail share: the mail domain that fleet.toml names, and the errors of a mail server."""

import os
import smtplib
import socket
import ssl
from collections.abc import Mapping
from typing import Any

# Longest answer of a mail server that a report has, in characters.
LONGEST = 600
# Keys of the environment (odoo.env): column of Odoo's table → name.
COLUMNS = {
    "name": "MAIL_DOMAIN",
    "catchall_alias": "MAIL_CATCHALL",
    "bounce_alias": "MAIL_BOUNCE",
    "default_from": "MAIL_FROM",
}
# The parameters from which Odoo makes the mail domain when it installs its module `mail`.
PARAMETERS = {
    "name": "mail.catchall.domain",
    "catchall_alias": "mail.catchall.alias",
    "bounce_alias": "mail.bounce.alias",
    "default_from": "mail.default.from",
}

DOMAIN_OF_COMPANY = """
SELECT domain.name, domain.catchall_alias, domain.bounce_alias, domain.default_from
FROM ir_model_data AS data
JOIN res_company AS company ON company.id = data.res_id
JOIN mail_alias_domain AS domain ON domain.id = company.alias_domain_id
WHERE data.module = 'base' AND data.name = 'main_company'
"""


def wanted(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Returns what fleet.toml names. Without a domain, a user sets all of it in Odoo."""
    found = {column: environment.get(name, "") for column, name in COLUMNS.items()}
    return {column: value for column, value in found.items() if value} if found["name"] else {}


def has_mail(cursor: Any) -> bool:
    """Returns whether Odoo's module `mail` is installed, which has the mail domains."""
    cursor.execute("SELECT 1 FROM ir_module_module WHERE name = 'mail' AND state = 'installed'")
    return cursor.fetchone() is not None


def is_set(cursor: Any, values: Mapping[str, str]) -> bool:
    """Returns whether the database has these values."""
    if has_mail(cursor):
        cursor.execute(DOMAIN_OF_COMPANY)
        row = cursor.fetchone()
        found = dict(zip(COLUMNS, row, strict=True)) if row else {}
    else:
        cursor.execute("SELECT key, value FROM ir_config_parameter WHERE key = ANY(%s)", [list(PARAMETERS.values())])
        rows = dict(cursor.fetchall())
        found = {column: rows.get(key) for column, key in PARAMETERS.items()}
    return all(found.get(column) == value for column, value in values.items())


def text_of(answer: Any) -> str:
    """Returns an answer of a mail server as a text, word for word, without control characters."""
    text = answer.decode(errors="replace") if isinstance(answer, bytes) else str(answer)
    lines = [" ".join("".join(c if c.isprintable() else " " for c in line).split()) for line in text.splitlines()]
    return " ".join(line for line in lines if line)[:LONGEST]


def describe(error: BaseException) -> tuple[str, str]:
    """Returns in which step a delivery failed, and why: the answer of the mail server, or the error of this node."""
    match error:
        case smtplib.SMTPRecipientsRefused():
            code, answer = next(iter(error.recipients.values()))
            return "recipient", f"{code} {text_of(answer)}"
        case smtplib.SMTPSenderRefused():
            return "sender", f"{error.smtp_code} {text_of(error.smtp_error)}"
        case smtplib.SMTPAuthenticationError():
            return "login", f"{error.smtp_code} {text_of(error.smtp_error)}"
        case smtplib.SMTPDataError():
            return "content", f"{error.smtp_code} {text_of(error.smtp_error)}"
        case smtplib.SMTPHeloError() | smtplib.SMTPConnectError():
            return "greeting", f"{error.smtp_code} {text_of(error.smtp_error)}"
        case smtplib.SMTPNotSupportedError():
            # Odoo asks for STARTTLS first, and then for AUTH.
            return ("starttls" if "STARTTLS" in str(error) else "login"), text_of(error)
        case smtplib.SMTPResponseException():
            return "starttls", f"{error.smtp_code} {text_of(error.smtp_error)}"
        case smtplib.SMTPServerDisconnected():
            return "connection", text_of(error)
        case ssl.SSLCertVerificationError():
            return "certificate", text_of(error.verify_message or error)
        case ssl.SSLError():
            return "tls", text_of(error)
        case socket.gaierror():
            return "name", text_of(error.strerror or error)
        case OSError():
            return "connection", text_of(error.strerror or error)
        case _:
            return "odoo", text_of(error) or type(error).__name__
