//! Every fuzz target over its seeds, and over damaged copies of them, with the ordinary toolchain. `make fuzz` runs
//! the same targets under libFuzzer.

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
fn every_target_survives_its_seeds_and_damaged_copies_of_them() {
    for (name, target) in TARGETS {
        let seeds = seeds(name);
        assert!(!seeds.is_empty(), "{name} has no seeds");
        let mut runs = 0;
        for (_, seed) in &seeds {
            target(seed);
            // Cut short, and with single bytes changed, at up to 64 places each.
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

/// A seed that is refused at its first byte leads nowhere.
#[test]
fn seeds_are_read_to_their_end() {
    let accepts = |target: &str, reads: &dyn Fn(&[u8]) -> bool| {
        assert!(seeds(target).iter().any(|(_, seed)| reads(seed)), "no seed of {target} is read to its end");
    };
    accepts("ticket", &|b| fleet::Ticket::parse(b).is_ok());
    accepts("fleet_toml", &|b| fleet::Fleet::parse("f", b).is_ok());
    accepts("profile", &|b| fleet::Profile::parse("f", b).is_ok());
    accepts("profile", &|b| fleet::OverlayManifest::parse("f", b).is_ok());
    accepts("join", &|b| serde_json::from_slice::<fleet::JoinRequest>(b).is_ok());
    accepts("netboot", &|b| serde_json::from_slice::<fleet::netboot::Machine>(b).is_ok());
    accepts("update", &|b| fleet::blocks::Blocks::of_list(b).is_some());
    accepts("deb", &|b| builder::compose::deb::Deb::parse(b.to_vec()).is_ok());
    accepts("elf", &|b| builder::elf::needs(b).is_some());
}
