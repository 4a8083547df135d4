//! Compares the JSON Schemas with the parser and the lint. Editors must not mark what `bakehouse check` accepts, and they
//! must mark what the parser refuses.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use fleet::reference::{File, json_schema};
use fleet::{Fleet, OverlayManifest, Profile, Profiles, Severity};
use jsonschema::Validator;
use toml::{Table, Value};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn validator(file: File) -> Validator {
    jsonschema::draft7::new(&json_schema(file)).expect("a valid schema")
}

fn schema_accepts(validator: &Validator, text: &str) -> bool {
    toml::from_str::<Table>(text).is_ok_and(|table| validator.is_valid(&serde_json::to_value(table).unwrap()))
}

/// Result of the parser and of the lint for a text.
#[derive(Debug, PartialEq)]
enum Verdict {
    Accepted,
    /// The lint has an error.
    Linted(String),
    /// The parser has an error.
    Refused(String),
}

fn verdict(file: File, text: &str, profiles: &Profiles) -> Verdict {
    let parsed = match file {
        File::Fleet => Fleet::parse("fleet.toml", text.as_bytes()).map(Some),
        File::Profile => Profile::parse("db.toml", text.as_bytes()).map(|_| None),
        File::Overlay => OverlayManifest::parse("overlay.toml", text.as_bytes()).map(|_| None),
    };
    match parsed {
        Err(e) => Verdict::Refused(e.to_string()),
        Ok(None) => Verdict::Accepted,
        Ok(Some(fleet)) => match fleet::lint(&fleet, profiles).iter().find(|d| d.severity == Severity::Error) {
            None => Verdict::Accepted,
            Some(error) => Verdict::Linted(error.to_string()),
        },
    }
}

/// Returns the TOML files of a folder and of its folders.
fn files(dir: &str, matches: impl Fn(&Path) -> bool) -> Vec<PathBuf> {
    let all = walkdir::WalkDir::new(root().join(dir)).sort_by_file_name().into_iter();
    all.map(|entry| entry.unwrap().into_path()).filter(|path| matches(path)).collect()
}

fn profiles() -> Profiles {
    let read = |path: PathBuf| {
        let role = path.file_stem().unwrap().to_str().unwrap().to_owned();
        (role, Profile::parse("profile", &fs::read(&path).unwrap()).unwrap())
    };
    files("profiles/roles", is_toml).into_iter().map(read).collect()
}

fn is_toml(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "toml")
}

#[test]
fn schemas_accept_every_shipped_file() {
    let profiles = profiles();
    let fleets = [files("profiles/fleets", is_toml), files("tests/fleets", is_toml)].concat();
    let manifests = files("overlays", |path| path.ends_with("overlay.toml"));
    for (file, paths, least) in
        [(File::Fleet, fleets, 8), (File::Profile, files("profiles/roles", is_toml), 8), (File::Overlay, manifests, 15)]
    {
        assert!(paths.len() >= least, "{paths:?}");
        let validator = validator(file);
        for path in paths {
            let text = fs::read_to_string(&path).unwrap();
            assert_eq!(verdict(file, &text, &profiles), Verdict::Accepted, "{}", path.display());
            let json = serde_json::to_value(toml::from_str::<Table>(&text).unwrap()).unwrap();
            let errors: Vec<String> =
                validator.iter_errors(&json).map(|e| format!("{}: {e}", e.instance_path())).collect();
            assert!(errors.is_empty(), "{}: {errors:?}", path.display());
        }
    }
}

const HUBS: &str = "name = \"acme\"\n[groups]\nhub = { count = 1, endpoints = [\"hub.example\"] }\n";

