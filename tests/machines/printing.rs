//! PDF files and mail of Odoo in a fleet of containers: an invoice through Odoo's report engine, ten at once, and too many
//! pages; a mail server that accepts and refuses.

use std::process::Command;

use bakehouse_tests::{CommandOutput, Machine, TestFleet, root};

use crate::mail;

const FLEET: &str = "name = \"printing\"\nversion = \"1\"\n\n[groups.all]\ncount = 1\nroles = [\"hub\", \"db\", \"app\"]\n\
                     endpoints = [\"all.example.net\"]\n\n[access]\nshell = true\n\n[odoo]\n\
                     languages = [\"vi\", \"ar\", \"zh_CN\"]\nmodules = [\"sale_management\", \"account\", \"stock\"]\n";

#[test]
fn containers_print_reports() {
    let lab = TestFleet::empty("printing");
    let endpoints = "endpoints = [\"all.example.net\"]\n";
    let fleet = FLEET.replace(endpoints, &format!("{endpoints}{}", mail::PACKAGES));
    lab.write("fleet.toml", &format!("{fleet}{}", mail::SETTINGS));
    mail::make_certificate(&lab, "server");
    lab.ok(&["lock"]);
    lab.init();
    mail::store_password(&lab);
    let node = Machine::for_node(&lab, "all-1");
    lab.ok(&["up", "--containers"]);
    // The node printed two pages before it was ready, and none of its units failed.
    assert!(node.ok("journalctl -b -u odoo-print-ready -o cat").contains("printed two pages in"));
    assert_eq!(node.ok("systemctl --failed --no-legend --plain"), "");
    // The renderer can neither reach the network nor read passwords.
    let exposure = node.exposure("odoo-print@x.service");
    assert!(exposure < 2.0, "{exposure}");

    let scripts = root().join("tests/machines");
    let made = lab.ok(&["odoo", "shell", "-f", scripts.join("print_data.py").to_str().expect("UTF-8")]).out;
    let ids = made.lines().find(|line| line.starts_with("invoice=")).expect("identifiers").to_owned();
    let status = lab.ok(&["status"]).out;
    let address = status.split_whitespace().find(|word| word.starts_with("https://127.")).expect("an address");
    let password = lab.odoo_password();
    let printed = Command::new("python3")
        .arg(scripts.join("print_reports.py"))
        .args([address, &password])
        .arg(&lab.dir)
        .args(ids.split_whitespace())
        .output()
        .expect("python3");
    let printed = CommandOutput::new(&printed);
    println!("{}", printed.out);
    assert_eq!(printed.status, 0, "{}", printed.err);
    // Each renderer ended with its job, and left no file.
    node.ok(
        "for i in $(seq 100); do systemctl list-units --no-legend --plain 'odoo-print@*' | grep -q . || exit 0; sleep 0.1; \
         done; systemctl list-units 'odoo-print@*'; exit 1",
    );
    mail::sends_mail(&lab, &node);
    lab.ok(&["down"]);
}
