//! Receiver of alerts, if `[alerts]` has an address of this host. It gets the notifications that people would get, and
//! the calls of the dead man's switch.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use fleet::Alerts;
use serde::Deserialize;
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Runtime};

use crate::error::{Error, Result};
use crate::util::http_server::{FileServer, serve};
use crate::vm::HostForward;

/// Alert that always fires.
const DEAD_MAN: &str = "DeadMan";

/// Receiver that listens until it is dropped.
pub(super) struct AlertReceiver {
    state: Arc<Mutex<AlertState>>,
    /// Whether a webhook for people leads to this host.
    pub people: bool,
    /// Whether the dead man's switch calls this host.
    pub dead_man: bool,
    _runtime: Runtime,
}

#[derive(Default)]
struct AlertState {
    /// Firing alerts: name and node.
    firing: BTreeSet<(String, String)>,
    called: Option<Instant>,
}

/// The part of Alertmanager's webhook message that the receiver reads.
#[derive(Deserialize)]
struct Message {
    alerts: Vec<Alert>,
}

#[derive(Deserialize)]
struct Alert {
    status: String,
    labels: BTreeMap<String, String>,
}

impl AlertReceiver {
    /// Starts a receiver. Returns `None` if `[alerts]` has no address of this host.
    ///
    /// # Errors
    /// If a port is in use.
    pub(super) fn listen(alerts: &Alerts) -> Result<Option<Self>> {
        let ports = HostForward::alert_ports(alerts);
        if ports.is_empty() {
            return Ok(None);
        }
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.map_err(Error::cannot("start the receiver's thread"))?;
        let state = Arc::<Mutex<AlertState>>::default();
        for port in ports {
            let at = (Ipv4Addr::LOCALHOST, port);
            let listener = runtime
                .block_on(TcpListener::bind(at))
                .map_err(Error::cannot(format!("listen at 127.0.0.1:{port} for the alerts of [alerts]")))?;
            let handler_state = state.clone();
            let handler = Box::new(move |_: &str, body: &[u8]| {
                let message: Message = serde_json::from_slice(body).map_err(Error::cannot("parse the alert"))?;
                locked(&handler_state).update(message);
                Ok(Vec::new())
            });
            runtime.spawn(serve(listener, Arc::new(FileServer { files: BTreeMap::new(), handler })));
        }
        let is_this_host = |url: &String| HostForward::port(url).is_some();
        Ok(Some(Self {
            state,
            people: alerts.webhooks.iter().any(is_this_host),
            dead_man: alerts.dead_man.as_ref().is_some_and(is_this_host),
            _runtime: runtime,
        }))
    }

    /// Returns the firing alerts: name and node.
    pub(super) fn firing(&self) -> BTreeSet<(String, String)> {
        locked(&self.state).firing.clone()
    }

    /// Returns the time of the last call of the dead man's switch.
    pub(super) fn called(&self) -> Option<Instant> {
        locked(&self.state).called
    }
}

fn locked(state: &Mutex<AlertState>) -> MutexGuard<'_, AlertState> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl AlertState {
    fn update(&mut self, message: Message) {
        for Alert { status, mut labels } in message.alerts {
            let mut label = |name: &str| labels.remove(name).unwrap_or_default();
            let alert = (label("alertname"), label("node"));
            if alert.0 == DEAD_MAN {
                self.called = Some(Instant::now());
            } else if status == "firing" {
                self.firing.insert(alert);
            } else {
                self.firing.remove(&alert);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn post(port: u16, body: &str) -> u16 {
        let agent = ureq::Agent::config_builder().http_status_as_error(false).build().new_agent();
        agent.post(format!("http://127.0.0.1:{port}/")).send(body).expect("a response").status().as_u16()
    }

    #[test]
    fn records_firing_and_resolved_alerts_and_calls_of_the_dead_man() {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let url = format!("http://192.0.2.100:{port}/");
        let alerts = Alerts { webhooks: vec![url], ..Alerts::default() };
        let receiver = AlertReceiver::listen(&alerts).unwrap().expect("the address is this host's");
        assert!(receiver.people && !receiver.dead_man);
        assert!(AlertReceiver::listen(&alerts).is_err(), "two receivers listen at one port");

        let alert = |status: &str, name: &str, node: &str| {
            format!(r#"{{"status":"{status}","labels":{{"alertname":"{name}","node":"{node}"}},"startsAt":"x"}}"#)
        };
        let notify = |alerts: &[String]| {
            post(port, &format!(r#"{{"version":"4","status":"firing","alerts":[{}]}}"#, alerts.join(",")))
        };
        assert_eq!(notify(&[alert("firing", "NodeDown", "hub-1"), alert("firing", "HubDown", "hub-1")]), 200);
        assert_eq!(receiver.called(), None);
        assert_eq!(notify(&[alert("resolved", "HubDown", "hub-1"), alert("firing", "DeadMan", "")]), 200);
        assert_eq!(receiver.firing(), BTreeSet::from([("NodeDown".to_owned(), "hub-1".to_owned())]));
        assert!(receiver.called().is_some());
        assert_eq!(post(port, "{}"), 400);
    }

    #[test]
    fn ignores_addresses_of_other_hosts() {
        let alerts = Alerts { dead_man: Some("https://dead-man.example.net/".into()), ..Alerts::default() };
        assert!(AlertReceiver::listen(&alerts).unwrap().is_none());
    }
}
