//! Add-ons in a fleet of containers: a new version of an add-on updates the database in its rollout, and a version whose
//! add-on fails does not reach the second app node.

use std::process::Command;
use std::time::{Duration, Instant};

use bakehouse_tests::updates::{LOOK, is_blessed, is_denied, publish, runs, serve_updates, version};
use bakehouse_tests::{Machine, TestFleet};

/// One hub, one database, two app nodes.
const FLEET: &str = "name = \"addons\"\nversion = \"1\"\n\n[groups.hub]\ncount = 1\n\
    endpoints = [\"hub.example.net\"]\n\n[groups.db]\ncount = 1\n\n[groups.app]\ncount = 2\n\n\
    [odoo]\naddons = [\"addons\"]\nmodules = [\"web\", \"held_note\"]\n";
const NODES: [&str; 4] = ["hub-1", "db-1", "app-1", "app-2"];

/// Logs in to Odoo on the hub as a browser does, and prints the number of the user. Arguments: URL and password.
const LOG_IN: &str = "
import json, ssl, sys, urllib.request
url, password = sys.argv[1:]
body = {'jsonrpc': '2.0', 'params': {'db': 'odoo', 'login': 'admin', 'password': password}}
request = urllib.request.Request(url + '/web/session/authenticate', json.dumps(body).encode(),
    {'Content-Type': 'application/json'})
with urllib.request.urlopen(request, context=ssl._create_unverified_context(), timeout=120) as response:
    print(json.load(response)['result']['uid'])
";

const PSQL: &str = "setpriv --reuid=postgres --regid=postgres --clear-groups psql -AtXq -v ON_ERROR_STOP=1";

/// A package with an add-on of the OCA, and the add-on.
const OCA: [&str; 2] = ["odoo-addon-partner-firstname==19.0.1.0.3", "partner_firstname"];

/// Writes an add-on. Its name is that of its folder.
fn write_addon(lab: &TestFleet, folder: &str, model: &str) {
    let name = folder.rsplit('/').next().unwrap_or_default();
    let manifest = format!(
        "{{\n    'name': '{name}',\n    'author': 'Acme',\n    'license': 'LGPL-3',\n    'depends': ['web'],\n}}\n"
    );
    lab.write(&format!("{folder}/__manifest__.py"), &manifest);
    lab.write(&format!("{folder}/__init__.py"), "from . import models\n");
    lab.write(&format!("{folder}/models.py"), &format!("from odoo import fields, models\n\n{model}"));
}

/// Makes a git repository of a folder. Returns the table of fleet.toml for its add-ons.
fn repository(lab: &TestFleet, folder: &str) -> String {
    let git = |args: &[&str]| {
        let identity = ["-c", "user.name=Acme", "-c", "user.email=acme@example.com"];
        let mut command = Command::new("git");
        let output = command.arg("-C").arg(lab.dir.join(folder)).args(identity).args(args).output().expect("git");
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    };
    git(&["init", "-q"]);
    git(&["add", "."]);
    git(&["commit", "-q", "-m", "Add-ons"]);
    let (url, commit) = (lab.dir.join(folder), git(&["rev-parse", "HEAD"]));
    format!("\n[[odoo.repositories]]\nurl = \"file://{}\"\ncommit = \"{}\"\n", url.display(), commit.trim())
}

fn note(fields: &str, more: &str) -> String {
    format!(
        "\nclass Note(models.Model):\n    _name = 'held.note'\n    _description = 'Note'\n\n    \
         name = fields.Char()\n{fields}\n{more}"
    )
}

/// Returns the tables of Odoo's database that have this column, as `table.column`.
fn columns(db: &Machine, name: &str) -> String {
    let query =
        format!("SELECT table_name || '.' || column_name FROM information_schema.columns WHERE column_name = '{name}'");
    db.ok(&format!("{PSQL} -d odoo -c \"{query}\""))
}

/// Waits until all of these nodes run this version and count as good.
fn all_run(machines: &[Machine], wanted: &str) {
    let until = Instant::now() + Duration::from_secs(2400);
    for machine in machines {
        while runs(machine) != wanted {
            assert!(Instant::now() < until, "version {wanted} did not arrive:\n{}", machine.console());
            std::thread::sleep(Duration::from_secs(5));
        }
        is_blessed(machine);
    }
}

