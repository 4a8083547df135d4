//! Tests of the rules.

use super::*;

fn profiles() -> Profiles {
    let role = |text: &str| crate::Profile::parse("p", text.as_bytes()).unwrap();
    BTreeMap::from([
        ("base".to_owned(), role("")),
        ("hub".to_owned(), role("[[ports]]\nport=5000\nproto=\"tcp\"\nservice=\"haproxy\"\n")),
        ("db".to_owned(), role("conflicts.monitor = \"both eat the disk\"\ndisk.root = \"900M\"\n")),
        ("app".to_owned(), role("[[ports]]\nport=5000\nproto=\"tcp\"\nservice=\"other\"\n")),
        ("monitor".to_owned(), role("")),
    ])
}

fn errors(text: &str) -> Vec<String> {
    let fleet = Fleet::parse("fleet.toml", text.as_bytes()).unwrap();
    lint(&fleet, &profiles()).into_iter().filter(|d| d.severity == Severity::Error).map(|d| d.to_string()).collect()
}

const HUBS: &str = "name = \"acme\"\n[groups.hub]\ncount = 3\nendpoints = [\"a\", \"b\", \"c\"]\n";

#[test]
fn warns_about_the_only_vote() {
    let text = "name = \"acme\"\n[groups.hub]\ncount = 2\nendpoints = [\"a\", \"b\"]\n";
    let found = lint(&Fleet::parse("fleet.toml", text.as_bytes()).unwrap(), &profiles());
    assert!(found.iter().any(|d| d.severity == Severity::Warning && d.message.contains("only vote on hub-1")));
    assert!(errors(text).is_empty());
}

#[test]
fn missing_role_differs_from_role_of_one_node() {
    let text = format!("{HUBS}[groups.db]\ncount = 1\n[groups.monitor]\ncount = 1\n");
    let fleet = Fleet::parse("fleet.toml", text.as_bytes()).unwrap();
    let found = lint(&fleet, &profiles()).into_iter().map(|d| d.message);
    let found: Vec<String> = found.filter(|m| m.contains("role")).collect();
    assert_eq!(found, ["1 of role `db`: one failure stops it", "no node has the role `app`"]);
    let verdicts: Vec<&str> = ha_table(&Topology::from_fleet(&fleet)).iter().map(HaRow::verdict).collect();
    assert_eq!(verdicts, ["as recommended", "one failure stops it", "no node", "one failure stops it"]);
}

#[track_caller]
fn one(text: &str, line: usize, message: &str) {
    let found = errors(text);
    let prefix = if line == 0 { "fleet.toml: ".to_owned() } else { format!("fleet.toml:{line}: ") };
    assert!(
        found.len() == 1 && found[0].starts_with(&prefix) && found[0].contains(message),
        "expected {prefix}…{message}…, found {found:#?}"
    );
}

#[test]
fn valid_fleet_has_no_errors() {
    assert_eq!(errors(HUBS), Vec::<String>::new());
}

