//! Attack on Patroni's settings: through its REST API, and through the key in etcd from which Patroni reads them.

use std::thread::sleep;
use std::time::Duration;

use serde_json::Value;

use super::foothold::{Foothold, doors};
use super::{Arena, Finding, etcd};

const API: u16 = 8008;
const SHOW: &str = "patronictl -c /run/bakehouse/patroni.yml show-config";

/// Tries to add a setting that every member reads. Patroni keeps names that it does not know.
pub(super) fn change(arena: &Arena, from: &Foothold) -> Finding {
    let mark = format!("containment-{:?}", from.place).to_lowercase();
    let asked = from.run(|| async {
        let dbs = arena.topology.nodes.iter().filter(|n| n.has_role("db"));
        let mut last = format!("port {API} is filtered or closed");
        for door in from.reachable(doors(arena, dbs, API)).await {
            for shown in from.shown() {
                let body = format!("{{\"{mark}\": true}}").into_bytes();
                let json = [("content-type", "application/json")];
                match from.ask(&door, shown, ("PATCH", "/config"), &json, body).await {
                    Ok(_) => return Ok(format!("PATCH https://{}:{API}/config", door.host)),
                    Err(e) => last = e,
                }
            }
        }
        Err(last)
    });
    let refused = match asked {
        Ok(how) => {
            if is_set(arena, &mark) {
                undo(arena, &mark);
                return Finding::yes(how);
            }
            format!("{how}: accepted, but not set")
        }
        Err(e) => e,
    };
    // Patroni's members apply the settings that etcd has.
    let key = format!("{}config", arena.scope());
    let mut settings: Value = serde_json::from_str(&arena.get(&key)).expect("Patroni's settings are JSON");
    settings[&mark] = Value::Bool(true);
    match etcd::put(arena, from, &key, &settings.to_string()) {
        Ok(how) if is_set(arena, &mark) => {
            undo(arena, &mark);
            Finding::yes(format!("{key} by {how}"))
        }
        Ok(how) => Finding::no(format!("{how}: written, but not set")),
        Err(_) => Finding::no(refused),
    }
}

fn is_set(arena: &Arena, mark: &str) -> bool {
    (0..10).any(|_| {
        let shown = arena.machine("db-1").exec(&format!("{SHOW} | grep -q {mark}")).status == 0;
        if !shown {
            sleep(Duration::from_millis(300));
        }
        shown
    })
}

fn undo(arena: &Arena, mark: &str) {
    let edit = format!("patronictl -c /run/bakehouse/patroni.yml edit-config --quiet --force --set {mark}=null");
    arena.machine("db-1").ok(&edit);
}
