"""Prints reports of Odoo over HTTP, as a browser does: print_reports.py URL PASSWORD FOLDER KEY=ID…"""

import http.cookiejar
import json
import ssl
import subprocess
import sys
import threading
import time
import unicodedata
import urllib.parse
import urllib.request

URL, PASSWORD, FOLDER = sys.argv[1:4]
IDS = dict(word.split("=") for word in sys.argv[4:])
JAR = http.cookiejar.CookieJar()
CONTEXT = ssl._create_unverified_context()
OPENER = urllib.request.build_opener(
    urllib.request.HTTPCookieProcessor(JAR), urllib.request.HTTPSHandler(context=CONTEXT)
)


def ask(path: str, **params: str) -> object:
    body = json.dumps({"jsonrpc": "2.0", "params": params}).encode()
    request = urllib.request.Request(URL + path, body, {"Content-Type": "application/json"})
    with OPENER.open(request, timeout=120) as response:
        return json.load(response)["result"]


def get(path: str) -> bytes:
    with OPENER.open(URL + path, timeout=300) as response:
        return response.read()


def pages(pdf: bytes, name: str) -> list[str]:
    path = f"{FOLDER}/{name}.pdf"
    with open(path, "wb") as file:
        file.write(pdf)
    text = subprocess.run(["pdftotext", "-layout", path, "-"], stdout=subprocess.PIPE, check=True).stdout.decode()
    return unicodedata.normalize("NFKC", text).split("\f")[:-1]


def needs(text: str, *words: str) -> None:
    for word in words:
        assert word in text, f"no {word} in:\n{text}"


def prints_reports() -> None:
    invoice = pages(get(f"report/pdf/account.report_invoice/{IDS['invoice']}"), "invoice")
    assert len(invoice) >= 3, f"{len(invoice)} pages"
    needs(invoice[0], "Công ty Đại Phát", "Cà phê Đắk Lắk", "有机绿茶", f"Page 1 / {len(invoice)}")
    # The renderer writes Arabic text in the order in which it is read.
    needs(invoice[0], "قهوة", "عربية")
    # Header and footer are on the second page, too, and the table's head is repeated.
    needs(invoice[1], "ACME Việt Nam", "Chất lượng", "MST 0312345678", f"Page 2 / {len(invoice)}", "Quantity")
    needs(pages(get(f"report/pdf/sale.report_saleorder/{IDS['order']}"), "order")[0], "Cà phê Đắk Lắk", "Page 1 / 1")
    pages(get(f"report/pdf/stock.report_picking/{IDS['picking']}"), "picking")
    bars = subprocess.run(["pdfimages", "-list", f"{FOLDER}/picking.pdf"], stdout=subprocess.PIPE, check=True)
    needs(bars.stdout.decode(), "image")


def ten_at_once_leave_pages() -> None:
    waits, prints, stop = [], [], threading.Event()

    def look() -> None:
        while not stop.is_set():
            begun = time.monotonic()
            get("web/login")
            waits.append(time.monotonic() - begun)
            time.sleep(0.2)

    path = f"report/pdf/account.report_invoice/{IDS['invoice']}"
    printing = [threading.Thread(target=lambda: prints.append(get(path))) for _ in range(10)]
    looking = threading.Thread(target=look)
    for thread in [looking, *printing]:
        thread.start()
    for thread in printing:
        thread.join()
    stop.set()
    looking.join()
    print(f"{len(prints)} files, {len(waits)} pages, longest wait {max(waits):.1f} s")
    assert len(prints) == 10 and all(pdf.startswith(b"%PDF") for pdf in prints)
    assert len(waits) > 5 and max(waits) < 5, waits


def too_long_document_is_refused() -> None:
    # The path of Odoo's client, whose answer is HTTP 200 and describes the error.
    data = urllib.parse.quote(json.dumps([f"/report/pdf/bakehouse.pages/{IDS['partner']}", "qweb-pdf"]))
    begun = time.monotonic()
    text = get(f"report/download?data={data}").decode()
    print(f"refused after {time.monotonic() - begun:.1f} s")
    needs(text, "The limit of one PDF file is 1000 pages", "Print fewer records at once")


def main() -> None:
    assert ask("web/session/authenticate", db="odoo", login="admin", password=PASSWORD)["uid"]
    assert ask("report/check_wkhtmltopdf") == "ok"
    prints_reports()
    ten_at_once_leave_pages()
    too_long_document_is_refused()


if __name__ == "__main__":
    main()
