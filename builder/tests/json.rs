//! `--json` is a contract: every command prints lines of the published schema, and the last one is a result or an
//! error with the exit code. No command here builds an image or needs the network.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use builder::cli::{json_commands, json_page, json_schema};
use jsonschema::Validator;
use serde_json::Value;
use tempfile::TempDir;

/// Endpoints at which no hub listens.
const NOWHERE: [&str; 6] =
    ["--endpoint", "hub-1=127.0.0.1", "--endpoint", "hub-2=127.0.0.1", "--endpoint", "hub-3=127.0.0.1"];

/// A fleet's folder, and an empty store.
struct Lab {
    dir: TempDir,
    schema: Validator,
}

/// A finished command.
struct Done {
    status: i32,
    lines: Vec<Value>,
    err: String,
}

impl Lab {
    fn new() -> Self {
        let schema = jsonschema::validator_for(&json_schema()).expect("a valid schema");
        Self { dir: tempfile::tempdir().expect("a folder"), schema }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    /// Runs a command with `--json` in the fleet `acme`, and validates its output.
    fn run(&self, args: &[&str]) -> Done {
        self.run_in(&self.dir.path().join("acme"), args)
    }

    fn run_in(&self, fleet: &Path, args: &[&str]) -> Done {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bakehouse"));
        command.arg("--json").arg("-C").arg(fleet).args(args).current_dir(self.dir.path()).stdin(Stdio::null());
        command.env("BAKEHOUSE_STORE", self.dir.path().join("store"));
        command.env("XDG_CONFIG_HOME", self.dir.path().join("config")).env_remove("BAKEHOUSE_OPERATOR");
        let output = command.output().expect("bakehouse starts");
        let (out, err) = (String::from_utf8(output.stdout), String::from_utf8(output.stderr));
        let (out, err) = (out.expect("UTF-8"), err.expect("UTF-8"));
        let status = output.status.code().expect("an exit code");
        let line = |text: &str| {
            let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{args:?}: {e} in\n{out}\n{err}"));
            let problems: Vec<String> = self.schema.iter_errors(&value).map(|e| e.to_string()).collect();
            assert!(problems.is_empty(), "{args:?}: {problems:?} in\n{text}");
            value
        };
        let lines: Vec<Value> = out.lines().map(line).collect();
        let (last, events) = lines.split_last().unwrap_or_else(|| panic!("{args:?} printed nothing\n{err}"));
        assert!(events.iter().all(|line| line["event"].is_object()), "{args:?}: {out}");
        assert_ne!(last["result"].is_null(), last["error"].is_null(), "{args:?}: {out}");
        if last["error"].is_object() {
            assert_eq!(last["error"]["code"], status, "{args:?}: {out}");
            assert!(!err.is_empty(), "{args:?}: standard error has no text");
        }
        Done { status, lines, err }
    }
}

impl Done {
    fn last(&self) -> &Value {
        self.lines.last().expect("a line")
    }

    fn result(&self) -> &Value {
        let last = self.last();
        assert_eq!(self.status, 0, "{last}\n{}", self.err);
        &last["result"]
    }

