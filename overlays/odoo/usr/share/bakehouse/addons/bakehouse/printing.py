"""PDF files by odoo-print instead of wkhtmltopdf, which Debian no longer has.

Odoo's report engine makes the HTML, the arguments of wkhtmltopdf and, afterwards, the attachments. This module replaces
the step between them. The renderer has no network: each of its requests for a file of Odoo is answered here, with the
rights of the user who prints.
"""

import io
import json
import logging
import sys
import threading
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from PIL import Image
from werkzeug.test import EnvironBuilder
from werkzeug.wrappers import Response

from odoo import http
from odoo.addons.base.models import ir_actions_report
from odoo.addons.base.models.ir_actions_report import IrActionsReport, WkhtmlInfo
from odoo.addons.base.models.report_paperformat import PAPER_SIZES
from odoo.exceptions import UserError
from odoo.service import security

sys.path.append("/usr/lib/bakehouse")
from bakehouse_print import MAX_MESSAGE, PrintError, render  # noqa: E402

_logger = logging.getLogger(__name__)

# Seconds for one file of Odoo.
ASSET_SECONDS = 30
# wkhtmltopdf lays a page out wider than it is, and shrinks it ("smart shrinking"). Odoo's reports are made for that.
SHRINKING = 1.25
SIZES = {size["key"]: (size["width"], size["height"]) for size in PAPER_SIZES if "width" in size}


class Assets:
    """Serves URLs of this Odoo to the renderer, by a request that does not leave the process."""

    def __init__(self, env: Any, base: str) -> None:
        self.env = env
        self.base = urlsplit(base)
        self.session: http.Session | None = None

    def cookie(self) -> str:
        """Returns the cookie of a short session with the user's rights, as Odoo makes one for wkhtmltopdf."""
        request = http.request
        if not request or not request.db:
            return ""
        if self.session is None:
            self.session = http.root.session_store.new()
            self.session.update({**request.session, "debug": "", "_trace_disable": True})
            if self.session.uid:
                self.session.session_token = security.compute_session_token(self.session, self.env)
            http.root.session_store.save(self.session)
        return f"session_id={self.session.sid}"

    def close(self) -> None:
        if self.session is not None:
            http.root.session_store.delete(self.session)

    def fetch(self, url: str) -> tuple[str, bytes] | None:
        parts = urlsplit(url)
        local = parts.scheme in ("http", "https") and parts.netloc == self.base.netloc
        if not local:
            _logger.info("the renderer may not fetch %s", url[:200])
            return None
        public = parts.path.startswith("/web/assets/") or "/static/" in parts.path
        headers = {} if public else {"Cookie": self.cookie()}
        environ = EnvironBuilder(
            path=parts.path, query_string=parts.query, base_url=f"{parts.scheme}://{parts.netloc}/", headers=headers
        ).get_environ()
        answer: list[tuple[str, bytes]] = []

        def get() -> None:
            response = Response.from_app(http.root, environ, buffered=False)
            try:
                if response.status_code == 200 and (response.content_length or 0) <= MAX_MESSAGE:
                    content = io.BytesIO()
                    for block in response.response:
                        content.write(block)
                        if content.tell() > MAX_MESSAGE:
                            return
                    answer.append((response.mimetype, content.getvalue()))
            finally:
                response.close()

        # A thread of its own, because Odoo keeps the current request and cursor in the thread.
        thread = threading.Thread(target=get, name="bakehouse-print", daemon=True)
        thread.start()
        thread.join(ASSET_SECONDS)
        if not answer:
            _logger.info("Odoo does not serve %s to the renderer", url[:200])
        return answer[0] if answer else None


def job_of(arguments: list[str]) -> dict[str, Any]:
    """Returns size, margins and density for arguments of wkhtmltopdf. Lengths are in millimetres."""
    values = dict(zip(arguments, [*arguments[1:], ""], strict=True))

    def number(name: str, default: float) -> float:
        return float(values.get(f"--{name}", default).removesuffix("mm") if f"--{name}" in values else default)

    size = SIZES.get(values.get("--page-size", "A4"), SIZES["A4"])
    size = (number("page-width", size[0]), number("page-height", size[1]))
    if values.get("--orientation", "").lower() == "landscape":
        size = (size[1], size[0])
    margins = [number(f"margin-{side}", 10) for side in ("top", "right", "bottom", "left")]
    shrinking = 1 if "--disable-smart-shrinking" in values else SHRINKING
    return {
        "kind": "pdf",
        "size": size,
        "margins": margins,
        "density": 96 / number("zoom", 1) * shrinking,
        # Odoo's headers have the height 0 for wkhtmltopdf, which puts their end above the margin's.
        "header_top": max(margins[0] - number("header-spacing", 0), 0),
        "header_line": "--header-line" in values,
    }


def run(env: Any, base: str, job: dict[str, Any]) -> bytes:
    assets = Assets(env, base)
    try:
        return render(json.dumps(job | {"base": f"{base.rstrip('/')}/"}).encode(), assets.fetch)
    except PrintError as error:
        _logger.warning("cannot print: %s", error)
        raise UserError(str(error)) from error
    finally:
        assets.close()


def run_wkhtmltopdf(
    self: IrActionsReport,
    bodies: Iterable[str],
    report_ref: Any = False,
    header: str | None = None,
    footer: str | None = None,
    landscape: bool = False,
    specific_paperformat_args: dict[str, Any] | None = None,
    set_viewport_size: bool = False,
) -> bytes:
    paperformat = self._get_report(report_ref).get_paperformat() if report_ref else self.get_paperformat()
    arguments = self._build_wkhtmltopdf_args(
        paperformat,
        landscape,
        specific_paperformat_args=specific_paperformat_args,
        set_viewport_size=set_viewport_size,
    )
    job = job_of(arguments) | {
        "bodies": [str(body) for body in bodies],
        "header": str(header) if header else None,
        "footer": str(footer) if footer else None,
    }
    return run(self.env, self._get_report_url(), job)


def run_wkhtmltoimage(
    self: IrActionsReport, bodies: Iterable[str], width: int, height: int, image_format: str = "jpg"
) -> list[bytes | None]:
    images: list[bytes | None] = []
    for body in bodies:
        job = {"kind": "image", "size": [width, height], "bodies": [str(body)]}
        image = Image.open(io.BytesIO(run(self.env, self._get_report_url(), job)))
        out = io.BytesIO()
        image.convert("RGB").save(out, "JPEG" if image_format == "jpg" else "PNG")
        images.append(out.getvalue())
    return images


def patch() -> None:
    # What Odoo knows about a complete wkhtmltopdf.
    info = WkhtmlInfo("ok", True, "odoo-print", "0.12.6", True, "odoo-print", (0, 12, 6))
    ir_actions_report._wkhtml = lambda: info
    IrActionsReport._run_wkhtmltopdf = run_wkhtmltopdf
    IrActionsReport._run_wkhtmltoimage = run_wkhtmltoimage
