"""Users read from Odoo during a change of the database's primary, in the image's tree. One PostgreSQL server, which
stops and starts, stands in for both primaries. Exits with 1 and the users' errors if they notice the change."""

import gzip
import http.cookiejar
import json
import os
import random
import subprocess
import sys
import threading
import time
import urllib.request

import psycopg2
from sandbox import Account, loopback

BIN = "/usr/lib/postgresql/17/bin"
PLACE = "/tmp/switchover"
# Seconds that Odoo waits for a database. Longer than DATABASE_WAIT in odoo.env, because the build host may be busy.
WAIT = 10
SECRETS = """
UPDATE public.res_users SET password = 'admin' WHERE login = 'admin';
INSERT INTO public.ir_config_parameter (key, value)
VALUES ('database.secret', 'x'), ('database.uuid', 'x'), ('database.create_date', '2026-01-01 00:00:00');
"""
CONFIG = f"""[options]
db_host = 127.0.0.1
db_port = 5000
db_user = odoo
db_name = odoo
dbfilter = ^odoo$
list_db = False
http_interface = 127.0.0.1
workers = 2
max_cron_threads = 0
data_dir = {PLACE}/files
addons_path = /usr/lib/python3/dist-packages/odoo/addons,/usr/share/bakehouse/addons,{PLACE}/addons
server_wide_modules = base,rpc,web,bakehouse,cut
log_level = warn
"""

# Ends Odoo's database connection during authentication of a request with the header X-Cut. It removes the header, so
# Odoo's retry of the request succeeds.
CUT = """
from odoo.service import security

check = security.check_session

def check_cut(session, env, request=None):
    if request and request.httprequest.environ.pop("HTTP_X_CUT", None):
        env.cr.execute("SELECT pg_terminate_backend(pg_backend_pid())")
    return check(session, env, request)

security.check_session = check_cut
"""

ODOO = Account("odoo", PLACE, DATABASE_WAIT=str(WAIT))

good, bad, logouts = [], [], []
users = []


def control(*words):
    ODOO.run(f"{BIN}/pg_ctl", "-D", f"{PLACE}/data", "-s", "-w", "-t", "60", "-l", f"{PLACE}/log", *words)


def database():
    options = ["-U", "odoo", "-E", "UTF8", "--locale=C", "--no-sync", "--auth=trust", "--no-instructions"]
    ODOO.run(f"{BIN}/initdb", "-D", f"{PLACE}/data", *options)
    with open(f"{PLACE}/data/postgresql.conf", "a") as file:
        file.write(f"listen_addresses = '127.0.0.1'\nport = 5000\nunix_socket_directories = '{PLACE}'\nfsync = off\n")
    control("start")
    here = ["-h", PLACE, "-p", "5000", "-U", "odoo"]
    ODOO.run(f"{BIN}/createdb", *here, "-T", "template0", "odoo")
    # The image's own seed is generated at the same time as this check runs.
    subprocess.run(["/usr/lib/bakehouse/odoo-make", f"{PLACE}/seed"], check=True)
    with gzip.open(f"{PLACE}/seed") as seed:
        ODOO.run(f"{BIN}/psql", "-q", *here, "odoo", stdin=seed.read() + SECRETS.encode())


def has_written_detects_writes():
    """Odoo must not retry a request whose write may be committed."""
    sys.path.append("/usr/share/bakehouse/addons/bakehouse")
    os.environ["DATABASE_WAIT"] = str(WAIT)
    from database import has_written

    line = psycopg2.connect(host=PLACE, port=5000, user="odoo", dbname="odoo")
    said = [has_written(line)]
    with line.cursor() as cursor:
        for statement in ["SELECT 1", "UPDATE res_users SET active = active", "SELECT 1 / 0"]:
            try:
                cursor.execute(statement)
            except psycopg2.DataError:
                pass
            said.append(has_written(line))
    line.close()
    if said != [False, False, True, True]:
        sys.exit(f"has_written after nothing, a SELECT, an UPDATE and an error: {said}")


