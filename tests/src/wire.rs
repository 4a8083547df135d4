//! This host's ends of a wire between machines, in a network namespace that nothing leads out of.

use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};

/// Takes this thread, and what it starts, into a namespace of its own.
///
/// # Panics
/// Not as root.
pub fn enter() {
    unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace, as root");
    let up = Command::new("ip").args(["link", "set", "lo", "up"]).status().expect("ip");
    assert!(up.success());
}

/// An end of the wire (`group:port`): frames go from the card, as socat names it, to the wire's
/// packets and back.
///
/// # Panics
/// There is no socat.
#[must_use]
pub fn end(wire: &str, tap: &str, card: &str) -> Child {
    let (group, port) = wire.split_once(':').expect("an address and a port");
    let bridge = Command::new("socat")
        .arg(tap)
        .arg(format!(
            "UDP4-DATAGRAM:{wire},bind=:{port},reuseaddr,ip-add-membership={group}:127.0.0.1,\
             ip-multicast-if=127.0.0.1"
        ))
        .spawn()
        .expect("socat");
    let there = || Command::new("ip").args(["link", "show", card]).stderr(Stdio::null()).stdout(Stdio::null()).status();
    wait("the wire's end", || there().expect("ip").success());
    bridge
}

/// Waits for something that comes at once.
///
/// # Panics
/// It does not.
pub fn wait(what: &str, is: impl Fn() -> bool) {
    let until = Instant::now() + Duration::from_secs(30);
    while !is() {
        assert!(Instant::now() < until, "{what} does not come");
        sleep(Duration::from_millis(50));
    }
}