#[test]
fn containers_update_the_database_in_the_rollout_of_an_addon() {
    let lab = TestFleet::empty("addons");
    lab.write("fleet.toml", FLEET);
    write_addon(&lab, "addons/held_note", &note("", ""));
    let _server = serve_updates(&lab);
    let updates = lab.dir.join("updates");
    let updates = updates.to_str().expect("a UTF-8 path");
    let machines = NODES.map(|name| Machine::for_node(&lab, name));
    let [hub, db, first, second] = &machines;
    lab.ok(&["up", "--containers"]);
    publish(&lab);
    machines.iter().for_each(is_blessed);
    let password = lab.odoo_password();
    let log_in = || first.ok(&format!("python3 - https://10.10.0.100 '{password}' <<'END'\n{LOG_IN}\nEND"));
    assert_eq!(log_in(), "2");

    // The fault of an earlier version of Bakehouse: a stored field of res.partner, without which no user can log in, and
    // modules that fleet.toml newly names. One comes from a git repository, and one from the OCA.
    let partner = "\nclass Partner(models.Model):\n    _inherit = 'res.partner'\n\n    held_flag = fields.Char()\n";
    write_addon(&lab, "addons/held_note", &note("    amount_held = fields.Float()", partner));
    let tag = "\nclass Tag(models.Model):\n    _name = 'held.tag'\n    _description = 'Tag'\n";
    write_addon(&lab, "repository/held_tag", tag);
    let [package, oca] = OCA;
    let modules = format!("\"held_note\", \"held_tag\", \"{oca}\"]\nwheels = [\"{package}\"]\n");
    lab.edit("fleet.toml", "\"held_note\"]\n", &(modules + &repository(&lab, "repository")));
    let locked = lab.ok(&["lock"]).out;
    assert!(
        locked.contains("held_tag (add-on)") && locked.contains("odoo-addon-partner-firstname (Python)"),
        "{locked}"
    );
    version(&lab, "1", "2");
    let plan = lab.ok(&["plan", updates]).out;
    for line in [
        "install  held_tag, partner_firstname",
        "update   held_note, if installed",
        "the first app node updates Odoo's database",
    ] {
        assert!(plan.contains(line), "no `{line}` in:\n{plan}");
    }
    publish(&lab);
    for machine in &machines {
        assert_eq!(machine.ok(LOOK), "2");
    }
    all_run(&machines, "2");
    let said = |machine: &Machine| machine.ok("journalctl -b -u odoo-init -o cat --no-pager");
    let (one, other) = (said(first), said(second));
    let updated = "version 2 installs held_tag, partner_firstname; updates held_note";
    assert!(one.contains(updated) != other.contains(updated), "not exactly one node updated:\n{one}\n{other}");
    assert_eq!(columns(db, "held_flag"), "res_partner.held_flag");
    assert_eq!(columns(db, "amount_held"), "held_note.amount_held");
    assert_eq!(columns(db, "firstname"), "res_partner.firstname");
    assert_eq!(log_in(), "2");

    // An add-on whose update fails half-way. The other app node keeps serving, and the version is denied.
    lab.write(
        "addons/held_note/migrations/19.0.3.0/post-fails.py",
        "def migrate(cr, version):\n    cr.execute('UPDATE res_partner SET no_such_column = 1')\n",
    );
    lab.edit("addons/held_note/__manifest__.py", "'depends'", "'version': '19.0.3.0',\n    'depends'");
    version(&lab, "2", "3");
    publish(&lab);
    for machine in &machines {
        assert_eq!(machine.ok(LOOK), "3");
    }
    is_denied_within(hub, "3", Duration::from_secs(2400));
    assert!(is_denied(hub, "3").contains("did not come up on app-"));
    let all = machines[2..].iter().map(|app| app.ok("journalctl -u odoo-init -o cat --no-pager")).collect::<String>();
    assert!(all.contains("version 3 does not fit the database: the add-on held_note fails"), "{all}");
    assert!(all.contains("no_such_column"), "{all}");
    // The way back of the data.
    assert!(all.contains("without later entries: `restore = \"20"), "{all}");
    all_run(&machines[2..], "2");
    assert_eq!(log_in(), "2");
    lab.run(&["down"]);
}

fn is_denied_within(hub: &Machine, version: &str, time: Duration) {
    let until = Instant::now() + time;
    let key = format!("{} get --print-value-only /bakehouse/rollout/denied/{version}", bakehouse_tests::ETCDCTL);
    while hub.ok(&key).is_empty() {
        assert!(Instant::now() < until, "version {version} was not denied");
        std::thread::sleep(Duration::from_secs(5));
    }
}
