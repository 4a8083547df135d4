//! Connects this host to the virtual network of the machines, in a network namespace without a route out.

use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};

/// Moves this thread and its child processes into a new network namespace.
///
/// # Panics
/// If the process is not root.
pub fn enter() {
    unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace, as root");
    let up = Command::new("ip").args(["link", "set", "lo", "up"]).status().expect("ip");
    assert!(up.success());
}

/// Starts socat, which forwards frames between the interface `card` (`tap` in socat's syntax) and QEMU's multicast
/// socket `lan` (`group:port`).
///
/// # Panics
/// If socat is not installed.
#[must_use]
pub fn end(lan: &str, tap: &str, card: &str) -> Child {
    let (group, port) = lan.split_once(':').expect("an address and a port");
    let bridge = Command::new("socat")
        .arg(tap)
        .arg(format!(
            "UDP4-DATAGRAM:{lan},bind=:{port},reuseaddr,ip-add-membership={group}:127.0.0.1,\
             ip-multicast-if=127.0.0.1"
        ))
        .spawn()
        .expect("socat");
    let there = || Command::new("ip").args(["link", "show", card]).stderr(Stdio::null()).stdout(Stdio::null()).status();
    wait("socat's interface", || there().expect("ip").success());
    bridge
}

/// Waits at most 30 s for a condition that normally holds at once.
///
/// # Panics
/// If the condition does not hold by then.
pub fn wait(what: &str, is: impl Fn() -> bool) {
    let until = Instant::now() + Duration::from_secs(30);
    while !is() {
        assert!(Instant::now() < until, "{what} did not appear within 30 s");
        sleep(Duration::from_millis(50));
    }
}