#[test]
fn parser_and_schema_refuse_bad_files() {
    let profiles = profiles();
    for (file, good, bad) in [
        (File::Fleet, HUBS, "nmae = \"acme\""),
        (File::Fleet, HUBS, "name = 3"),
        (File::Fleet, HUBS, "name = \"Acme\""),
        (File::Fleet, HUBS, "name = \"slots\""),
        (File::Fleet, HUBS, "version = 1"),
        (File::Fleet, HUBS, "version = \"1_2\""),
        (File::Fleet, HUBS, "groups.db.cuont = 2"),
        (File::Fleet, HUBS, "groups.db = { count = 0 }"),
        (File::Fleet, HUBS, "groups.db = { count = \"2\" }"),
        (File::Fleet, HUBS, "groups.DB = { count = 2, roles = [\"db\"] }"),
        (File::Fleet, HUBS, "groups.db = { count = 2, first = \"10.10.0.256\" }"),
        (File::Fleet, HUBS, "image.hardware = \"baremetal\""),
        (File::Fleet, HUBS, "image.root_size = \"640 M\""),
        (File::Fleet, HUBS, "mesh.subnet = \"10.10.0.0\""),
        (File::Fleet, HUBS, "mesh.port = 70000"),
        (File::Fleet, HUBS, "vip.address = \"vip\""),
        (File::Fleet, HUBS, "vip.lan = \"192.168.1.256\""),
        (File::Fleet, HUBS, "vip.lan = \"fd00::100\""),
        (File::Fleet, HUBS, "vip.lan6 = \"fd00::100/129\""),
        (File::Fleet, HUBS, "dns.name = \"erp_1.acme.example\""),
        (File::Fleet, HUBS, "dns.dnssec = \"yes\""),
        (File::Fleet, HUBS, "database.ttl = 10"),
        (File::Fleet, HUBS, "firewall.open = [{ port = 80, proto = \"icmp\" }]"),
        (File::Fleet, HUBS, "firewall.open = [{ port = 80 }]"),
        (File::Fleet, HUBS, "web.connections = 5"),
        (File::Fleet, HUBS, "web.redirect = \"yes\""),
        (File::Fleet, HUBS, "web.name = \"a b\""),
        (File::Fleet, HUBS, "web.logins = 5"),
        (File::Fleet, HUBS, "web.acme = {}"),
        (File::Fleet, HUBS, "web.authority = { directory = \"http://ca.example\" }"),
        (File::Fleet, HUBS, "update.url = \"ftp://updates.example\""),
        (File::Fleet, HUBS, "alerts.webhooks = \"https://chat.example\""),
        (File::Fleet, HUBS, "alerts.email = { to = \"a@b.example\" }"),
        (File::Fleet, HUBS, "alerts.ntfy = [{ topic = \"a/b\" }]"),
        (File::Fleet, HUBS, "alerts.telegram = [{ chat = \"name\" }]"),
        (File::Fleet, HUBS, "alerts.slack = [{ api_url = \"https://hooks.example\" }]"),
        (
            File::Fleet,
            HUBS,
            "alerts.email = { to = \"a@b.example\", from = \"a@b.example\", smarthost = \"m:25\", tls = \"ssl\" }",
        ),
        (File::Fleet, HUBS, "odoo.languages = [\"german\"]"),
        (File::Fleet, HUBS, "odoo.workers = 0"),
        (File::Fleet, HUBS, "odoo.memory_soft = \"640 MB\""),
        (File::Fleet, HUBS, "odoo.cron_threads = 17"),
        (File::Fleet, HUBS, "odoo.options = { unaccent = [true] }"),
        (File::Fleet, HUBS, "odoo.mail = { user = \"u\" }"),
        (File::Fleet, HUBS, "odoo.mail = { smarthost = \"m:25\", from = \"ERP <a@b.example>\" }"),
        (File::Fleet, HUBS, "odoo.mail = { smarthost = \"m:25\", domain = \"B.example\" }"),
        (File::Fleet, HUBS, "backup.keep = 0"),
        (File::Fleet, HUBS, "backup.full = \"\""),
        (File::Fleet, HUBS, "backup.s3 = { bucket = \"b\", endpoint = \"s3.example\" }"),
        (File::Fleet, HUBS, "promise.vip = 0"),
        (File::Fleet, HUBS, "netboot.machines = { \"52:54:00:AA:BB:CC\" = \"hub-1\" }"),
        (File::Fleet, HUBS, "debian.sources = [{ name = \"sid\" }]"),
        (File::Fleet, HUBS, "secure_boot.keys = \"db.key\""),
        (File::Profile, "", "package = [\"etcd\"]"),
        (File::Profile, "", "packages = \"etcd\""),
        (File::Profile, "", "disk.root = \"big\""),
        (File::Profile, "", "ports = [{ port = 80, proto = \"sctp\", service = \"web\" }]"),
        (File::Profile, "", "users.odoo = { home = \"/var/lib/odoo\" }"),
        (File::Profile, "", "reclaim_after = -1"),
        (File::Overlay, "", "file = {}"),
        (File::Overlay, "", "files.\"usr/bin/tool\".mode = \"rwx\""),
        (File::Overlay, "", "check = [{ of = [\"etc/x\"] }]"),
        (File::Overlay, "", "make = [{ file = \"/etc/x\", of = [], command = [\"true\"] }]"),
        (File::Overlay, "", "make = [{ file = \"usr/../x\", of = [], command = [\"true\"] }]"),
        (File::Overlay, "", "migration = [{ name = \"A B\", before = \"x.service\" }]"),
        (File::Overlay, "", "migration = [{ name = \"a\", before = \"x.target\" }]"),
    ] {
        let validator = validator(file);
        assert_eq!(verdict(file, good, &profiles), Verdict::Accepted);
        assert!(schema_accepts(&validator, good), "{good}");
        // A key of the good file gives way to the bad one.
        let key = bad.split([' ', '.']).next().unwrap();
        let rest = good.lines().filter(|line| !line.starts_with(&format!("{key} ="))).collect::<Vec<_>>().join("\n");
        let text =
            format!("{bad}\n{}", if bad.starts_with("groups.") { rest.replace("[groups]\n", "groups.") } else { rest });
        assert!(toml::from_str::<Table>(&text).is_ok(), "not TOML: {text}");
        assert_ne!(verdict(file, &text, &profiles), Verdict::Accepted, "{text}");
        assert!(!schema_accepts(&validator, &text), "the schema accepts {text}");
    }
}

