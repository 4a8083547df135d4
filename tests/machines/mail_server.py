"""A mail server for tests, by aiosmtpd: mail_server.py FOLDER PORT

It accepts mail after STARTTLS and a login only. FOLDER has server.crt, server.key and the file `password`, which it
reads at each login. It writes each mail into the folder, with what it knows about the connection.
"""

import asyncio
import json
import ssl
import sys
from pathlib import Path
from typing import Any

from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session

USER = "odoo@acme.example"


class Handler:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    async def handle_RCPT(self, _server: SMTP, _session: Session, envelope: Envelope, to: str, _options: Any) -> str:
        if to.startswith("unknown@"):
            return f"550 5.1.1 <{to}>: Recipient address rejected: User unknown in local recipient table"
        envelope.rcpt_tos.append(to)
        return "250 2.1.5 Ok"

    async def handle_DATA(self, _server: SMTP, session: Session, envelope: Envelope) -> str:
        mail = {
            "tls": session.ssl is not None,
            "login": session.auth_data.login.decode(),
            "from": envelope.mail_from,
            "to": envelope.rcpt_tos,
            "content": envelope.content.decode(),
        }
        number = len(list(self.folder.glob("mail-*.json")))
        (self.folder / f"mail-{number}.json").write_text(json.dumps(mail) + "\n")
        return "250 2.0.0 Ok: queued"


async def main() -> None:
    folder = Path(sys.argv[1])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")

    def authenticate(
        _server: SMTP, _session: Session, _envelope: Envelope, _way: str, data: LoginPassword
    ) -> AuthResult:
        accepted = (USER, (folder / "password").read_text().strip())
        found = (data.login.decode(), data.password.decode())
        if found == accepted:
            return AuthResult(success=True, auth_data=data)
        message = "535 5.7.8 Error: authentication failed: authentication failure"
        return AuthResult(success=False, handled=False, message=message)

    def serve() -> SMTP:
        return SMTP(
            Handler(folder),
            hostname="mail.acme.example",
            tls_context=context,
            require_starttls=True,
            auth_required=True,
            authenticator=authenticate,
        )

    server = await asyncio.get_running_loop().create_server(serve, "localhost", int(sys.argv[2]))
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