#[test]
fn each_rule_has_a_line_and_a_message() {
    one(&format!("{HUBS}[groups.db]\ncount = 2\nroles = [\"bd\"]\n"), 7, "did you mean `db`?");
    one(&format!("{HUBS}[groups.db]\ncount = 2\nfirst = \"10.10.0.3\"\n"), 7, "would both have 10.10.0.3");
    one(&format!("{HUBS}[groups.db]\ncount = 2\nfirst = \"10.10.1.3\"\n"), 7, "outside the mesh");
    one(&format!("{HUBS}[vip]\naddress = \"10.9.0.1\"\n"), 6, "the VIP 10.9.0.1");
    one(&HUBS.replacen("acme", "slots", 1), 1, "the hubs use `/bakehouse/slots/` in etcd");
    // Database nodes may write below `/bakehouse/NAME/`.
    one(&HUBS.replacen("acme", "operators", 1), 1, "the hubs use `/bakehouse/operators/` in etcd");
    one(&format!("{HUBS}[netboot]\nothers = \"app\"\n"), 6, "no node or group `app`");
    one(&format!("{HUBS}[netboot.machines]\n\"52:54:00:AA:BB:CC\" = \"hub-1\"\n"), 6, "not a MAC address");
    one(
        &format!("{HUBS}[netboot.machines]\nA1 = \"hub-1\"\nA2 = \"hub-1\"\n"),
        7,
        "two machines have the node `hub-1`",
    );
    one(&format!("{HUBS}[netboot]\ndiskless = [\"app\"]\n"), 6, "no group `app`");
    one(
        &format!(
            "{HUBS}[update]\nurl = \"http://a.example/\"\n[netboot]\ndiskless = [\"app\"]\n\
             [groups.app]\ncount = 2\n"
        ),
        8,
        "take no updates",
    );
    one(&format!("{HUBS}[netboot]\ndiskless = [\"hub\"]\n"), 6, "hub-1 has an etcd vote");
    one(&format!("{HUBS}[vip]\naddress = \"10.10.0.2\"\n"), 2, "hub-2 and the VIP");
    one(&format!("{HUBS}[mesh]\ntransport = \"10.10.0.0/24\"\n"), 6, "overlaps");
    one(&format!("{HUBS}[mesh]\noperators = \"10.12.0.0/26\"\n"), 6, "not a part of the mesh");
    one(&format!("{HUBS}[mesh]\noperators = \"10.10.0.0/26\"\n"), 6, "has 10.10.0.1, the address of hub-1");
    one(&format!("{HUBS}[mesh]\noperators = \"10.10.0.96/28\"\n"), 6, "the address of the VIP");
    one(&format!("{HUBS}[mesh]\noperators = \"10.10.0.200/31\"\n"), 6, "at least 4 addresses");
    one(&format!("{HUBS}[groups.a]\ncount = 1\nroles = [\"db\", \"monitor\"]\n"), 7, "both eat the disk");
    one(
        &format!(
            "{HUBS}[groups.a]\ncount = 1\nroles = [\"hub\", \"app\"]\nfirst = \"10.10.0.9\"\nendpoints = [\"d\"]\n"
        ),
        7,
        "both use tcp port 5000",
    );
    one(&format!("{HUBS}[image]\nroot_size = \"500M\"\n[groups.db]\ncount = 2\n"), 6, "role `db` needs 900M");
    one(&format!("{HUBS}[image]\nroot_size = \"big\"\n"), 6, "not a size");
    one("name = \"acme\"\n[groups.hub]\ncount = 3\nendpoints = [\"a:1\", \"b\", \"c\"]\n", 4, "neither a host name");
    one("name = \"acme\"\n[groups.hub]\ncount = 3\nendpoints = [\"a\"]\n", 4, "3 hubs and 1 endpoints");
    one("name = \"acme\"\nversion = \"1_2\"\n[groups.hub]\ncount = 1\nendpoints = [\"a\"]\n", 2, "image's version");
    one("name = \"Acme\"\n[groups.hub]\ncount = 1\nendpoints = [\"a\"]\n", 1, "fleet's name");
    one("name = \"acme\"\n", 0, "no groups");
    one(&format!("{HUBS}[database]\nttl = 19\n"), 6, "less than Patroni allows");
    one(&format!("{HUBS}[database]\nloop_wait = 10\n"), 6, "22 s, more than ttl (20 s)");
    one(&format!("{HUBS}[promise]\ndatabase = 8\n"), 6, "it may take 25 s");
    one(&format!("{HUBS}[odoo]\nlanguages = [\"German\"]\n"), 6, "not a language");
    one(&format!("{HUBS}[odoo]\ndatabase = \"my db\"\n"), 6, "database's name");
    one(&format!("{HUBS}[alerts]\nwebhooks = [\"me@example.net\"]\n"), 6, "not an address");
    one(
        &format!("{HUBS}[firewall]\nopen = [{{ port = 22, proto = \"tcp\", role = \"hud\" }}]\n"),
        6,
        "did you mean `hub`?",
    );
}

#[test]
fn unknown_key_has_line_caret_and_suggestion() {
    let e = Fleet::parse("fleet.toml", b"name = \"x\"\n[groups.hub]\ncuont = 3\n").unwrap_err();
    let shown = e.render(false);
    assert_eq!(e.line, 3);
    assert!(shown.contains("fleet.toml:3") && shown.contains("^^^^^"), "{shown}");
    assert!(shown.contains("did you mean `count`?"), "{shown}");
}

#[test]
fn wrong_type_has_a_line() {
    let e = Fleet::parse("fleet.toml", b"name = \"x\"\n[groups.hub]\ncount = \"three\"\n").unwrap_err();
    assert_eq!(e.line, 3);
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(512))]

    #[test]
    fn parse_never_panics(bytes: Vec<u8>) {
        if let Err(e) = Fleet::parse("fleet.toml", &bytes) {
            drop(e.render(false));
        }
    }

    /// A real file with a replaced slice reaches more of the parser than random bytes.
    #[test]
    fn parse_and_lint_never_panic_on_mutations(
        at in 0usize..200,
        len in 0usize..40,
        with in "[ -~\n]{0,30}|[0-9]{1,12}|\\PC{0,8}",
    ) {
        let text = format!(
            "{HUBS}[mesh]\nsubnet = \"10.10.0.0/24\"\ntransport = \"10.11.0.0/24\"\n\
             [groups.db]\ncount = 2\nfirst = \"10.10.0.10\"\n"
        );
        let at = at.min(text.len());
        let end = (at + len).min(text.len());
        let mutated = format!("{}{with}{}", &text[..at], &text[end..]);
        match Fleet::parse("fleet.toml", mutated.as_bytes()) {
            Ok(fleet) => lint(&fleet, &profiles()).iter().for_each(|d| drop(d.render(false))),
            Err(e) => drop(e.render(false)),
        }
    }
}
