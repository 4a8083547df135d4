//! Fuzz targets: each one passes untrusted bytes to a parser and checks invariants of the result.
//!
//! `fuzz/` runs them under libFuzzer. `tests/fast/fuzz.rs` runs them on the seeds and on damaged copies of the seeds,
//! with the stable toolchain.

use std::sync::LazyLock;

use builder::format::deb::{Deb, data_entries};
use firstboot::hub::token::verify;
use firstboot::node::trust::signed_by_root;
use fleet::blocks::{BLOCK, Blocks, missing, pieces};
use fleet::grubenv::Block;
use fleet::netboot::{Assignment, Key, NetbootMachine, ProgressReport, SealedTicket};
use fleet::node_api::{AuditEntry, AuditLog, AuditQuery, LONGEST_AUDIT_ENTRY};
use fleet::postgres::{self, Frames, Messages, PROTOCOL_3, startup};
use fleet::{
    Departure, Diagnostic, Fleet, Introduction, Issuer, JoinReply, JoinRequest, OverlayManifest, Peers, Profile,
    Profiles, Renewal, Report, RescueDisk, RescueTarget, Revocation, Rollout, RolloutRequest, SlotRecord, Ticket,
    Token, TokensRequest, Topology, UpdateLock, Verdict, encoding,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Name of a target, which is also the name of its seeds' folder, and its function.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: [Target; 17] = [
    ("age", age),
    ("audit", audit),
    ("dbus", dbus),
    ("deb", deb),
    ("elf", elf),
    ("etcd", etcd),
    ("fleet_toml", fleet_toml),
    ("grubenv", grubenv),
    ("join", join),
    ("netboot", netboot),
    ("pe", pe),
    ("postgres", postgresql),
    ("profile", profile),
    ("rescue", rescue),
    ("rollout", rollout),
    ("ticket", ticket),
    ("update", update),
];

/// Runs the target of this name.
///
/// # Panics
/// If no target has this name, or if the target finds a fault.
pub fn run(name: &str, bytes: &[u8]) {
    let (_, target) = TARGETS.iter().find(|(target, _)| *target == name).expect("a target of that name");
    target(bytes);
}

/// Checks that a decoded value is the same after it was encoded and decoded again.
fn round_trip<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(bytes: &[u8]) -> Option<T> {
    let value: T = serde_json::from_slice(bytes).ok()?;
    let written = serde_json::to_vec(&value).expect("a decoded value can be encoded");
    assert_eq!(serde_json::from_slice::<T>(&written).expect("an encoded value can be decoded"), value);
    Some(value)
}

/// Messages between nodes and hubs, and the token inside a join request.
fn join(bytes: &[u8]) {
    static ROOT: LazyLock<Issuer> = LazyLock::new(|| Issuer::root("acme").expect("randomness"));
    round_trip::<JoinReply>(bytes);
    round_trip::<Peers>(bytes);
    round_trip::<Introduction>(bytes);
    round_trip::<Renewal>(bytes);
    round_trip::<Departure>(bytes);
    round_trip::<Revocation>(bytes);
    round_trip::<TokensRequest>(bytes);
    round_trip::<SlotRecord>(bytes);
    if let Some(request) = round_trip::<JoinRequest>(bytes) {
        let root = ROOT.certificate();
        let signature = encoding::encode(bytes);
        assert!(verify(root, "acme", &request, bytes, &signature).is_err(), "accepts an unsigned token");
        // With the root's signature under the claims, `verify` reaches the request's own signature.
        let claims = request.token.claims.clone();
        let signed = encoding::encode(&ROOT.sign(claims.as_bytes()).expect("a key"));
        let request = JoinRequest { token: Token { claims, signature: signed }, ..request };
        assert!(verify(root, "acme", &request, bytes, &signature).is_err(), "accepts an unsigned request");
    }
}

/// Reports of nodes, and the decision about each report in any state of a rollout.
fn rollout(bytes: &[u8]) {
    static TOPOLOGY: LazyLock<Topology> = LazyLock::new(|| {
        let toml = b"name=\"x\"\n[groups]\nhub.count=3\ndb.count=2\napp.count=2\nmonitor.count=1\n";
        Topology::from_fleet(&Fleet::parse("f", toml).expect("a fleet"))
    });
    round_trip::<RolloutRequest>(bytes);
    round_trip::<UpdateLock>(bytes);
    let mut parts = bytes.splitn(2, |b| *b == b'\n');
    let report = parts.next().and_then(round_trip::<Report>);
    let state = parts.next().and_then(round_trip::<Rollout>).unwrap_or_default();
    let Some(report) = report else { return };
    for node in &TOPOLOGY.nodes {
        let verdict = state.decide(&TOPOLOGY, &node.name, &report);
        if let Verdict::Take(turn) = &verdict {
            assert_eq!(turn.slot, node.name, "gives a node another node's update lock");
            assert!(!state.denied.contains_key(&turn.to), "gives the update lock for a denied version");
            assert!(state.paused.is_none(), "gives the update lock while the rollout is paused");
            assert!(state.turn.is_none(), "gives the update lock twice");
        }
    }
}