    /// Returns the error, which has this exit code and a message with this text.
    fn error(&self, code: i32, text: &str) -> &Value {
        let error = &self.last()["error"];
        assert_eq!((self.status, error["code"].as_i64()), (code, Some(code.into())), "{}", self.last());
        assert!(error["message"].as_str().is_some_and(|message| message.contains(text)), "{error}");
        error
    }
}

#[test]
fn every_command_prints_a_result_or_an_error_of_the_schema() {
    let lab = Lab::new();
    let (acme, archive) = (lab.path("acme"), lab.path("report.tar.gz"));
    let ticket = lab.path("app.ticket");
    let config = lab.path("config/bakehouse");
    let (request, operator) = (format!("{config}/anna.request"), format!("{config}/anna.operator"));
    let cases: &[&[&str]] = &[
        &["init", &acme],
        &["init", &acme],
        &["init", &lab.path("Acme_Corp")],
        &["check"],
        &["ticket", "hub-1"],
        &["ticket", "app", "--uses", "2", "-o", &ticket],
        &["ticket", "hub"],
        &["ticket", "app", "--days", "0"],
        &[&["ticket", "--list"], &NOWHERE[..]].concat(),
        &[&["ticket", "--revoke", "0"], &NOWHERE[..]].concat(),
        &["ticket", "app", "--endpoint", "db-1=x"],
        &["secret", "email"],
        &["secret", "email", "--remove"],
        &[&["leave", "db-1"], &NOWHERE[..]].concat(),
        &["leave", "no-such"],
        &[&["rollout"], &NOWHERE[..]].concat(),
        &[&["rollout", "--pause", "why"], &NOWHERE[..]].concat(),
        &["rollout", "--skip", "no-such"],
        &["lock", "--mirror", "http://127.0.0.1:9"],
        &["fetch"],
        &["build"],
        &["build", "no-such"],
        &["plan", "updates"],
        &["publish", "updates"],
        &["flash", "hub-1", &lab.path("disk.raw")],
        &["flash", "no-such", &lab.path("disk.raw")],
        &["vm", "hub-1"],
        &["netboot", "--interface", "lo"],
        &["netboot", "--approve", "no-code"],
        &["netboot", "--approve", "no-code", "--again", "x"],
        &["up", "no-such"],
        &["up"],
        &["down"],
        &["down", "no-such"],
        &["status"],
        &["console", "hub-1"],
        &["exec", "hub-1", "--", "true"],
        &["rehearse", "no-such"],
        &["report", "-o", &archive],
        &["logs", "hub-1"],
        &["logs", "--role", "db", "--since", "yesterday"],
        &["units", "hub-1"],
        &["net", "hub-1"],
        &["disk", "hub-1"],
        &["audit", "--since", "7d"],
        &["audit", "-n", "0"],
        &["pcap", "hub-1", "-o", &lab.path("hub-1.pcap")],
        &["pcap", "hub-1"],
        &["pcap", "hub-1", "--seconds", "0"],
        &["backup", "now"],
        &["alert", "test"],
        &["top"],
        &["restart", "hub-1", "etcd"],
        &["reboot", "hub-1"],
        &["poweroff", "hub-1", "--yes"],
        &["switchover", "--yes"],
        &["drain", "hub-1", "--yes"],
        &["undrain", "hub-1"],
        &["open", "haproxy"],
        &["psql", "-c", "select 1"],
        &["psql", "-c", ""],
        &["odoo", "shell", "-c", "print(1)"],
        &["operator", "request", "anna", "-o", &config],
        &["operator", "add", "anna", "--role", "viewer", "--request", &request, "-o", &config],
        &["operator", "add", "Anna", "--role", "viewer"],
        &["operator", "add", "ben", "--role", "boss"],
        &["operator", "list"],
        &[&["operator", "revoke", "anna", "--yes"], &NOWHERE[..]].concat(),
        &["operator", "revoke", "carl"],
        &["operator", "revoke", "--file", "no-such"],
        &["operator", "revoke", "carl", "--key", "x"],
        &["operator", "wireguard", "anna"],
        &[&["operator", "wireguard", "anna", "-o", &config, "--operator", &operator], &NOWHERE[..]].concat(),
        // With an operator's file, the commands ask hubs that do not answer.
        &[&["logs", "hub-1", "--operator", &operator], &NOWHERE[..]].concat(),
        &[&["status", "--operator", &operator], &NOWHERE[..]].concat(),
        &[&["units", "hub-1", "--operator", &operator], &NOWHERE[..]].concat(),
        &["logs", "hub-1", "-u", "no/unit", "--operator", &operator],
        &[&["status", "--watch", "--operator", &operator], &NOWHERE[..]].concat(),
        &[&["net", "hub-1", "--operator", &operator], &NOWHERE[..]].concat(),
        &[&["backup", "now", "monitor-1", "--operator", &operator], &NOWHERE[..]].concat(),
        &[&["audit", "--node", "db-1", "--by", "anna", "--operator", &operator], &NOWHERE[..]].concat(),
        &[&["alert", "test", "--operator", &operator], &NOWHERE[..]].concat(),
        &[&["logs", "db-1", "--kept", "monitor-1", "--operator", &operator], &NOWHERE[..]].concat(),
        &[&["reboot", "hub-1", "--yes", "--operator", &operator], &NOWHERE[..]].concat(),
        &[&["reboot", "hub-1", "--yes", "--force", "db-1", "--operator", &operator], &NOWHERE[..]].concat(),
        &[&["open", "haproxy", "--operator", &operator], &NOWHERE[..]].concat(),
        &[&["exec", "--operator", &operator], &NOWHERE[..], &["hub-1", "true"]].concat(),
        &[&["psql", "-c", "select 1", "--operator", &operator], &NOWHERE[..]].concat(),
        &[&["open", "postgres", "--operator", &operator], &NOWHERE[..]].concat(),
        &[&["odoo", "shell", "hub-1", "-c", "1", "--operator", &operator], &NOWHERE[..]].concat(),
        &["explain", "/etc/passwd"],
        &["explain", "/run/bakehouse/haproxy.cfg", "--group", "hub"],
        &["store", "gc"],
        &["schema", "fleet"],
        &["completions", "bash"],
        &["man", &lab.path("man")],
    ];
    let mut seen = BTreeSet::new();
    for args in cases {
        let done = lab.run(args);
        let command = done.last()["command"].as_str().expect("a command").to_owned();
        let words: Vec<&str> = command.split(' ').collect();
        assert_eq!(words[..], args[..words.len()], "{}", done.last());
        seen.insert(command);
    }
    let missing: Vec<String> = json_commands().into_iter().filter(|command| !seen.contains(command)).collect();
    assert!(missing.is_empty(), "no case runs {missing:?}");
}

#[test]
fn usage_errors_have_the_shape_of_errors() {
    let lab = Lab::new();
    let error = |args: &[&str]| {
        let done = lab.run(args);
        assert_eq!(done.status, 2, "{}", done.last());
        done.last().clone()
    };
    let misspelt = error(&["chekc"]);
    assert!(misspelt["command"].is_null() && misspelt["error"]["help"].as_str().expect("a tip").contains("check"));
    assert!(error(&[])["command"].is_null());
    let unknown = error(&["store", "gc", "--no-such"]);
    assert_eq!((&unknown["command"], &unknown["error"]["diagnostics"]), (&"store gc".into(), &Value::Array(vec![])));
    assert_eq!(unknown["error"]["message"], "unexpected argument '--no-such' found");
    // `--json` after `--` belongs to the machine's command.
    let mut plain = Command::new(env!("CARGO_BIN_EXE_bakehouse"));
    let plain = plain.args(["exec", "--", "--json"]).output().expect("bakehouse starts");
    assert_eq!((plain.status.code(), plain.stdout), (Some(2), Vec::new()));
    // Help is text.
    let mut help = Command::new(env!("CARGO_BIN_EXE_bakehouse"));
    let help = help.args(["--json", "check", "--help"]).output().expect("bakehouse starts");
    assert!(help.status.success() && help.stdout.starts_with(b"Check fleet.toml"));
}

#[test]
fn results_have_what_a_script_needs() {
    let lab = Lab::new();
    let acme = lab.path("acme");
    let states = |done: &Done| -> BTreeSet<String> {
        let files = done.result()["files"].as_array().expect("files").iter();
        files.map(|file| file["state"].as_str().expect("a state").to_owned()).collect()
    };
    let first = lab.run(&["init", &acme]);
    assert_eq!((states(&first), &first.result()["fleet"]), (BTreeSet::from(["created".to_owned()]), &"acme".into()));
    assert!(first.result()["files"].as_array().is_some_and(|files| files.len() >= 4), "{}", first.last());
    assert_eq!(states(&lab.run(&["init", &acme])), BTreeSet::from(["kept".to_owned()]));

    // A script can revoke the ticket that it has minted. With `-o`, standard output has no secret.
    let file = lab.path("app.ticket");
    let written = lab.run(&["ticket", "app", "--uses", "2", "-o", &file]);
    let result = written.result();
    assert_eq!((&result["to"], &result["uses"], &result["path"]), (&"app".into(), &2.into(), &file.clone().into()));
    assert!(result.get("ticket").is_none() && !written.last().to_string().contains("PRIVATE"));
    let read = |text: &[u8]| fleet::Ticket::parse(text).expect("a ticket");
    let claims = read(&fs::read(&file).expect("a file")).token().expect("a token").read().expect("claims");
    assert_eq!((&result["number"], &result["expires"]), (&claims.id.into(), &claims.expires.into()));
    let printed = lab.run(&["ticket", "hub-1"]);
    let founder = printed.result();
    assert!(founder["number"].is_null() && founder["expires_at"].is_null() && founder["founder"] == true, "{founder}");
    drop(read(founder["ticket"].to_string().as_bytes()));
    let rows = lab.run(&[&["ticket", "--list"], &NOWHERE[..]].concat());
    assert_eq!(rows.result()[0]["expires_at"], result["expires_at"]);
    assert!(rows.last()["warnings"].to_string().contains("cannot list how often"), "{}", rows.last());

    assert_eq!(lab.run(&["down"]).result()["stopped"], Value::Array(vec![]));
    // A real fleet, without an operator's file.
    let help = lab.run(&["status"]).error(1, "there is no operator's file")["help"].as_str().expect("a fix").to_owned();
    assert!(help.contains("bakehouse operator add NAME --role ROLE --own"), "{help}");
    // A fleet whose machines have run on this host.
    fs::create_dir_all(lab.dir.path().join("acme/build/vm/hub-1")).expect("a folder");
    assert_eq!(lab.run(&["status"]).result()["nodes"][0]["state"], "off");
    assert_eq!(lab.run(&["store", "gc"]).result()["entries"], 0);
}

#[test]
fn errors_name_the_file_the_fix_and_the_cause() {
    let lab = Lab::new();
    let acme = lab.path("acme");
    let none = lab.run(&["check"]);
    assert!(
        none.error(2, "there is no fleet here")["help"].as_str().is_some_and(|help| help.contains("bakehouse init"))
    );
    lab.run(&["init", &acme]).result();

    // The same shape for a valid and an invalid file; a diagnostic has no line 0.
    let check = lab.run(&["check"]);
    assert!(check.result()["nodes"].is_array() && check.last()["warnings"] == check.result()["warnings"]);
    let toml = lab.dir.path().join("acme/fleet.toml");
    let valid = fs::read_to_string(&toml).expect("a file");
    fs::write(&toml, valid.replacen("count = 3", "cuont = 3", 1)).expect("a file");
    let check = lab.run(&["check"]);
    let error = check.error(2, "cuont");
    let diagnostic = &error["diagnostics"][0];
    assert!(diagnostic["line"].as_u64().is_some_and(|line| line > 0) && diagnostic["severity"] == "error", "{error}");
    assert_eq!(error["help"], diagnostic["help"]);
    fs::write(&toml, valid).expect("a file");

    lab.run(&["build"]).error(1, "does not exist");
    let exec = lab.run(&["exec", "hub-1", "--", "true"]);
    let error = exec.error(1, "does not run on this host");
    let help = error["help"].as_str().expect("a fix");
    assert!(help.starts_with("`bakehouse up hub-1` starts it as a local machine; `bakehouse operator add"), "{help}");
    // An error of the system is also a cause.
    let unwritable = lab.run(&["ticket", "hub-1", "-o", "/proc/no-such/ticket"]);
    let error = unwritable.error(1, "No such file or directory");
    assert!(error["causes"][0].as_str().is_some_and(|cause| cause.starts_with("No such file")), "{error}");
}

/// A colleague has the operator's file and the key, and neither fleet.toml nor fleet.key.
#[test]
fn an_operators_file_is_enough_to_reach_a_fleet() {
    let lab = Lab::new();
    let acme = lab.path("acme");
    lab.run(&["init", &acme]).result();
    let toml = lab.dir.path().join("acme/fleet.toml");
    let text = fs::read_to_string(&toml).expect("a file");
    // Nothing listens there.
    let nowhere = text.replace("hub1.example.net", "127.0.0.1").replace("hub2.example.net", "127.0.0.2");
    fs::write(&toml, nowhere.replace("hub3.example.net", "127.0.0.3")).expect("a file");
    let (there, own) = (lab.path("colleague"), lab.path("colleague/anna.operator"));
    let none = lab.run_in(Path::new(&there), &["status"]);
    assert!(none.error(1, "no operator's file")["help"].as_str().is_some_and(|help| help.contains("--operator FILE")));

    lab.run(&["operator", "request", "anna", "-o", &there]).result();
    let request = format!("{there}/anna.request");
    let added = lab.run(&["operator", "add", "anna", "--role", "viewer", "--request", &request, "-o", &there]);
    let result = added.result();
    assert_eq!((&result["role"], &result["secret"], &result["path"]), (&"viewer".into(), &false.into(), &own.into()));
    let listed = lab.run(&["operator", "list"]);
    assert_eq!((&listed.result()[0]["key"], &listed.result()[0]["state"]), (&result["key"], &"good".into()));

    // The file alone names the hubs.
    let status = lab.run_in(Path::new(&there), &["status"]);
    status.error(1, "no hub answers");
    assert!(status.err.contains("hub-1 (127.0.0.1:51820)"), "{}", status.err);
    let unknown = lab.run_in(Path::new(&there), &["logs", "db-9"]);
    unknown.error(2, "there is no node `db-9`");

    // A second file beside it is ambiguous. The operator selects one.
    lab.run(&["operator", "add", "ben", "--role", "admin", "-o", &there]).result();
    let two = lab.run_in(Path::new(&there), &["status"]);
    two.error(2, "2 operators' files");
    let ben = format!("{there}/ben.operator");
    lab.run_in(Path::new(&there), &["status", "--operator", &ben]).error(1, "no hub answers");
    // A file with a valid key of an operator is never replaced.
    lab.run(&["operator", "add", "ben", "--role", "admin", "-o", &there]).error(1, "may have the only copy of a key");
    // A file that was made here for another person is not used, and the owner's own one is.
    let acme_dir = Path::new(&acme);
    lab.run(&["operator", "add", "dora", "--role", "viewer", "-o", &acme]).result();
    let none = lab.run(&["status"]);
    none.error(1, "dora.operator was made for another person or machine");
    lab.run(&["operator", "add", "me", "--role", "viewer", "--own"]).result();
    assert!(lab.dir.path().join("config/bakehouse/acme.operator").is_file());
    lab.run_in(acme_dir, &["status"]).error(1, "no hub answers");
    let short = lab.run(&["operator", "revoke", "carl"]);
    assert!(short.error(1, "no valid certificate")["help"].as_str().is_some_and(|help| help.contains("operator list")));
    // Keys of certificates that are not in the log.
    for args in
        [&["--file", &ben][..], &["--file", &request], &["anna", "--key", result["key"].as_str().expect("a key")]]
    {
        let args = [&["operator", "revoke", "--yes"], args, &NOWHERE[..]].concat();
        lab.run(&args).error(1, "no hub accepts the order");
    }
    lab.run(&["operator", "revoke", "anna", "--key", "x"]).error(2, "not the base64");
    // An order that cannot be taken back needs consent, and there is no terminal here.
    lab.run(&["operator", "revoke", "--file", &ben]).error(2, "needs your consent");
}

#[test]
fn pages_match_the_types_of_results() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs");
    let schema = serde_json::to_string_pretty(&json_schema()).expect("JSON") + "\n";
    for (name, text) in [("json.schema.json", schema), ("json.md", json_page())] {
        let page = docs.join(name);
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            fs::write(&page, &text).expect("docs/ is writable");
        }
        let written = fs::read_to_string(&page).unwrap_or_default();
        assert!(written == text, "docs/{name} differs from builder/src/cli/results.rs: UPDATE_GOLDEN=1 writes it");
    }
}

