//! A network namespace for each test, so that tests use the same ports in parallel.

use std::future::Future;
use std::panic::resume_unwind;
use std::process::Command;
use std::thread;

use nix::sched::{CloneFlags, unshare};

/// Runs a test in a network namespace of its own, with loopback only, on two threads. Needs root.
///
/// The kernel frees all ports of the namespace when the test ends. Without a namespace, an outgoing connection of
/// another test could take a port while the test restarts a hub or an etcd member that uses it.
///
/// # Panics
///
/// If the test panics, or without root.
pub fn in_own_network(test: impl Future<Output = ()> + Send) {
    // The first test downloads etcd, which the namespace does not permit.
    crate::etcd::binary();
    let run = || {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace: run the test as root");
        // Threads and processes that this thread starts from here on are in the namespace.
        let up = Command::new("ip").args(["link", "set", "lo", "up"]).status().expect("ip");
        assert!(up.success(), "cannot enable loopback");
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        runtime.expect("a runtime").block_on(test);
    };
    // Use a new thread, because with --test-threads=1 all tests run in the same thread.
    if let Err(panic) = thread::scope(|scope| scope.spawn(run).join()) {
        resume_unwind(panic);
    }
}