/// Messages between machines that boot from the network and their server, and encrypted tickets.
fn netboot(bytes: &[u8]) {
    round_trip::<NetbootMachine>(bytes);
    round_trip::<ProgressReport>(bytes);
    round_trip::<Assignment>(bytes);
    if let Some(sealed) = round_trip::<SealedTicket>(bytes) {
        let key = Key::generate().expect("randomness");
        assert!(key.open(&sealed).is_err(), "decrypts a ticket with the wrong key");
    }
}

/// Tickets in a node's credentials.
fn ticket(bytes: &[u8]) {
    let Ok(ticket) = Ticket::parse(bytes) else { return };
    let written = serde_json::to_vec(&ticket).expect("a decoded value can be encoded");
    assert_eq!(Ticket::parse(&written).expect("an encoded value can be decoded"), ticket);
    if let Some(claims) = ticket.token().and_then(Token::read) {
        let _ = claims.public_key();
    }
}

/// Entries of the audit log, from a node, and queries, from an operator.
fn audit(bytes: &[u8]) {
    round_trip::<AuditQuery>(bytes);
    round_trip::<AuditLog>(bytes);
    if let Some(entries) = round_trip::<Vec<AuditEntry>>(bytes) {
        for entry in entries {
            // A hub refuses an entry with a long identifier.
            let fitted = AuditEntry { id: String::new(), ..entry }.fitted();
            assert!(fitted.size() <= LONGEST_AUDIT_ENTRY, "a fitted entry has {} bytes", fitted.size());
        }
    }
}

/// Messages of a PostgreSQL server, and start-up messages of a client. The first byte is the length of the parts in which
/// they arrive.
fn postgresql(bytes: &[u8]) {
    let Some((part, bytes)) = bytes.split_first() else { return };
    let part = usize::from(*part).max(1);
    let (mut frames, mut ended) = (Frames::default(), Some(Vec::new()));
    let (mut messages, mut found) = (Messages::new(bytes.len()), Vec::new());
    for chunk in bytes.chunks(part) {
        ended = ended.and_then(|mut all| {
            all.extend(frames.ended(chunk).ok()?);
            Some(all)
        });
        messages.feed(chunk);
        match messages.take() {
            Ok(new) => found.extend(new),
            Err(_) => break,
        }
    }
    if let Some(kinds) = ended {
        let expected: Vec<u8> = found.iter().map(|message| message.kind).collect();
        assert!(kinds.starts_with(&expected), "the proxy and the client disagree about messages");
    }
    for body in found.iter().map(|message| message.body.as_slice()).chain([bytes]) {
        if let Some(parameters) = postgres::parameters(body) {
            let written = startup(PROTOCOL_3, &parameters);
            assert_eq!(postgres::parameters(&written[8..]), Some(parameters), "parameters are not read back");
        }
        let (columns, row) = (postgres::columns(body), postgres::row(body));
        assert!(columns.is_none_or(|all| all.len() <= body.len()) && row.is_none_or(|all| all.len() <= body.len()));
        let _ = (postgres::report(body), postgres::text(body));
    }
}

/// Rescue disks, which anybody can attach to a machine.
fn rescue(bytes: &[u8]) {
    static ROOT: LazyLock<Issuer> = LazyLock::new(|| Issuer::root("acme").expect("randomness"));
    let Ok(disk) = RescueDisk::parse(bytes) else { return };
    let written = serde_json::to_vec(&disk).expect("a decoded value can be encoded");
    // The encoded form may be longer than a disk's content.
    if written.len() <= RescueDisk::LONGEST {
        assert_eq!(RescueDisk::parse(&written).expect("an encoded value can be decoded"), disk);
    }
    let root = ROOT.certificate();
    let target = RescueTarget { fleet: "acme", slots: &["db-1"], now: 1 };
    let is_signed = |message: &[u8], signature: &[u8]| signed_by_root(root, message, signature);
    assert!(disk.open(&target, is_signed).is_err(), "accepts an unsigned order");
    if let Ok(order) = disk.open(&target, |_, _| true) {
        assert_eq!((order.fleet.as_str(), order.node.as_str()), ("acme", "db-1"), "opens another node's console");
        assert!(order.expires > 1, "accepts an expired order");
    }
}