#[test]
fn secret_is_stored_encrypted_and_can_be_removed() {
    let lab = Lab::new();
    let acme = lab.path("acme");
    lab.run(&["init", &acme]).result();
    let (toml, sealed) = (format!("{acme}/fleet.toml"), format!("{acme}/alerts.secrets"));
    let fleet = fs::read_to_string(&toml).expect("a fleet");
    let email =
        "\n[alerts.email]\nto = \"a@acme.com\"\nfrom = \"f@acme.com\"\nsmarthost = \"m.acme.com:587\"\nuser = \"u\"\n";
    fs::write(&toml, fleet + email).expect("a folder");
    let warns = || lab.run(&["check"]).last().to_string().contains("the secret `email` is missing");
    assert!(warns());
    // Without standard input, the secret is empty.
    assert_ne!(lab.run(&["secret", "email"]).status, 0);
    let mut command = Command::new(env!("CARGO_BIN_EXE_bakehouse"));
    let command = command.args(["--json", "-C", &acme, "secret", "email"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().expect("bakehouse starts");
    child.stdin.take().expect("a pipe").write_all(b"hunter2\n").expect("bakehouse reads");
    let done = child.wait_with_output().expect("bakehouse ends");
    let out = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(done.status.success() && !out.contains("hunter2"), "{out}");
    let file = fs::read_to_string(&sealed).expect("the file exists");
    assert!(file.contains("email = ") && !file.contains("hunter2"), "{file}");
    assert!(!warns());
    let key = fs::read_to_string(format!("{acme}/fleet.key")).expect("a key");
    let key: Value = serde_json::from_str(&key).expect("JSON");
    let key = fleet::AlertKey::derive(key["secrets"]["etcd_root"].as_str().expect("a password")).expect("a key");
    let secrets = fleet::AlertSecrets::parse(&file).expect("the file parses");
    assert_eq!(secrets.open(&key, "acme", "email").as_deref(), Some("hunter2"));
    assert_eq!(lab.run(&["secret", "email", "--remove"]).result()["stored"], false);
    assert!(warns());
}
