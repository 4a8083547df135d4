//! A network namespace for each test, so that tests use the same ports in parallel.

use std::future::Future;
use std::panic::resume_unwind;
use std::process::Command;
use std::thread;

use nix::sched::{CloneFlags, unshare};

/// Runs a test in a network namespace of its own, with loopback only, on two threads. Needs root.
///
/// The kernel frees all ports of the namespace when the test ends. Ports that a test reserved by binding port 0 could be
/// taken by another test's outgoing connection while a hub or an etcd member restarts.
///
/// # Panics
///
/// If the test panics, or without root.
pub fn in_own_network(test: impl Future<Output = ()> + Send) {
    let run = || {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace: run the test as root");
        // Threads and processes that this thread starts from here on are in the namespace.
        let up = Command::new("ip").args(["link", "set", "lo", "up"]).status().expect("ip");
        assert!(up.success(), "cannot enable loopback");
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        runtime.expect("a runtime").block_on(test);
    };
    // A thread of its own, because with --test-threads=1 tests share one.
    if let Err(panic) = thread::scope(|scope| scope.spawn(run).join()) {
        resume_unwind(panic);
    }
}