/// Block lists and hash trees of updates, from an untrusted HTTP server.
fn update(bytes: &[u8]) {
    let at = bytes.first().map_or(0, |b| usize::from(*b) * bytes.len() / 256);
    let (old, new) = bytes.split_at(at.min(bytes.len()));
    let read = |bytes: &[u8]| {
        let list = Blocks::from_list(bytes);
        if let Some(list) = &list {
            assert_eq!(list.list(), bytes, "a list changes when it is decoded and encoded");
        }
        list.or_else(|| Blocks::from_tree(bytes)).unwrap_or_else(|| Blocks::from_bytes(bytes))
    };
    let (old, new) = (read(old), read(new));
    let found = pieces(&old, &new);
    let mut next = 0;
    for piece in &found {
        assert_eq!(piece.at, next, "pieces leave a gap or overlap");
        assert!(piece.len > 0, "an empty piece");
        if let Some(here) = piece.here {
            assert!(here % BLOCK as u64 == 0 && here < old.size.next_multiple_of(BLOCK as u64), "beyond the old file");
        }
        next += piece.len;
    }
    assert_eq!(next, new.size, "pieces do not cover the file");
    assert!(missing(&found) <= new.size);
}

/// Debian packages.
fn deb(bytes: &[u8]) {
    let Ok(deb) = Deb::parse(bytes.to_vec()) else { return };
    let _ = deb.info_name();
    let mut entries = 0;
    let _ = data_entries(&deb, |path, _| {
        assert!(path.starts_with('/') || !path.split('/').any(|part| part == ".."), "{path} leaves the tree");
        entries += 1;
        if entries < 1000 { Ok(()) } else { builder::error::fail("enough") }
    });
}

/// Boot stubs to which the builder appends an image's sections, and signatures that the signing tool returns.
fn pe(bytes: &[u8]) {
    let text = builder::assemble::uki::Text { cmdline: "roothash=0", os_release: "ID=x\n", uname: "6" };
    if let Ok(image) = builder::assemble::uki::build(bytes, b"kernel", b"initrd", &text, false) {
        assert!(image.starts_with(b"MZ"), "the output is not a PE file");
    }
    let _ = builder::format::efi_signature::signed_data(bytes);
}

/// Programs whose libraries the builder copies into an initrd.
fn elf(bytes: &[u8]) {
    let _ = builder::format::elf::needs(bytes);
}

/// A user's fleet.toml: parsed, checked, and expanded to a topology. Every diagnostic can be rendered.
fn fleet_toml(bytes: &[u8]) {
    let shown = |e: &Diagnostic| assert!(!e.render(false).is_empty());
    match Fleet::parse("fleet.toml", bytes) {
        Err(e) => shown(&e),
        Ok(fleet) => {
            let nodes: u32 = fleet.groups.values().map(|g| u32::from(*g.count.get_ref())).sum();
            if nodes > 64 {
                return;
            }
            fleet::lint(&fleet, &Profiles::new()).iter().for_each(shown);
            let topology = Topology::from_fleet(&fleet);
            let _ = fleet::ha_table(&topology);
            let written = serde_json::to_vec(&topology).expect("a topology can be encoded");
            assert_eq!(serde_json::from_slice::<Topology>(&written).expect("and decoded"), topology);
        }
    }
}

/// A user's profiles and overlay manifests.
fn profile(bytes: &[u8]) {
    if let Err(e) = Profile::parse("profile.toml", bytes) {
        assert!(!e.render(false).is_empty());
    }
    if let Err(e) = OverlayManifest::parse("overlay.toml", bytes) {
        assert!(!e.render(false).is_empty());
    }
}

/// GRUB's environment block.
fn grubenv(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let block = Block::parse(text);
    if let Ok(written) = block.render() {
        let again = Block::parse(std::str::from_utf8(&written).expect("a block is text"));
        assert_eq!(again.render().expect("a block can be rendered"), written, "a parsed block renders differently");
    }
}

/// `fleet.key`, encrypted with age.
fn age(bytes: &[u8]) {
    // Skips scrypt work factors above 10, which take seconds.
    let costly = bytes.windows(4).filter(|w| w.starts_with(b" 1") && w[2].is_ascii_digit()).count() > 0
        || bytes.windows(3).any(|w| w[0] == b' ' && w[1].is_ascii_digit() && w[1] > b'1' && w[2].is_ascii_digit());
    if !costly {
        assert!(builder::format::age::open(bytes, "not the passphrase").is_err(), "a damaged file opens");
    }
}

/// Bodies of replies and signals that systemd sends over D-Bus.
fn dbus(bytes: &[u8]) {
    use zbus::zvariant::serialized::{Context, Data};
    use zbus::zvariant::{LE, OwnedObjectPath, OwnedValue};
    let data = Data::new(bytes, Context::new_dbus(LE, 0));
    let _ = data.deserialize::<(u32, OwnedObjectPath, String, String)>();
    let _ = data.deserialize::<OwnedObjectPath>();
    let _ = data.deserialize::<Vec<String>>();
    let _ = data.deserialize::<OwnedValue>();
}

/// Replies of etcd's gateway, and lines of a watch.
fn etcd(bytes: &[u8]) {
    let _ = firstboot::client::etcd::pairs(bytes);
    if let Ok(Some(changes)) = firstboot::client::etcd::changes(bytes) {
        assert!(changes.len() <= bytes.len(), "more changes than bytes");
    }
}
