//! The fleet's page: what a monitor knows about the fleet, for operators' browsers.
//!
//! The process reads Prometheus and Alertmanager of its own node, connects to nodes to notice that one is down, and
//! renders HTML. It has no key, no certificate and no right to act: an attacker who takes it has the metrics, and the
//! actions of the page are links to `bakehouse open page` on the operator's own machine.
//!
//! Modules import only modules further down this list:
//!
//! - `server`: HTTP and server-sent events
//! - `watch`: reads everything while somebody looks, and shares it
//! - `audit`: requests of operators, from a file
//! - `views`: HTML of each part, from templates
//! - `state`, `history`: the state of the fleet, and what happened over time
//! - `queries`: every expression for Prometheus
//! - `prometheus`, `probe`: clients of the monitor's services and of the nodes
//! - `http`, `format`, `config`, `error`

mod audit;
pub mod config;
#[cfg(test)]
mod contrast;
pub mod error;
mod format;
mod history;
mod http;
mod probe;
mod prometheus;
mod queries;
mod server;
mod state;
#[cfg(test)]
mod testing;
mod views;
mod watch;

pub use server::{POLICY, serve};

#[cfg(test)]
mod tests {
    /// A new dependency needs a reason: with TLS, D-Bus or a client of the fleet, the process could do more than read
    /// metrics.
    #[test]
    fn the_process_has_no_dependency_with_which_it_could_act() {
        let manifest = include_str!("../Cargo.toml");
        let dependencies = manifest.split("[dependencies]").nth(1).and_then(|text| text.split("\n[").next()).unwrap();
        let names = dependencies.lines().filter_map(|line| line.split_once('.').or(line.split_once(' ')));
        let names: Vec<&str> = names.map(|(name, _)| name).collect();
        assert_eq!(
            names,
            [
                "bytes",
                "futures-util",
                "http-body-util",
                "hyper",
                "hyper-util",
                "minijinja",
                "percent-encoding",
                "serde",
                "serde_json",
                "thiserror",
                "time",
                "tokio",
            ]
        );
    }
}
