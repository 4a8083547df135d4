//! Mail of Odoo in a running fleet of containers: STARTTLS, login, refusals of a real mail server, and the mail domain in
//! the database. `printing.rs` starts the fleet.

use std::fs;
use std::io::Write as _;
use std::process::{Command, Stdio};

use bakehouse_tests::{Machine, TestFleet, root};
use serde_json::Value;

/// Settings of the fleet. The node has its own mail server.
pub(crate) const SETTINGS: &str = "\n[odoo.mail]\nsmarthost = \"localhost:2525\"\nuser = \"odoo@acme.example\"\nca = \"server.crt\"\n\
     from = \"erp@acme.example\"\ndomain = \"acme.example\"\nbounce = \"returned\"\nfrom_filter = [\"acme.example\"]\n";
/// Package of the mail server.
pub(crate) const PACKAGES: &str = "packages = [\"python3-aiosmtpd\"]\n";
const PASSWORD: &str = "p;ss w0rd%(x)s";
/// Folder of the mail server on the node.
const FOLDER: &str = "/run/mail-server";

/// Makes the certificate of the mail server, which is also that of its authority.
pub(crate) fn make_certificate(lab: &TestFleet, name: &str) {
    let mut openssl = Command::new("openssl");
    openssl.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30"]);
    openssl.args(["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]);
    openssl.args(["-keyout", &format!("{name}.key"), "-out", &format!("{name}.crt")]);
    let done = openssl.current_dir(&lab.dir).stderr(Stdio::null()).status().expect("openssl");
    assert!(done.success());
}

/// Stores the password.
pub(crate) fn store_password(lab: &TestFleet) {
    let mut secret = lab.command(&["secret", "odoo_mail"]).stdin(Stdio::piped()).spawn().expect("bakehouse");
    let mut input = secret.stdin.take().expect("a pipe");
    writeln!(input, "{PASSWORD}").expect("bakehouse reads");
    drop(input);
    assert!(secret.wait().expect("bakehouse").success());
    assert!(!lab.read("odoo.secrets").contains(PASSWORD));
}

/// Tests mail on a node.
pub(crate) fn sends_mail(lab: &TestFleet, node: &Machine) {
    let server = fs::read_to_string(root().join("tests/machines/mail_server.py")).expect("the mail server");
    node.ok(&format!("mkdir -p {FOLDER} && chmod 700 {FOLDER}"));
    put(node, "mail_server.py", &server);
    put(node, "password", PASSWORD);
    start(lab, node, "server");

    // A test mail, and a mail of Odoo. Both have TLS, a login and the address to which mail servers return them.
    let done = lab.ok(&["mail", "test", "anna@acme.example"]);
    assert!(done.out.contains("localhost:2525 has accepted a mail from erp@acme.example to anna@acme.example"));
    let script = "mail = env['mail.mail'].create({'subject': 'Invoice', 'email_to': 'ben@acme.example', 'body_html': \
                  'x', 'email_from': 'Somebody <me@elsewhere.example>'})\nmail.send(raise_exception=True)";
    lab.ok(&["odoo", "shell", "-c", script]);
    for (number, to, subject) in [(0, "anna", "Subject: Test mail of Bakehouse"), (1, "ben", "Subject: Invoice")] {
        let mail: Value = serde_json::from_str(&node.ok(&format!("cat {FOLDER}/mail-{number}.json"))).expect("a mail");
        assert_eq!((&mail["tls"], &mail["login"]), (&true.into(), &"odoo@acme.example".into()), "{mail}");
        assert_eq!(mail["to"], serde_json::json!([format!("{to}@acme.example")]), "{mail}");
        assert_eq!(mail["from"], "returned@acme.example", "{mail}");
        let content = mail["content"].as_str().expect("a text");
        // `from_filter` does not have the sender of the second mail.
        assert!(content.contains(subject) && content.contains("erp@acme.example"), "{content}");
    }

    // The fleet names the domain and the bounce address, and leaves the catch-all address to Odoo.
    let query = "select d.name, d.bounce_alias, d.catchall_alias, d.default_from from mail_alias_domain d join \
                 res_company c on c.alias_domain_id = d.id";
    let psql = format!("cd / && runuser -u postgres -- psql -XtA odoo -c \"{query}\"");
    assert_eq!(node.ok(&psql), "acme.example|returned|catchall|erp@acme.example");

    // The certificate is verified, a refusal is shown word for word, and the exit code is 1.
    make_certificate(lab, "other");
    start(lab, node, "other");
    refused(lab, "anna@acme.example", &["(certificate)", "self-signed certificate", "`ca`"]);
    start(lab, node, "server");
    let unknown = "(recipient): 550 5.1.1 <unknown@acme.example>: Recipient address rejected: User unknown in local \
                   recipient table";
    refused(lab, "unknown@acme.example", &[unknown, "make sure that the address exists"]);
    put(node, "password", "another");
    let login = "(login): 535 5.7.8 Error: authentication failed: authentication failure";
    refused(lab, "anna@acme.example", &[login, "`bakehouse secret odoo_mail`"]);
    let done = lab.run(&["mail", "test", "anna@acme.example", "--json"]);
    assert_eq!((done.status, &done.result()["step"]), (1, &"login".into()));
    node.ok("systemctl stop mail-server");
    refused(lab, "anna@acme.example", &["(connection): Connection refused", "`smarthost`"]);
    assert!(lab.ok(&["audit", "--since", "1h"]).out.contains("mail test to unknown@acme.example"));
    // Only root and Odoo's services have the password.
    assert_eq!(node.ok("stat -c '%a %U' /run/bakehouse/odoo.conf"), "600 root");
    let journal = "journalctl -b --no-pager -o cat -u 'odoo-*' -u 'bakehouse-*'";
    assert_eq!(node.exec(&format!("{journal} | grep -cF '{PASSWORD}'")).output.trim(), "0");
}

/// Starts the mail server with a certificate of the fleet's folder.
fn start(lab: &TestFleet, node: &Machine, certificate: &str) {
    node.exec("systemctl stop mail-server");
    put(node, "server.crt", &lab.read(&format!("{certificate}.crt")));
    put(node, "server.key", &lab.read(&format!("{certificate}.key")));
    let python = format!("python3 {FOLDER}/mail_server.py {FOLDER} 2525");
    node.ok(&format!("systemd-run --collect --unit=mail-server {python}"));
    node.ok("for i in $(seq 100); do ss -Hltn sport = :2525 | grep -q . && exit; sleep 0.1; done; exit 1");
}

fn put(node: &Machine, name: &str, text: &str) {
    node.ok(&format!("cat >{FOLDER}/{name} <<'END-OF-FILE'\n{}\nEND-OF-FILE", text.trim_end()));
}

fn refused(lab: &TestFleet, to: &str, expected: &[&str]) {
    let done = lab.run(&["mail", "test", to]);
    assert_eq!(done.status, 1, "{}{}", done.out, done.err);
    for text in expected {
        assert!(done.out.contains(text), "{}{}\n  instead of {text}", done.out, done.err);
    }
}