/// A fleet with every key, for which the schema and the parser are compared after each change of a value.
const EVERY_KEY: &str = r#"
name = "acme"
version = "2~rc1"
image = { hardware = "metal", root_size = "2G" }
mesh = { subnet = "10.10.0.0/24", transport = "10.11.0.0/24", port = 51820 }
vip = { address = "10.10.0.100", lan = "192.168.1.100/24", lan6 = "fd00:1::100/64" }
dns = { name = "erp.acme.example", dnssec = true }
database = { ttl = 30, loop_wait = 3, retry_timeout = 6 }
firewall = { open = [{ port = 8443, proto = "tcp", role = "hub" }] }
web = { name = "erp.example.com", acme = true, redirect = true, hsts = true, connections = 150, logins = 120, authority = { directory = "https://ca.example/acme/directory", email = "it@example.com", eab_key_id = "kid", ca = "ca.pem" } }
access = { shell = true, rescue = false }
update = { url = "https://updates.example/acme/", when = "*:0/5", stale_after = 30 }
odoo = { database = "odoo", languages = ["pt_BR"], addons = ["addons"], modules = ["web", "sale"], workers = 2, memory_soft = "640M", memory_hard = "1G", time_cpu = 600, time_real = 1200, cron_threads = 1, cron = ["app"], db_maxconn = 16, proxy = true, options = { log_level = "info" }, mail = { smarthost = "mail.example:587", user = "u", tls = "starttls", ca = "ca.pem", from = "erp@x.example", domain = "x.example", catchall = "catchall", bounce = "bounce", from_filter = ["x.example"] } }
promise = { vip = 3, database = 35, app = 3 }
secure_boot = { key = "db.key", certificate = "db.crt" }

[alerts]
webhooks = ["https://chat.example/hook"]
dead_man = "https://dead.example/x"
page = "https://docs.example/alerts.html"
email = { to = "a@x.example", from = "b@x.example", smarthost = "mail.example:25", user = "u", tls = "starttls", hello = "h" }
telegram = [{ chat = -100, secret = "telegram" }]
slack = [{ secret = "slack", channel = "ops" }]
matrix = [{ secret = "matrix" }]
ntfy = [{ topic = "acme", url = "https://ntfy.example", secret = "ntfy" }]

