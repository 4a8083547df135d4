//! Who is told of failures: the rehearsal itself, where `[alerts]` leads to this host. It hears what people would
//! hear, and is the one that the dead man's switch calls.

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

/// The rule that always fires.
const DEAD_MAN: &str = "DeadMan";

/// Listens as long as it is there.
pub(super) struct AlertReceiver {
    heard: Arc<Mutex<AlertState>>,
    /// People are told here.
    pub people: bool,
    /// The dead man's switch calls here.
    pub dead_man: bool,
    _runtime: Runtime,
}

#[derive(Default)]
struct AlertState {
    /// Alerts that fire, as far as was told: name and node.
    firing: BTreeSet<(String, String)>,
    called: Option<Instant>,
}

/// What Alertmanager posts, as far as it is read here.
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
    /// None where nobody is told on this host.
    ///
    /// # Errors
    /// Somebody else listens there.
    pub fn listen(alerts: &Alerts) -> Result<Option<Self>> {
        let ports = HostForward::told(alerts);
        if ports.is_empty() {
            return Ok(None);
        }
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.map_err(|e| Error::Failed(format!("no threads: {e}")))?;
        let heard = Arc::<Mutex<AlertState>>::default();
        for port in ports {
            let at = (Ipv4Addr::LOCALHOST, port);
            let listener = runtime.block_on(TcpListener::bind(at)).map_err(|e| {
                Error::Failed(format!("cannot listen at 127.0.0.1:{port}, where [alerts] tells of failures: {e}"))
            })?;
            let heard = heard.clone();
            let desk = Box::new(move |_: &str, body: &[u8]| {
                let message: Message = serde_json::from_slice(body).map_err(|e| e.to_string())?;
                locked(&heard).take(message);
                Ok(Vec::new())
            });
            runtime.spawn(serve(listener, Arc::new(FileServer { files: BTreeMap::new(), desk })));
        }
        let here = |url: &String| HostForward::port(url).is_some();
        Ok(Some(Self {
            heard,
            people: alerts.webhooks.iter().any(here),
            dead_man: alerts.dead_man.as_ref().is_some_and(here),
            _runtime: runtime,
        }))
    }

    /// Alerts that fire, as far as was told: name and node.
    pub fn firing(&self) -> BTreeSet<(String, String)> {
        locked(&self.heard).firing.clone()
    }

    /// When the dead man's switch called last.
    pub fn called(&self) -> Option<Instant> {
        locked(&self.heard).called
    }
}

fn locked(heard: &Mutex<AlertState>) -> MutexGuard<'_, AlertState> {
    heard.lock().unwrap_or_else(PoisonError::into_inner)
}

impl AlertState {
    fn take(&mut self, message: Message) {
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
        agent.post(format!("http://127.0.0.1:{port}/")).send(body).expect("an answer").status().as_u16()
    }

    #[test]
    fn hears_what_fires_what_is_over_and_the_dead_man() {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let url = format!("http://192.0.2.100:{port}/");
        let alerts = Alerts { webhooks: vec![url], ..Alerts::default() };
        let told = AlertReceiver::listen(&alerts).unwrap().expect("it is this host");
        assert!(told.people && !told.dead_man);
        assert!(AlertReceiver::listen(&alerts).is_err(), "two at one port");

        let alert = |status: &str, name: &str, node: &str| {
            format!(r#"{{"status":"{status}","labels":{{"alertname":"{name}","node":"{node}"}},"startsAt":"x"}}"#)
        };
        let say = |alerts: &[String]| {
            post(port, &format!(r#"{{"version":"4","status":"firing","alerts":[{}]}}"#, alerts.join(",")))
        };
        assert_eq!(say(&[alert("firing", "NodeDown", "hub-1"), alert("firing", "HubDown", "hub-1")]), 200);
        assert_eq!(told.called(), None);
        assert_eq!(say(&[alert("resolved", "HubDown", "hub-1"), alert("firing", "DeadMan", "")]), 200);
        assert_eq!(told.firing(), BTreeSet::from([("NodeDown".to_owned(), "hub-1".to_owned())]));
        assert!(told.called().is_some());
        assert_eq!(post(port, "{}"), 400);
    }

    #[test]
    fn elsewhere_is_not_here() {
        let alerts = Alerts { dead_man: Some("https://dead-man.example.net/".into()), ..Alerts::default() };
        assert!(AlertReceiver::listen(&alerts).unwrap().is_none());
    }
}
