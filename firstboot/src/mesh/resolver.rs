//! Resolves the names of endpoints in background tasks, so that nothing waits for a name server.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::lookup_host;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use tracing::warn;

/// Interval of look-ups of a name.
const INTERVAL: Duration = Duration::from_secs(60);
/// Interval of look-ups of a name that has no address yet.
const RETRY: Duration = Duration::from_secs(5);
/// Time limit of a look-up. It is longer than the C library's time-out for three name servers that do not answer.
const TIMEOUT: Duration = Duration::from_secs(45);

/// Host name and port.
type Name = (String, u16);

/// Names, and the addresses of their last look-up.
pub(crate) struct Resolver {
    found: watch::Sender<BTreeMap<Name, Vec<SocketAddr>>>,
    changes: watch::Receiver<BTreeMap<Name, Vec<SocketAddr>>>,
    tasks: BTreeMap<Name, AbortHandle>,
}

impl Resolver {
    pub(crate) fn new() -> Self {
        let (found, changes) = watch::channel(BTreeMap::new());
        Self { found, changes, tasks: BTreeMap::new() }
    }

    /// Returns the last known addresses of a name without waiting. The first call starts the look-ups of the name.
    pub(crate) fn addresses(&mut self, name: &Name) -> Vec<SocketAddr> {
        if let Ok(address) = name.0.parse() {
            return vec![SocketAddr::new(address, name.1)];
        }
        if !self.tasks.contains_key(name) {
            let task = tokio::spawn(follow(name.clone(), self.found.clone()));
            self.tasks.insert(name.clone(), task.abort_handle());
        }
        self.changes.borrow().get(name).cloned().unwrap_or_default()
    }

    /// Waits until the addresses of a name change.
    pub(super) async fn changed(&mut self) {
        // The sender lives as long as `self`, so this cannot fail.
        let _ = self.changes.changed().await;
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        self.tasks.values().for_each(AbortHandle::abort);
    }
}

/// Looks a name up periodically. If a look-up fails, the name keeps its addresses.
async fn follow(name: Name, found: watch::Sender<BTreeMap<Name, Vec<SocketAddr>>>) {
    let mut logged = false;
    loop {
        let looked_up = timeout(TIMEOUT, lookup_host((name.0.as_str(), name.1))).await;
        let why = match looked_up {
            Ok(Ok(addresses)) => {
                let mut addresses: Vec<SocketAddr> = addresses.collect();
                addresses.dedup();
                if addresses.is_empty() {
                    "the name has no address".to_owned()
                } else {
                    found.send_if_modified(|all| {
                        let changed = all.get(&name) != Some(&addresses);
                        all.insert(name.clone(), addresses);
                        changed
                    });
                    logged = false;
                    sleep(INTERVAL).await;
                    continue;
                }
            }
            Ok(Err(e)) => e.to_string(),
            Err(_) => format!("no name server answered within {} s", TIMEOUT.as_secs()),
        };
        if !logged {
            warn!(peer = name.0, "look-up of the endpoint {} failed: {why}", name.0);
            logged = true;
        }
        let known = found.borrow().contains_key(&name);
        sleep(if known { INTERVAL } else { RETRY }).await;
    }
}

/// Selects one of the addresses of a name. An address stays in use while the name has it and its peer answers. The next
/// one follows it.
pub(super) fn choose(
    addresses: &[SocketAddr],
    used: Option<SocketAddr>,
    is_silent: impl Fn(SocketAddr) -> bool,
) -> Option<SocketAddr> {
    let Some(used) = used else { return addresses.first().copied() };
    match addresses.iter().position(|a| *a == used) {
        Some(at) if is_silent(used) => Some(addresses[(at + 1) % addresses.len()]),
        Some(_) => Some(used),
        None => addresses.first().copied().or(Some(used)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_stays_in_use_until_its_peer_is_silent() {
        let address = |last: u8| SocketAddr::from(([192, 0, 2, last], 51820));
        let all = [address(1), address(2), address(3)];
        let answers = |_| false;
        assert_eq!(choose(&all, None, answers), Some(address(1)));
        // The order of a name server's reply does not matter.
        assert_eq!(choose(&all, Some(address(2)), answers), Some(address(2)));
        assert_eq!(choose(&all, Some(address(2)), |_| true), Some(address(3)));
        assert_eq!(choose(&all, Some(address(3)), |_| true), Some(address(1)));
        // The name has other addresses, or no address.
        assert_eq!(choose(&all, Some(address(9)), answers), Some(address(1)));
        assert_eq!(choose(&[], Some(address(9)), answers), Some(address(9)));
        assert_eq!(choose(&[], None, answers), None);
    }

    #[tokio::test]
    async fn resolver_looks_up_names_but_not_addresses() {
        let mut resolver = Resolver::new();
        let literal = resolver.addresses(&("192.0.2.1".to_owned(), 51820));
        assert_eq!(literal, ["192.0.2.1:51820".parse().unwrap()]);
        assert!(resolver.tasks.is_empty());
        let name = ("localhost".to_owned(), 51820);
        assert!(resolver.addresses(&name).is_empty(), "the call waited for the look-up");
        resolver.changed().await;
        assert!(resolver.addresses(&name).iter().all(|a| a.ip().is_loopback()));
        assert_eq!(resolver.tasks.len(), 1);
    }
}