[backup]
keep = 4
full = "Sun 01:30"
incremental = "Mon..Sat 01:30"
stale_after = 30
restore = "latest"
s3 = { bucket = "b", endpoint = "s3.example", region = "r", path_style = true, ca = "ca.pem" }

[debian]
suite = "trixie"
mirror = "http://mirror.example/debian"
security_mirror = "http://mirror.example/security"
[[debian.sources]]
name = "sid"
uri = "http://mirror.example/debian"
suite = "sid"
components = ["main"]
key = "sid.gpg"
packages = ["etcd-server"]
check_valid_until = false

[netboot]
machines = { "52:54:00:aa:bb:cc" = "hub-1", "SERIAL7" = "app" }
others = "app"
diskless = []
disk = "/dev/vda"
trust_lan = false

[groups.hub]
count = 3
endpoints = ["hub1.example", "hub2.example", "198.51.100.7"]
[groups.db]
count = 2
[groups.app]
count = 2
roles = ["app"]
first = "10.10.0.50"
packages = ["vim-tiny"]
overlays = []
[groups.monitor]
count = 1
"#;

/// Keys whose values the lint compares with other keys, or whose form no pattern describes. The schema accepts what the
/// lint refuses there.
const COMPARED: &[&str] = &[
    "alerts.email",
    "backup.full",
    "backup.incremental",
    "backup.restore",
    "backup.s3.endpoint",
    "database.loop_wait",
    "database.retry_timeout",
    "database.ttl",
    "debian",
    "dns.dnssec",
    "dns.name",
    "firewall.open.0.port",
    "firewall.open.0.role",
    "groups.app.count",
    "groups.app.first",
    "groups.app.packages",
    "groups.app.roles",
    "groups.db.count",
    "groups.hub.count",
    "groups.hub.endpoints",
    "groups.hub.roles",
    "groups.monitor.count",
    "image.root_size",
    "mesh.port",
    "mesh.subnet",
    "mesh.transport",
    "netboot.disk",
    "netboot.diskless",
    "netboot.machines",
    "netboot.others",
    "odoo.cron",
    "odoo.mail",
    "odoo.memory_hard",
    "odoo.memory_soft",
    "odoo.options",
    "odoo.time_cpu",
    "odoo.time_real",
    "promise.app",
    "promise.database",
    "promise.vip",
    "update.when",
    "vip.address",
    "vip.lan",
    "vip.lan6",
    "web.acme",
    "web.authority.directory",
    "web.authority.eab_key_id",
    "web.authority.email",
    "web.name",
];

/// Calls `each` with the path of every value in a tree.
fn paths(value: &Value, path: &mut Vec<String>, each: &mut impl FnMut(&[String])) {
    if !path.is_empty() {
        each(path);
    }
    let inner: Vec<(String, &Value)> = match value {
        Value::Table(table) => table.iter().map(|(key, value)| (key.clone(), value)).collect(),
        Value::Array(all) => all.iter().enumerate().map(|(i, value)| (i.to_string(), value)).collect(),
        _ => Vec::new(),
    };
    for (key, value) in inner {
        path.push(key);
        paths(value, path, each);
        path.pop();
    }
}

fn at<'a>(value: &'a mut Value, path: &[String]) -> &'a mut Value {
    path.iter().fold(value, |value, key| match value {
        Value::Array(all) => &mut all[key.parse::<usize>().unwrap()],
        value => &mut value[key.as_str()],
    })
}

