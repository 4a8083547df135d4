//! The fleet key: `bakehouse init`, tickets that it signs, and its passphrase.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use bakehouse_tests::{CommandOutput, TestFleet};

#[test]
fn init_creates_the_fleet_key_once_and_it_signs_tickets() {
    let lab = TestFleet::empty("tickets");
    let dir = &lab.dir;
    let path = dir.to_str().expect("a UTF-8 path");
    lab.run(&["init", path, "--from", "no-such"]).fails(2, &["there is no built-in fleet `no-such`", "quick-ha"]);
    let invalid = dir.join("Acme_Corp");
    let name = invalid.to_str().expect("a UTF-8 path");
    lab.run(&["init", name]).fails(2, &["`Acme_Corp` cannot be a fleet's name", "lower-case letters"]);
    assert!(!invalid.exists(), "init left a folder with an invalid name");
    lab.run(&["check"]).fails(2, &["there is no fleet here", "`bakehouse init DIR`"]);
    let inside = lab.command(&["init", "."]).current_dir(dir).status();
    assert!(inside.expect("bakehouse starts").success());
    let key = fs::read(dir.join("fleet.key")).expect("a key");
    assert_eq!(fs::metadata(dir.join("fleet.key")).expect("a key").permissions().mode() & 0o777, 0o600);
    fs::write(dir.join("fleet.toml"), lab.read("fleet.toml") + "\n# mine\n").expect("the lab is writable");
    assert!(lab.ok(&["init", path]).err.contains("has all its files already"));
    assert!(lab.read(".gitignore").contains("*.key\n*.ticket\n"));
    assert_eq!(fs::read(dir.join("fleet.key")).expect("a key"), key, "init replaced the fleet key");
    assert!(lab.read("fleet.toml").contains("name = \"tickets\"") && lab.read("fleet.toml").ends_with("# mine\n"));

    let ticket = |args: &[&str]| lab.run(&[&["ticket"], args].concat());
    let founder = ticket(&["hub-1", "--endpoint", "hub-2=192.0.2.2"]).out;
    let founder = fleet::Ticket::parse(founder.as_bytes()).expect("a ticket");
    assert_eq!(founder.endpoints["hub-2"], "192.0.2.2");
    assert!(matches!(founder.right, fleet::Credential::Founder(f) if f.slot == "hub-1" && f.replaces.is_none()));
    let joiner = fleet::Ticket::parse(ticket(&["app", "--uses", "5"]).out.as_bytes()).expect("a ticket");
    let fleet::Credential::Joiner(joiner) = joiner.right else { panic!("app has founders' tickets") };
    assert_eq!(joiner.token.read().expect("claims").uses, 5);
    let file = dir.join("hub-1.ticket");
    assert_eq!(ticket(&["hub-1", "-o", file.to_str().expect("a UTF-8 path")]).out, "");
    assert_eq!(fs::metadata(&file).expect("a ticket").permissions().mode() & 0o777, 0o600);
    fleet::Ticket::parse(&fs::read(&file).expect("a ticket")).expect("a ticket");
    ticket(&["hub-1", "--uses", "2"]).fails(2, &["hub-1 is a founder", "leave out --uses and --days"]);
    ticket(&["app", "--days", "0"]).fails(2, &["0 is not in 1.."]);
    lab.run(&["console", "hub-1"]).fails(1, &["hub-1 has no console here", "bakehouse up hub-1"]);
    lab.run(&["exec", "hub-1", "--", "true"]).fails(1, &["hub-1 does not run on this host"]);
    lab.run(&["report"]).fails(1, &["no machine of the fleet runs on this host"]);
    ticket(&["hub"]).fails(2, &["each has a ticket of its own"]);
    ticket(&["app", "--endpoint", "db-1=x"]).fails(2, &["`db-1=x` is not HUB=HOST"]);
    // tickets.jsonl records joiners' tickets. Only hubs know how often each was used.
    let nowhere = ["hub-1", "hub-2", "hub-3"].map(|hub| format!("{hub}=127.0.0.1"));
    let ends = nowhere.each_ref().map(|at| ["--endpoint", at.as_str()]);
    let listed = ticket(&[&["--list", "--json"], ends.as_flattened()].concat());
    assert!(listed.status == 0 && listed.err.contains("cannot list how often each ticket was used"), "{}", listed.err);
    let listed = listed.result();
    assert_eq!((listed.as_array().map(Vec::len), listed[0]["to"].as_str()), (Some(1), Some("app")), "{listed}");
    assert_eq!((listed[0]["uses"].as_u64(), listed[0]["state"].as_str()), (Some(5), Some("good")));
    assert!(!lab.read("tickets.jsonl").contains("PRIVATE"));
    fs::remove_file(dir.join("fleet.key")).expect("a key");
    ticket(&["app"]).fails(1, &["bakehouse init"]);
}

#[test]
fn encrypted_fleet_key_requires_its_passphrase() {
    let lab = TestFleet::empty("sealed");
    let path = lab.dir.to_str().expect("a UTF-8 path").to_owned();
    lab.write("right", "correct horse\n");
    lab.write("wrong", "battery staple\n");
    let run = |phrase: &str, args: &[&str]| {
        let mut command = lab.command(args);
        command.env("BAKEHOUSE_PASSPHRASE_FILE", lab.dir.join(phrase));
        CommandOutput::new(&command.output().expect("bakehouse starts"))
    };
    // `--passphrase` encrypts an existing key without changing it, and creates a new key encrypted.
    lab.ok(&["init", &path]);
    let public = fs::read(lab.dir.join("update-key.gpg")).expect("a keyring");
    let sealed =
        |bytes: &[u8]| bytes.starts_with(b"age-encryption.org/v1\n") && !bytes.windows(7).any(|w| w == b"PRIVATE");
    for made in [false, true] {
        if made {
            fs::remove_file(lab.dir.join("fleet.key")).expect("a key");
        }
        let said = run("right", &["init", &path, "--passphrase"]);
        assert_eq!(said.status, 0, "{}", said.err);
        let key = lab.dir.join("fleet.key");
        assert!(sealed(&fs::read(&key).expect("a key")), "the key is not encrypted, new key: {made}");
        assert_eq!(fs::metadata(&key).expect("a key").permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read(lab.dir.join("update-key.gpg")).expect("a keyring") == public, !made);
        fleet::Ticket::parse(run("right", &["ticket", "hub-1"]).out.as_bytes()).expect("a ticket");
        run("wrong", &["ticket", "hub-1"]).fails(1, &["wrong passphrase of"]);
        run("missing", &["ticket", "hub-1"]).fails(1, &["cannot read", "missing"]);
    }
}
