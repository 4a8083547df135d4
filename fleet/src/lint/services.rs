//! Rules for the services' settings, and for the sum of their time-outs.

use std::collections::BTreeSet;

use super::Lint;
use crate::diagnostic::nearest;
use crate::etcd_keys::FOLDERS;

/// Seconds until another hub has the VIP and its routes: three VRRP advertisements and three BFD packets at the
/// intervals of the templates, rounded up.
const VIP_MOVES: u16 = 1;
/// Seconds from the end of a dead primary's lease until HAProxy sends writes to the new primary.
const PROMOTION: u16 = 5;
/// Seconds until HAProxy marks an application node down: one interval, then two failed checks.
const APP_IS_OUT: u16 = 3;

impl Lint<'_> {
    /// Reports a fleet's name that the hubs use in etcd: Patroni's keys are below `/bakehouse/NAME/`, and the hubs'
    /// folders are also below `/bakehouse/`.
    pub(super) fn etcd_folders(&mut self) {
        let name = &self.fleet.name;
        if FOLDERS.contains(&name.get_ref().as_str()) {
            self.error(
                name.span(),
                format!("`{0}` cannot be a fleet's name: the hubs use `/bakehouse/{0}/` in etcd", name.get_ref()),
                "choose another name, such as your organisation's".to_owned(),
            );
        }
    }

    /// Reports settings that Patroni rejects, or with which a slow primary loses its lease.
    pub(super) fn database(&mut self) {
        let source = &self.fleet.source;
        let d = self.fleet.database.get_ref().clone();
        for (key, value, least) in
            [("ttl", d.ttl, 20), ("loop_wait", d.loop_wait, 1), ("retry_timeout", d.retry_timeout, 3)]
        {
            if value < least {
                self.error(
                    source.value(&["database", key]),
                    format!("[database] {key} = {value} s is less than Patroni allows"),
                    format!("set at least {key} = {least}"),
                );
            }
        }
        let sum = u32::from(d.loop_wait) + 2 * u32::from(d.retry_timeout);
        if sum > u32::from(d.ttl) {
            let keys = ["loop_wait", "retry_timeout", "ttl"].map(|key| source.value(&["database", key]));
            let set = keys.iter().find(|span| **span != source.value(&["database"]));
            self.error(
                set.cloned().unwrap_or_default(),
                format!(
                    "[database] loop_wait + 2 × retry_timeout is {sum} s, more than ttl ({} s): a slow primary would \
                     lose its lease",
                    d.ttl
                ),
                format!("set ttl = {sum}, or lower the others"),
            );
        }
    }

    pub(super) fn backup(&mut self) {
        let fleet = self.fleet;
        let backup = fleet.backup.get_ref();
        let at = |key: &str| fleet.source.value(&["backup", key]);
        let has_databases = self.topology.nodes.iter().any(|n| n.has_role("db"));
        if let (Some(node), Some(_)) = (&backup.node, &backup.s3) {
            self.error(
                at("node"),
                format!("[backup] has both `node` (`{node}`) and `s3`"),
                "leave one of them out".to_owned(),
            );
        }
        if let Some(node) = backup.node.as_ref().filter(|n| self.topology.node(n).is_none()) {
            let help = nearest(node, self.topology.nodes.iter().map(|n| n.name.as_str()));
            self.error(at("node"), format!("[backup] there is no node `{node}`"), help);
        }
        let keeper = self.topology.backup.node.as_ref().and_then(|n| self.topology.node(n)).cloned();
        if let Some(name) = keeper.as_ref().filter(|n| n.has_role("db")).map(|n| &n.name) {
            self.warning(
                at("node"),
                format!("[backup] {name} has the database and its backups: the loss of one machine loses both"),
                "name a node without the role `db`, or an S3 bucket".to_owned(),
            );
        }
        if has_databases && keeper.is_none() && backup.s3.is_none() && backup.node.is_none() {
            self.warning(
                at("node"),
                "there are no backups: every node has the role `db`".to_owned(),
                "add `[backup.s3]`, or name a node: `[backup] node = …`".to_owned(),
            );
        }
        if backup.keep == 0 {
            self.error(at("keep"), "[backup] keep = 0 keeps no backup".to_owned(), "set at least 1".to_owned());
        }
        let s3 =
            backup.s3.iter().flat_map(|s| [("bucket", &s.bucket), ("endpoint", &s.endpoint), ("region", &s.region)]);
        for (key, text) in s3 {
            if text.is_empty() || text.contains(|c: char| c.is_control() || "\"'%\\$".contains(c)) {
                self.error(
                    fleet.source.value(&["backup", "s3", key]),
                    format!(
                        "[backup.s3] `{}` is empty, or has a quote, `%`, `\\`, `$` or a control character",
                        text.escape_debug()
                    ),
                    None,
                );
            }
        }
        self.backup_times();
    }

    /// Reports machines that boot from the network whose node or group does not exist, and settings that exclude each
    /// other.
    pub(super) fn netboot(&mut self) {
        let netboot = self.fleet.netboot.get_ref();
        let source = &self.fleet.source;
        let at = |path: &[&str]| source.value(&[&["netboot"][..], path].concat());
        let nodes = &self.topology.nodes;
        let mut wrong = Vec::new();
        let machines = netboot.machines.iter().map(|(machine, to)| (vec!["machines", machine.as_str()], to));
        for (path, to) in machines.chain(netboot.others.iter().map(|to| (vec!["others"], to))) {
            if !nodes.iter().any(|n| n.name == *to || n.group == *to) {
                let known: Vec<&str> = nodes.iter().map(|n| n.name.as_str()).collect();
                wrong.push((
                    at(&path),
                    format!("[netboot] there is no node or group `{to}`"),
                    format!("there are {}", known.join(", ")),
                ));
            }
        }
        for name in netboot.machines.keys().filter(|name| name.contains(':')) {
            let octets: Vec<&str> = name.split(':').collect();
            let good = |o: &&str| o.len() == 2 && o.chars().all(|c| c.is_ascii_digit() || ('a'..='f').contains(&c));
            if octets.len() != 6 || !octets.iter().all(good) {
                wrong.push((
                    source.key(&["netboot", "machines", name]),
                    format!("[netboot] `{name}` is not a MAC address"),
                    "write it in lower case, such as \"52:54:00:aa:bb:cc\"".to_owned(),
                ));
            }
        }
        let mut seen = BTreeSet::new();
        for (machine, to) in netboot.machines.iter().filter(|(_, to)| nodes.iter().any(|n| n.name == **to)) {
            if !seen.insert(to) {
                wrong.push((
                    at(&["machines", machine]),
                    format!("[netboot] two machines have the node `{to}`"),
                    "name a node once, or name its group".to_owned(),
                ));
            }
        }
        for group in netboot.diskless.iter().filter(|g| !self.fleet.groups.contains_key(*g)) {
            let known: Vec<&str> = self.fleet.groups.keys().map(String::as_str).collect();
            wrong.push((
                at(&["diskless"]),
                format!("[netboot] there is no group `{group}`"),
                format!("there are {}", known.join(", ")),
            ));
        }
        let vote = nodes.iter().find(|n| netboot.diskless.contains(&n.group) && self.topology.voters.contains(&n.name));
        if let Some(hub) = vote {
            wrong.push((
                at(&["diskless"]),
                format!("[netboot] {} has an etcd vote, and cannot run from memory", hub.name),
                format!("remove `{}` from `diskless`: etcd keeps a vote on the disk", hub.group),
            ));
        }
        if !netboot.diskless.is_empty() && self.fleet.update.get_ref().url.is_some() {
            wrong.push((
                at(&["diskless"]),
                "[netboot] machines that run from memory take no updates: a rollout of [update] would wait for them"
                    .to_owned(),
                "remove [update], and restart the machines one after the other from the newer image".to_owned(),
            ));
        }
        for (span, message, help) in wrong {
            self.error(span, message, help);
        }
    }

    pub(super) fn services(&mut self) {
        let fleet = self.fleet;
        let odoo = fleet.odoo.get_ref();
        let source = &fleet.source;
        for (number, language) in odoo.languages.iter().enumerate() {
            let (main, rest) = language.split_once(['_', '@']).map_or((language.as_str(), None), |(m, r)| (m, Some(r)));
            let good = (2..=3).contains(&main.len())
                && main.chars().all(|c| c.is_ascii_lowercase())
                && rest.is_none_or(|r| !r.is_empty() && r.chars().all(|c| c.is_ascii_alphanumeric()));
            if !good {
                self.error(
                    source.value(&["odoo", "languages", &number.to_string()]),
                    format!("[odoo] `{language}` is not a language"),
                    "write it as Odoo does, such as \"de\" or \"pt_BR\"".to_owned(),
                );
            }
        }
        if !is_identifier(&odoo.database) {
            self.error(
                source.value(&["odoo", "database"]),
                format!("[odoo] `{}` cannot be a database's name", odoo.database),
                "use lower-case letters, digits and `_`, a letter first".to_owned(),
            );
        }
        for (number, module) in odoo.modules.iter().enumerate().filter(|(_, module)| !is_identifier(module)) {
            let at = source.value(&["odoo", "modules", &number.to_string()]);
            self.error(at, format!("[odoo] `{module}` cannot be an add-on's name"), None);
        }
        let open = fleet.firewall.get_ref().open.iter().enumerate();
        for (number, role) in open.filter_map(|(number, open)| Some((number, open.role.as_ref()?))) {
            if !self.profiles.contains_key(role) {
                let help = nearest(role, self.profiles.keys().map(String::as_str));
                let at = source.value(&["firewall", "open", &number.to_string(), "role"]);
                self.error(at, format!("[firewall] there is no role `{role}`"), help);
            }
        }
        let update = fleet.update.get_ref();
        // The URL goes into the transfer files of systemd-sysupdate, unquoted.
        if let Some(url) = update.url.as_ref().filter(|url| !is_address(url)) {
            self.error(
                source.value(&["update", "url"]),
                format!("[update] `{}` is not an address", url.escape_debug()),
                "begin it with https:// or http://, and use only letters, digits and -._~:/[]".to_owned(),
            );
        }
    }

    /// Reports promises that are shorter than the sum of the time-outs.
    pub(super) fn promises(&mut self) {
        let promise = self.fleet.promise.get_ref().clone();
        let ttl = self.fleet.database.get_ref().ttl;
        for (key, promised, takes, why) in [
            ("vip", promise.vip, VIP_MOVES, "missed VRRP advertisements and BFD"),
            ("database", promise.database, ttl.saturating_add(PROMOTION), "the lease's ttl, promotion, a health check"),
            ("app", promise.app, APP_IS_OUT, "two failed health checks"),
        ] {
            if promised < takes {
                self.error(
                    self.fleet.source.value(&["promise", key]),
                    format!("[promise] {key} = {promised} s is too short: it may take {takes} s ({why})"),
                    if key == "database" {
                        format!("set at least {takes}, or lower [database] ttl (now {ttl}, at least 20)")
                    } else {
                        format!("set at least {takes}")
                    },
                );
            }
        }
    }
}

fn is_address(url: &str) -> bool {
    let rest = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://"));
    rest.is_some_and(|r| {
        !r.trim_matches('/').is_empty() && r.chars().all(|c| c.is_ascii_alphanumeric() || "-._~:/[]".contains(c))
    })
}

pub(super) fn is_identifier(text: &str) -> bool {
    text.len() <= 60
        && text.starts_with(|c: char| c.is_ascii_lowercase())
        && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
}
