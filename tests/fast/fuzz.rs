//! Runs every fuzz target on its seeds and on damaged copies of them, with the stable toolchain. `make fuzz` runs the
//! same targets under libFuzzer.

use std::fs;
use std::path::PathBuf;

use bakehouse_tests::root;
use bakehouse_tests::targets::TARGETS;

fn seeds(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let dir = root().join("fuzz/seeds").join(target);
    let entries = fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let mut paths: Vec<PathBuf> = entries.map(|e| e.expect("an entry").path()).collect();
    paths.sort();
    paths.into_iter().map(|path| (path.clone(), fs::read(path).expect("a seed"))).collect()
}

#[test]
fn targets_accept_seeds_and_damaged_copies() {
    for (name, target) in TARGETS {
        let seeds = seeds(name);
        assert!(!seeds.is_empty(), "{name} has no seeds");
        let mut runs = 0;
        for (_, seed) in &seeds {
            target(seed);
            // Truncations and single-byte changes at up to 64 offsets a seed.
            let step = seed.len().div_ceil(64).max(1);
            for at in (0..seed.len()).step_by(step) {
                target(&seed[..at]);
                for change in [0x01, 0x80, 0xff] {
                    let mut damaged = seed.clone();
                    damaged[at] ^= change;
                    target(&damaged);
                }
                runs += 4;
            }
        }
        println!("{name}: {} seeds, {runs} damaged copies", seeds.len());
    }
}

/// `make fuzz` takes the names of the seeds' folders.
#[test]
fn every_target_has_a_fuzz_binary() {
    let manifest = fs::read_to_string(root().join("fuzz/Cargo.toml")).expect("a manifest");
    for (name, _) in TARGETS {
        assert!(manifest.contains(&format!("[[bin]]\nname = \"{name}\"\n")), "fuzz/Cargo.toml has no binary `{name}`");
    }
}

/// The fuzzer finds no new paths from seeds that the parser rejects at the first byte.
#[test]
fn each_target_accepts_a_seed() {
    let accepts = |target: &str, reads: &dyn Fn(&[u8]) -> bool| {
        assert!(seeds(target).iter().any(|(_, seed)| reads(seed)), "{target} rejects all of its seeds");
    };
    accepts("ticket", &|b| fleet::Ticket::parse(b).is_ok());
    accepts("audit", &|b| serde_json::from_slice::<Vec<fleet::node_api::AuditEntry>>(b).is_ok());
    accepts("postgres", &|b| b.get(1..).is_some_and(|body| fleet::postgres::parameters(body).is_some()));
    accepts("rescue", &|b| fleet::RescueDisk::parse(b).is_ok());
    accepts("fleet_toml", &|b| fleet::Fleet::parse("f", b).is_ok());
    accepts("profile", &|b| fleet::Profile::parse("f", b).is_ok());
    accepts("profile", &|b| fleet::OverlayManifest::parse("f", b).is_ok());
    accepts("join", &|b| serde_json::from_slice::<fleet::JoinRequest>(b).is_ok());
    accepts("netboot", &|b| serde_json::from_slice::<fleet::netboot::NetbootMachine>(b).is_ok());
    accepts("update", &|b| fleet::blocks::Blocks::from_list(b).is_some());
    accepts("etcd", &|b| matches!(firstboot::client::etcd::changes(b), Ok(Some(changes)) if !changes.is_empty()));
    accepts("deb", &|b| builder::format::deb::Deb::parse(b.to_vec()).is_ok());
    accepts("elf", &|b| builder::format::elf::needs(b).is_some());
}
