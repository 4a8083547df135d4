//! The manifest of an image.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use fleet::{Access, Odoo, Topology};
use serde::Serialize;
use serde_json::{Value, json};

use crate::packages::lock::{Package, Wheel};
use crate::util::digest::sha256;

/// `NAME_VERSION.manifest.json`.
#[derive(Serialize)]
pub(crate) struct Manifest<'a> {
    /// Format of the manifest.
    pub format: u32,
    /// Name of the image, which prefixes its files and partition labels.
    pub id: &'a str,
    /// Version of the image, from `fleet.toml`.
    pub version: &'a str,
    /// Name of the fleet.
    pub fleet: &'a str,
    /// Group whose nodes run the image.
    pub group: &'a str,
    /// Roles of the group.
    pub roles: &'a [String],
    /// Revision of the fleet's sources, as `--revision` gave it.
    pub revision: Option<&'a str>,
    /// Version of bakehouse.
    pub bakehouse: &'a str,
    /// sha256 of bakehouse.lock.
    pub lock: &'a str,
    /// Version of the kernel, as `uname -r` prints it.
    pub kernel: &'a str,
    /// Root hash of the root's dm-verity tree, in hex.
    pub roothash: &'a str,
    /// In bytes.
    pub sizes: Sizes,
    /// sha256 of the agent.
    pub agent: &'a str,
    /// Name, version and digest of each package.
    pub packages: Vec<Value>,
    /// Baked files: path → sha256 of the content, or of a link's target.
    pub files: BTreeMap<&'a str, String>,
    /// Addresses of the group's slots.
    pub nodes: BTreeMap<&'a str, Ipv4Addr>,
    /// Names of the fleet's hubs.
    pub hubs: Vec<&'a str>,
    /// Names of the nodes with an etcd vote.
    pub voters: Vec<&'a str>,
    /// Format of the agent's state on a node.
    pub state: u16,
    /// Network of the nodes' mesh addresses.
    pub mesh: String,
    /// Names of the migrations, which convert a node's data.
    pub migrations: Vec<&'a str>,
    /// Settings of the fleet that all its images have, by section of `fleet.toml`, with the defaults.
    pub settings: Value,
    /// Add-ons of Odoo: name → hash of the content; `None` in images without Odoo.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub addons: Option<BTreeMap<String, String>>,
    /// Source of the database, if it is restored from a backup: `[backup] restore`.
    pub restore: Option<&'a str>,
}

/// Sizes in bytes.
#[derive(Serialize)]
pub(crate) struct Sizes {
    /// The whole disk image.
    pub disk: u64,
    /// A root partition.
    pub root_slot: u64,
    /// The root file system.
    pub root: u64,
    /// The UKI.
    pub uki: u64,
    /// Size of all files of the tree.
    pub tree: u64,
}

/// Returns the settings of a fleet that are in every image.
#[must_use]
pub(crate) fn settings(topology: &Topology) -> Value {
    let mesh = &topology.mesh;
    let endpoints: BTreeMap<&str, &str> =
        topology.nodes.iter().filter_map(|node| Some((node.name.as_str(), node.endpoint.as_deref()?))).collect();
    let mut alerts = masked(json!(topology.alerts));
    if !topology.alert_secrets.is_empty() {
        // `plan` shows that a password changed.
        alerts["secrets"] = json!(sha256(json!(topology.alert_secrets).to_string().as_bytes())[..8]);
    }
    let mut web = json!(topology.web);
    if topology.web_certificate.is_some() || !topology.web_secrets.is_empty() {
        // `plan` shows that the certificate or a secret changed.
        let content = json!([topology.web_certificate, topology.web_secrets]);
        web["content"] = json!(sha256(content.to_string().as_bytes())[..8]);
    }
    let mut settings = json!({
        "mesh": { "subnet": mesh.subnet, "transport": mesh.transport, "port": mesh.port },
        "vip": { "address": topology.vip, "lan": topology.lan, "hook": topology.hook },
        "dns": topology.dns,
        "database": topology.database,
        "backup": topology.backup,
        "odoo": odoo(topology),
        "alerts": alerts,
        "firewall": topology.firewall,
        "update": topology.update,
        "web": web,
        "endpoints": endpoints,
    });
    // Manifests of earlier versions have neither.
    if let Some(operators) = mesh.operators {
        settings["mesh"]["operators"] = json!(operators);
    }
    if topology.access != Access::default() {
        settings["access"] = json!(topology.access);
    }
    settings
}

/// Returns `[odoo]`, without keys that the file leaves out and manifests of earlier versions do not have.
fn odoo(topology: &Topology) -> Value {
    let (mut settings, default) = (json!(topology.odoo), json!(Odoo::default()));
    if let (Some(settings), Some(default)) = (settings.as_object_mut(), default.as_object()) {
        let is_old = |key: &str| ["database", "languages", "addons", "modules"].contains(&key);
        settings.retain(|key, value| is_old(key) || default.get(key) != Some(value));
    }
    if !topology.mail_secrets.is_empty() {
        // `plan` shows that the password changed.
        settings["mail"]["secret"] = json!(sha256(json!(topology.mail_secrets).to_string().as_bytes())[..8]);
    }
    settings
}

/// Replaces what follows the host of each URL by a digest: it may be a secret of a chat or a monitoring service, and
/// `plan` prints the settings.
fn masked(value: Value) -> Value {
    match value {
        Value::String(text) => {
            let end = text.find("://").and_then(|at| Some(at + 3 + text[at + 3..].find('/')?));
            Value::String(match end {
                Some(end) if end + 1 < text.len() => format!("{}/…{}", &text[..end], &sha256(text.as_bytes())[..8]),
                _ => text,
            })
        }
        Value::Array(all) => all.into_iter().map(masked).collect(),
        Value::Object(all) => all.into_iter().map(|(key, value)| (key, masked(value))).collect(),
        other => other,
    }
}

/// Returns the packages in the form of the manifest.
#[must_use]
pub(crate) fn package_list(packages: &[&Package], wheels: &[&Wheel]) -> Vec<Value> {
    let debs = packages
        .iter()
        .map(|p| json!({ "name": p.name, "version": p.version, "arch": p.arch, "suite": p.suite, "sha256": p.sha256 }));
    let wheels = wheels
        .iter()
        .map(|w| json!({ "name": w.name, "version": w.version, "arch": "wheel", "suite": "", "sha256": w.sha256 }));
    debs.chain(wheels).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_show_the_host_of_a_url_and_a_digest_of_the_rest() {
        let alerts =
            json!({ "webhooks": ["https://chat.acme.com/hook/s3cret"], "dead_man": "https://ping.acme.com/uuid" });
        let shown = masked(alerts.clone()).to_string();
        assert!(shown.contains("https://chat.acme.com/…") && shown.contains("https://ping.acme.com/…"), "{shown}");
        assert!(!shown.contains("s3cret") && !shown.contains("uuid"), "{shown}");
        let other =
            json!({ "webhooks": ["https://chat.acme.com/hook/other"], "dead_man": "https://ping.acme.com/uuid" });
        assert_ne!(masked(other).to_string(), shown, "`plan` would miss a change");
        let text = json!(["https://chat.acme.com", "https://chat.acme.com/", "root@acme.com"]);
        assert_eq!(masked(text.clone()), text);
    }
}
