//! Programs of the images' packages, for tests that run them on this host.

use std::path::PathBuf;
use std::process::Command;

use builder::packages::lock::Lock;
use builder::project::Project;

use crate::{TestFleet, shared_store};

/// Unpacks packages that the fleet `ha` locks, and returns the folder. `lab` is the name of the test's fleet.
#[must_use]
pub fn unpack(lab: &str, packages: &[&str]) -> PathBuf {
    let lab = TestFleet::of_fleet(lab, "ha");
    lab.ok(&["fetch"]);
    let lock = Lock::load(&Project::load(&lab.dir).expect("a valid fleet.toml")).expect("a lock");
    let unpacked = lab.dir.join("unpacked");
    for name in packages {
        let package = lock.packages.iter().find(|p| p.name == *name);
        let package = package.unwrap_or_else(|| panic!("the lock does not contain {name}"));
        let deb = shared_store().join("debs").join(&package.sha256);
        let done = Command::new("dpkg-deb").arg("-x").arg(deb).arg(&unpacked).status().expect("dpkg-deb");
        assert!(done.success(), "{name}");
    }
    unpacked
}
