//! Python of operators in Odoo's shell. systemd runs the shell in a service of its own, as the user and in the sandbox of
//! Odoo's other services (`overlays/odoo/usr/lib/systemd/system/odoo-cron.service`).

use std::sync::Arc;

use fleet::node_api::{LONGEST_RUN, LONGEST_SCRIPT, OdooShellRequest};
use hyper::StatusCode;
use zbus::zvariant::Value;

use super::exec::{self, Job};
use super::listener::Client;
use super::random_id;
use super::reply::{Answer, Refusal};
use crate::host::manager::Property;

const PROGRAM: &str = "/usr/bin/odoo";
/// Odoo's configuration. It has passwords, and only root reads it.
const CONFIG: &str = "/run/bakehouse/odoo.conf";
const ENVIRONMENT: &str = "/run/bakehouse/odoo.env";
/// Name of the configuration as a credential of the service.
pub(super) const CREDENTIAL: &str = "odoo.conf";

/// Runs a script, and returns its output while it runs.
pub(super) async fn run(client: &Arc<Client>, asked: &OdooShellRequest) -> Answer {
    let script = checked(client, asked)?;
    let id = random_id().map_err(|e| Refusal::new(StatusCode::SERVICE_UNAVAILABLE, e.chain()))?;
    let service = exec::service_name("odoo-shell")?;
    let database = &client.shared().api.topology.odoo.database;
    let words = words(&service, database);
    let job = Job {
        words,
        seconds: asked.seconds,
        begins: format!("odoo shell {id} on {database} for up to {} s: {script}", asked.seconds),
        ends: format!("odoo shell {id}"),
        service,
        input: asked.script.clone().into_bytes(),
        properties: properties(),
    };
    exec::stream(client, job).await
}

/// Checks a request, and returns the script for the log.
fn checked(client: &Client, asked: &OdooShellRequest) -> Result<String, Refusal> {
    let invalid = |text: String| Refusal::new(StatusCode::BAD_REQUEST, text);
    exec::permitted(client)?;
    runs_odoo(client)?;
    if asked.script.trim().is_empty() {
        return Err(invalid("the request has no script".to_owned()));
    }
    if !(1..=LONGEST_RUN).contains(&asked.seconds) {
        return Err(invalid(format!("the time limit is not from 1 to {LONGEST_RUN} s")));
    }
    let script = format!("{:?}", asked.script);
    if script.len() > LONGEST_SCRIPT {
        let text = format!("the script has {} bytes with its quotes, and may have {LONGEST_SCRIPT}", script.len());
        return Err(invalid(text).help("run several shorter scripts, because the log has each of them completely"));
    }
    Ok(script)
}

/// Refuses on a node without Odoo.
pub(super) fn runs_odoo(client: &Client) -> Result<(), Refusal> {
    let node = &client.shared().api.node;
    if node.has_role("app") {
        return Ok(());
    }
    let text = format!("{} does not run Odoo", node.name);
    Err(Refusal::new(StatusCode::NOT_FOUND, text).help("name a node with the role app"))
}

fn words(service: &str, database: &str) -> Vec<String> {
    let config = format!("/run/credentials/{service}/{CREDENTIAL}");
    let one_process = ["--no-http", "--workers=0", "--max-cron-threads=0"];
    let words = [PROGRAM, "shell", "-c", &config, "-d", database].into_iter().chain(one_process);
    words.map(str::to_owned).collect()
}

/// Returns the properties of a service with Odoo's user and sandbox.
pub(super) fn properties() -> Vec<Property<'static>> {
    let yes = || Value::from(true);
    vec![
        ("User", "odoo".into()),
        ("LoadCredential", Value::from(vec![(CREDENTIAL, CONFIG)])),
        ("EnvironmentFiles", Value::from(vec![(ENVIRONMENT, false)])),
        ("StateDirectory", Value::from(vec!["odoo"])),
        ("StateDirectoryMode", 0o750_u32.into()),
        // HTTP requests have priority, as over scheduled jobs.
        ("CPUWeight", 20_u64.into()),
        ("CapabilityBoundingSet", 0_u64.into()),
        ("LockPersonality", yes()),
        ("NoNewPrivileges", yes()),
        ("PrivateDevices", yes()),
        ("PrivateTmp", yes()),
        ("ProtectClock", yes()),
        ("ProtectControlGroups", yes()),
        ("ProtectHome", "yes".into()),
        ("ProtectHostname", yes()),
        ("ProtectKernelLogs", yes()),
        ("ProtectKernelModules", yes()),
        ("ProtectKernelTunables", yes()),
        ("ProtectProc", "invisible".into()),
        ("ProtectSystem", "strict".into()),
        ("RestrictAddressFamilies", Value::from((true, vec!["AF_INET", "AF_INET6", "AF_UNIX"]))),
        ("RestrictNamespaces", 0_u64.into()),
        ("RestrictRealtime", yes()),
        ("RestrictSUIDSGID", yes()),
        ("SystemCallArchitectures", Value::from(vec!["native"])),
        ("SystemCallFilter", Value::from((true, vec!["@system-service"]))),
        ("UMask", 0o077_u32.into()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The service of a script has the sandbox of scheduled jobs, which is the same for all services of Odoo.
    #[test]
    fn the_sandbox_is_that_of_odoos_services() {
        let unit = include_str!("../../../overlays/odoo/usr/lib/systemd/system/odoo-cron.service");
        let service = unit.split("[Service]").nth(1).unwrap();
        let elsewhere = ["Type", "ExecStart", "EnvironmentFile", "Restart", "RestartSec", "KillMode", "TimeoutStopSec"];
        let wanted = service.lines().filter_map(|line| line.split_once('=')).map(|(name, _)| name);
        let wanted: Vec<&str> = wanted.filter(|name| !name.starts_with('#') && !elsewhere.contains(name)).collect();
        let properties = properties();
        let found: Vec<&str> = properties.iter().map(|(name, _)| *name).collect();
        for name in &wanted {
            assert!(found.contains(name), "{name}");
        }
        assert_eq!(found.len(), wanted.len() + 1, "{found:?}");
        let words = words("x.service", "shop");
        assert_eq!(words[3..6], ["/run/credentials/x.service/odoo.conf", "-d", "shop"]);
    }
}