#[test]
fn schema_accepts_what_check_accepts_and_refuses_what_the_parser_refuses() {
    let (profiles, validator) = (profiles(), validator(File::Fleet));
    let whole: Value = toml::from_str(EVERY_KEY).unwrap();
    assert_eq!(verdict(File::Fleet, EVERY_KEY, &profiles), Verdict::Accepted);
    assert!(schema_accepts(&validator, EVERY_KEY));
    let mut values: Vec<Value> = [
        "",
        "x",
        "A b",
        "é",
        "a-",
        "-a",
        "a_b",
        "7",
        "640M",
        "640X",
        "10.10.0.9",
        "10.10.0.300",
        "01.2.3.4",
        "10.10.0.0/24",
        "10.10.0.0/33",
        "10.10.0.1/8",
        "hub-1",
        "hub",
        "slots",
        "metal",
        "udp",
        "https://x",
        "https://x.example/a?b",
        "http://",
        "http:///",
        "a\"b",
        "a%b",
        "a$b",
        "\u{7f}x",
        "de",
        "de_DE",
        "deutsch",
        "de@latin",
        "latest",
        "*:0/10",
        "a.b-c.d",
        "abcdefghijklmnopqrstuvwxyz0123456789",
    ]
    .map(Value::from)
    .into();
    values.extend([-1, 0, 1, 3, 25, 4000, 4001, 65_535, 65_536].map(|n: i64| Value::from(n)));
    values.extend([Value::from(1.5), Value::from(true), Value::Array(vec![]), Value::Table(Table::new())]);
    values.push(Value::Array(vec![Value::from("x")]));
    values.push(Value::Array(vec![Value::from(1)]));
    values.push(Value::Table(Table::from_iter([("x".to_owned(), Value::from(1))])));

    let mut changed = Vec::new();
    paths(&whole, &mut Vec::new(), &mut |path| {
        for value in &values {
            let mut other = whole.clone();
            // serde also reads a table from a list of its values, which is nothing to suggest in an editor.
            if value.is_array() && at(&mut other, path).is_table() {
                continue;
            }
            *at(&mut other, path) = value.clone();
            changed.push((path.join("."), other));
        }
        let (last, parent) = path.split_last().unwrap();
        let mut without = whole.clone();
        if let Value::Table(table) = at(&mut without, parent) {
            let value = table.remove(last).unwrap();
            changed.push((parent.join("."), without.clone()));
            for name in ["zzz", "Zz", "52:54:00:AA:00:00", "a-b-c-d-e-f-g-h-i-j-k"] {
                let mut renamed = without.clone();
                at(&mut renamed, parent).as_table_mut().unwrap().insert(name.to_owned(), value.clone());
                changed.push((parent.join("."), renamed));
            }
        }
    });
    assert!(changed.len() > 4000, "{}", changed.len());
    let (mut wrong, mut laxer) = (Vec::new(), BTreeSet::new());
    for (path, value) in changed {
        let text = toml::to_string(&value).unwrap();
        match (verdict(File::Fleet, &text, &profiles), schema_accepts(&validator, &text)) {
            (Verdict::Accepted, false) => wrong.push(format!("{path}: the schema refuses {:?}", find(&value, &path))),
            (Verdict::Refused(e), true) => wrong.push(format!("{path}: the schema accepts, the parser: {e}")),
            (Verdict::Linted(e), true) if !COMPARED.iter().any(|c| path.starts_with(c) || c.starts_with(&path)) => {
                laxer.insert(format!("{path}: {e}"));
            }
            _ => {}
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(laxer.is_empty(), "the schema accepts, the lint does not:\n{}", Vec::from_iter(laxer).join("\n"));
}

/// Returns the value at a path, for a message.
fn find<'a>(value: &'a Value, path: &str) -> Option<&'a Value> {
    path.split('.').filter(|key| !key.is_empty()).try_fold(value, |value, key| match value {
        Value::Array(all) => all.get(key.parse::<usize>().ok()?),
        value => value.get(key),
    })
}

#[test]
fn examples_match_their_schema() {
    fn walk(schema: &serde_json::Value, path: &str, count: &mut usize) {
        for example in schema["examples"].as_array().into_iter().flatten() {
            // The example of a table is one of its entries.
            if schema["type"] != "object" {
                assert!(jsonschema::draft7::new(schema).unwrap().is_valid(example), "{path}: {example}");
                *count += 1;
            }
        }
        match schema {
            serde_json::Value::Object(map) => {
                map.iter().for_each(|(key, inner)| walk(inner, &format!("{path}/{key}"), count));
            }
            serde_json::Value::Array(all) => all.iter().for_each(|inner| walk(inner, path, count)),
            _ => {}
        }
    }
    let mut count = 0;
    for file in [File::Fleet, File::Profile, File::Overlay] {
        walk(&json_schema(file), "", &mut count);
    }
    assert!(count > 15, "{count}");
}
