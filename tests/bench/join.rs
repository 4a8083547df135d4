//! Benchmark of joining: 3,000 nodes, each over a connection of its own, claim slots from three join APIs and three
//! real etcd members on this machine.

use std::time::{Duration, Instant};

use bakehouse_tests::site::{HUB_PORT, TestCluster, TestJoiner, granted, insist};
use tokio::task::JoinSet;

const NODES: usize = 3000;
/// Concurrent claims.
const AT_ONCE: usize = 64;

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let site = TestCluster::open(&format!("app.count = {NODES}\n"));
    let token = site.token("app", |c| c.uses = NODES as u32);
    let askers: Vec<TestJoiner> = (0..NODES).map(|_| TestCluster::asker(&token, "app")).collect();
    // The first claim waits for etcd's election, which is not part of the measurement.
    granted(site.insist(&askers[0], 0).await);
    let begun = Instant::now();
    let (mut asked, mut took) = (JoinSet::new(), Vec::new());
    for (i, asker) in askers.into_iter().enumerate().skip(1) {
        if asked.len() >= AT_ONCE {
            took.push(asked.join_next().await.expect("a running task").expect("the task succeeds"));
        }
        let root = site.root.certificate().to_owned();
        asked.spawn(async move {
            let begun = Instant::now();
            granted(insist(root, HUB_PORT, asker, i).await);
            begun.elapsed()
        });
    }
    took.extend(asked.join_all().await);
    let seconds = begun.elapsed().as_secs_f64();
    took.sort();
    let at = |percent: usize| took[(took.len() - 1) * percent / 100];
    let ms = |d: Duration| d.as_secs_f64() * 1e3;
    println!(
        "{} joins in {seconds:.1} s: {:.0} joins/s; median {:.0} ms, p99 {:.0} ms, longest {:.0} ms, {AT_ONCE} at once",
        took.len(),
        took.len() as f64 / seconds,
        ms(at(50)),
        ms(at(99)),
        ms(at(100)),
    );
}