def odoo_init_fails_when_refused_and_waits_for_a_primary():
    """A refused login ends odoo-init, a missing primary does not. Time runs 100 times faster: 5 min are 3 s."""
    fast = (
        "import runpy, time; clock = time.monotonic; time.monotonic = lambda: 100 * clock(); "
        "runpy.run_path('/usr/lib/bakehouse/odoo-init', run_name='__main__')"
    )
    waiting = {}
    for port in [5000, 5001]:
        place = f"{PLACE}/{port}"
        os.makedirs(place)
        with open(f"{place}/odoo.conf", "w") as file:
            file.write(
                f"[options]\ndb_host = 127.0.0.1\ndb_port = {port}\ndb_user = yesterday\ndb_password = x\n"
                f"db_sslmode = disable\ndb_name = odoo\ndata_dir = {place}\n"
            )
        environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": "/usr/lib/bakehouse", "CREDENTIALS_DIRECTORY": place}
        waiting[port] = ODOO.start(
            sys.executable,
            "-c",
            fast,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
    said = waiting[5000].communicate(timeout=60)[1]
    if waiting[5000].returncode != 1 or 'role "yesterday" does not exist' not in said:
        sys.exit(f"after a refused login odoo-init ended with {waiting[5000].returncode}: {said}")
    # Longer than the refused one ran.
    time.sleep(5)
    if waiting[5001].poll() is not None:
        sys.exit(f"odoo-init ended without a primary: {waiting[5001].communicate()[1]}")
    waiting[5001].kill()


def retries_when_cut_during_authentication():
    """Odoo without the addon would answer "Access Denied"."""
    user = User()
    user.enter()
    answer = user.look({"X-Cut": "now"})
    with open(f"{PLACE}/log") as log:
        if "terminating connection due to administrator command" not in log.read():
            sys.exit("PostgreSQL ended no connection")
    if "result" not in answer:
        sys.exit(f"error after a cut during authentication: {answer['error']['data']['message']}")


class User:
    """A user who is logged in and sends requests continuously."""

    def __init__(self):
        jar = urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar())
        self.web = urllib.request.build_opener(jar)
        self.answered = 0

    def call(self, path, headers=None, **params):
        body = json.dumps({"jsonrpc": "2.0", "method": "call", "params": params}).encode()
        headers = {"Content-Type": "application/json"} | (headers or {})
        request = urllib.request.Request(f"http://127.0.0.1:8069{path}", body, headers)
        with self.web.open(request, timeout=60) as answer:
            return json.load(answer)

    def enter(self):
        while True:
            try:
                self.call("/web/session/authenticate", db="odoo", login="admin", password="admin")["result"]["uid"]
                break
            except (OSError, KeyError):
                time.sleep(0.5)

    def look(self, headers=None):
        return self.call(
            "/web/dataset/call_kw/res.users/search_read",
            headers,
            model="res.users",
            method="search_read",
            args=[[], ["name"]],
            kwargs={},
        )

    def ask(self):
        self.enter()
        while True:
            try:
                answer = self.look()
                if "result" in answer:
                    good.append(time.monotonic())
                else:
                    (logouts if answer["error"]["code"] == 100 else bad).append(answer["error"]["data"]["message"])
            except (OSError, ValueError) as error:
                bad.append(repr(error))
            self.answered += 1
            time.sleep(0.02)


def answers(odoo, more):
    """Waits for `more` successful responses."""
    enough, until = len(good) + more, time.monotonic() + 180
    while len(good) < enough:
        if odoo.poll() is not None or time.monotonic() > until:
            with open(f"{PLACE}/odoo.log") as log:
                sys.exit(f"no responses from Odoo, exit status {odoo.poll()}:\n{log.read()[-3000:]}")
        time.sleep(0.2)


def every_user_has_an_answer():
    """Waits until each user has one more response. So no request loses its connections more than twice, also on a build
    host where a request takes long. Odoo repeats a request twice."""
    before = [user.answered for user in users]
    until = time.monotonic() + 180
    while any(user.answered == count for user, count in zip(users, before, strict=True)):
        if time.monotonic() > until:
            sys.exit(f"a user had no response for 180 s after {before} responses; errors: {bad[:3]}")
        time.sleep(0.01)


def main():
    loopback()
    database()
    has_written_detects_writes()
    odoo_init_fails_when_refused_and_waits_for_a_primary()
    os.makedirs(f"{PLACE}/addons/cut")
    with open(f"{PLACE}/addons/cut/__init__.py", "w") as file:
        file.write(CUT)
    with open(f"{PLACE}/addons/cut/__manifest__.py", "w") as file:
        file.write("{'name': 'Cut', 'license': 'LGPL-3', 'author': 'Bakehouse'}")
    config = f"{PLACE}/odoo.conf"
    with open(config, "w") as file:
        file.write(CONFIG)
    with open(f"{PLACE}/odoo.log", "w") as log:
        odoo = ODOO.start("/usr/bin/odoo", "server", "-c", config, stdout=log, stderr=log)
    for _ in range(3):
        users.append(User())
        threading.Thread(target=users[-1].ask, daemon=True).start()
    answers(odoo, 30)
    retries_when_cut_during_authentication()

    for pause in [0, 3]:
        control("stop", "-m", "fast")
        time.sleep(pause)
        control("start")
        answers(odoo, 30)
        if bad or logouts:
            sys.exit(f"{pause} s without a primary: {len(bad)} errors ({bad[:3]}), {len(logouts)} logouts")

    # Connections end at any moment, also during COMMIT.
    end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'odoo' AND pid <> pg_backend_pid();\n"
    for _ in range(150):
        ODOO.run(f"{BIN}/psql", "-q", "-h", PLACE, "-p", "5000", "-U", "odoo", "odoo", stdin=end.encode())
        every_user_has_an_answer()
        time.sleep(random.uniform(0, 0.1))
    answers(odoo, 30)
    if bad or logouts:
        sys.exit(f"connections ended: {len(bad)} errors ({bad[:3]}), {len(logouts)} logouts")

    # A database that stays away: requests fail after WAIT, and Odoo recovers.
    control("stop", "-m", "fast")
    time.sleep(WAIT + 4)
    if not bad:
        sys.exit("no request failed without a database")
    control("start")
    answers(odoo, 30)
    if logouts:
        sys.exit(f"{len(logouts)} logouts")
    # The sandbox ends the remaining processes.
    os._exit(0)


main()
