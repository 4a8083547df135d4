//! What is known of the services: what they insist on, and what their time-outs add up to.

use std::collections::BTreeSet;

use super::Lint;
use crate::diagnostic::nearest;

/// Seconds until another hub has the VIP and the routes to it: three adverts and three BFD
/// packets at the intervals of the templates, rounded up.
const VIP_MOVES: u16 = 1;
/// Seconds from the end of a dead primary's lease until HAProxy sends writes to the next.
const PROMOTION: u16 = 5;
/// Seconds until HAProxy has taken an application node out: one interval, then two checks.
const APP_IS_OUT: u16 = 3;

/// Folders of `/bakehouse/` in etcd that only hubs may write.
const ETCD_FOLDERS: [&str; 11] =
    ["audit", "etcd-ready", "owners", "readmitted", "renewed", "revoked", "rollout", "seen", "shut", "slots", "tokens"];

impl Lint<'_> {
    /// Patroni's keys are below `/bakehouse/NAME/` in etcd, beside the hubs' own folders.
    pub(super) fn etcd_folders(&mut self) {
        let name = &self.fleet.name;
        if ETCD_FOLDERS.contains(&name.get_ref().as_str()) {
            self.error(
                name.span(),
                format!("`{0}` can't be a fleet's name: `/bakehouse/{0}/` in etcd is the hubs' own", name.get_ref()),
                "choose another name, such as your organisation's".to_owned(),
            );
        }
    }

    /// What Patroni itself insists on, said before a node is built with it.
    pub(super) fn database(&mut self) {
        let span = self.fleet.database.span();
        let d = self.fleet.database.get_ref().clone();
        for (key, value, least) in
            [("ttl", d.ttl, 20), ("loop_wait", d.loop_wait, 1), ("retry_timeout", d.retry_timeout, 3)]
        {
            if value < least {
                self.error(
                    span.clone(),
                    format!("[database] {key} is {value} s, less than Patroni allows"),
                    format!("set at least {key} = {least}"),
                );
            }
        }
        let sum = u32::from(d.loop_wait) + 2 * u32::from(d.retry_timeout);
        if sum > u32::from(d.ttl) {
            self.error(
                span,
                format!(
                    "[database] loop_wait + 2 × retry_timeout is {sum} s, more than ttl ({} s): a primary that is only slow would lose its lease",
                    d.ttl
                ),
                format!("set ttl = {sum}, or lower the others"),
            );
        }
    }

    pub(super) fn backup(&mut self) {
        let fleet = self.fleet;
        let (backup, span) = (fleet.backup.get_ref(), fleet.backup.span());
        let has_databases = self.topology.nodes.iter().any(|n| n.has_role("db"));
        if let (Some(node), Some(_)) = (&backup.node, &backup.s3) {
            self.error(
                span.clone(),
                format!("[backup] has both the node `{node}` and s3"),
                "leave one of them out".to_owned(),
            );
        }
        if let Some(node) = backup.node.as_ref().filter(|n| self.topology.node(n).is_none()) {
            let help = nearest(node, self.topology.nodes.iter().map(|n| n.name.as_str()));
            self.error(span.clone(), format!("[backup] there is no node `{node}`"), help);
        }
        let keeper = self.topology.backup.node.as_ref().and_then(|n| self.topology.node(n)).cloned();
        if let Some(name) = keeper.as_ref().filter(|n| n.has_role("db")).map(|n| &n.name) {
            self.warning(
                span.clone(),
                format!("[backup] {name} has the database and its backups: one machine loses both"),
                "name a node without the role `db`, or an S3 bucket".to_owned(),
            );
        }
        if has_databases && keeper.is_none() && backup.s3.is_none() && backup.node.is_none() {
            self.warning(
                span.clone(),
                "there are no backups: every node has the role `db`".to_owned(),
                "add `[backup.s3]`, or name a node: `[backup] node = …`".to_owned(),
            );
        }
        if backup.keep == 0 {
            self.error(span.clone(), "[backup] keep = 0 keeps nothing".to_owned(), "keep at least 1".to_owned());
        }
        let s3 = backup.s3.iter().flat_map(|s| [&s.bucket, &s.endpoint, &s.region]);
        for text in [&backup.full, &backup.incremental].into_iter().chain(&backup.restore).chain(s3) {
            if text.is_empty() || text.contains(|c: char| c.is_control() || "\"'%\\$".contains(c)) {
                self.error(
                    span.clone(),
                    format!("[backup] `{}` can't be written into a configuration", text.escape_debug()),
                    None,
                );
            }
        }
    }

    /// Machines that boot from the network become something that there is.
    pub(super) fn netboot(&mut self) {
        let netboot = self.fleet.netboot.get_ref();
        let span = self.fleet.netboot.span();
        let nodes = &self.topology.nodes;
        let mut wrong = Vec::new();
        for to in netboot.machines.values().chain(&netboot.others) {
            if !nodes.iter().any(|n| n.name == *to || n.group == *to) {
                let known: Vec<&str> = nodes.iter().map(|n| n.name.as_str()).collect();
                wrong.push((
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
                    format!("[netboot] `{name}` is not a MAC address"),
                    "write it in lower case, such as \"52:54:00:aa:bb:cc\"".to_owned(),
                ));
            }
        }
        let mut seen = BTreeSet::new();
        for to in netboot.machines.values().filter(|to| nodes.iter().any(|n| n.name == **to)) {
            if !seen.insert(to) {
                wrong
                    .push((format!("[netboot] two machines are to be `{to}`"), "each is a node of its own".to_owned()));
            }
        }
        for group in netboot.diskless.iter().filter(|g| !self.fleet.groups.contains_key(*g)) {
            let known: Vec<&str> = self.fleet.groups.keys().map(String::as_str).collect();
            wrong.push((format!("[netboot] there is no group `{group}`"), format!("there are {}", known.join(", "))));
        }
        let vote = nodes.iter().find(|n| netboot.diskless.contains(&n.group) && self.topology.voters.contains(&n.name));
        if let Some(hub) = vote {
            wrong.push((
                format!("[netboot] {} has one of etcd's votes, and runs from memory", hub.name),
                format!("take `{}` out of `diskless`: a vote is on a disk that the node starts from", hub.group),
            ));
        }
        if !netboot.diskless.is_empty() && self.fleet.update.get_ref().url.is_some() {
            wrong.push((
                "[netboot] machines that run from memory take no updates, and [update] would wait for them".to_owned(),
                "leave [update] out, and restart them one after the other from the newer image".to_owned(),
            ));
        }
        for (message, help) in wrong {
            self.error(span.clone(), message, help);
        }
    }

    pub(super) fn services(&mut self) {
        let fleet = self.fleet;
        let odoo = fleet.odoo.get_ref();
        for language in &odoo.languages {
            let (main, rest) = language.split_once(['_', '@']).map_or((language.as_str(), None), |(m, r)| (m, Some(r)));
            let good = (2..=3).contains(&main.len())
                && main.chars().all(|c| c.is_ascii_lowercase())
                && rest.is_none_or(|r| !r.is_empty() && r.chars().all(|c| c.is_ascii_alphanumeric()));
            if !good {
                self.error(
                    fleet.odoo.span(),
                    format!("[odoo] `{language}` is not a language"),
                    "write it as Odoo does, such as \"de\" or \"pt_BR\"".to_owned(),
                );
            }
        }
        if !is_identifier(&odoo.database) {
            self.error(
                fleet.odoo.span(),
                format!("[odoo] `{}` can't be a database's name", odoo.database),
                "use lower-case letters, digits and `_`, a letter first".to_owned(),
            );
        }
        for module in odoo.modules.iter().filter(|m| !is_identifier(m)) {
            self.error(fleet.odoo.span(), format!("[odoo] `{module}` can't be an add-on's name"), None);
        }
        for role in fleet.firewall.get_ref().open.iter().filter_map(|open| open.role.as_ref()) {
            if !self.profiles.contains_key(role) {
                let help = nearest(role, self.profiles.keys().map(String::as_str));
                self.error(fleet.firewall.span(), format!("[firewall] there is no role `{role}`"), help);
            }
        }
        // Browsers open several at once.
        if fleet.web.get_ref().connections < 10 || fleet.web.get_ref().connections > 3000 {
            self.error(
                fleet.web.span(),
                format!("[web] connections is {}", fleet.web.get_ref().connections),
                "one address may have 10 to 3000 connections; 150 by default".to_owned(),
            );
        }
        let alerts = fleet.alerts.get_ref();
        for url in alerts.webhooks.iter().chain(&alerts.dead_man) {
            if !(url.starts_with("http://") || url.starts_with("https://")) || url.contains(char::is_whitespace) {
                self.error(
                    fleet.alerts.span(),
                    format!("[alerts] `{url}` is not an address"),
                    "it begins with https:// or http://".to_owned(),
                );
            }
        }
        let update = fleet.update.get_ref();
        // Everything in it is part of the address: nothing in it may end it.
        if let Some(url) = update.url.as_ref().filter(|url| !is_address(url)) {
            self.error(
                fleet.update.span(),
                format!("[update] `{}` is not an address", url.escape_debug()),
                "it begins with https:// or http://, and has letters, digits and -._~:/[] only".to_owned(),
            );
        }
        if update.when.is_empty() || update.when.contains(|c: char| c.is_control() || c == '%') {
            self.error(
                fleet.update.span(),
                format!("[update] `{}` is not a time", update.when.escape_debug()),
                "write it as systemd does, such as \"*:0/5\" or \"Sun *-*-* 02..04:0/5\"".to_owned(),
            );
        }
        let watched = self.topology.nodes.iter().any(|n| n.has_role("monitor"));
        if watched && alerts.email.is_none() && alerts.webhooks.is_empty() {
            self.warning(
                fleet.alerts.span(),
                "nobody is told of failures: [alerts] names no e-mail and no webhook".to_owned(),
                "add `[alerts] webhooks = [\"https://…\"]` or `[alerts.email]`".to_owned(),
            );
        }
    }

    /// A promise that the time-outs can't keep is not one.
    pub(super) fn promises(&mut self) {
        let promise = self.fleet.promise.get_ref().clone();
        let ttl = self.fleet.database.get_ref().ttl;
        for (key, promised, takes, why) in [
            ("vip", promise.vip, VIP_MOVES, "missed VRRP adverts and BFD"),
            ("database", promise.database, ttl.saturating_add(PROMOTION), "the lease's ttl, promotion, a health check"),
            ("app", promise.app, APP_IS_OUT, "two failed health checks"),
        ] {
            if promised < takes {
                self.error(
                    self.fleet.promise.span(),
                    format!("[promise] {key} = {promised} s can't be kept: it may take {takes} s ({why})"),
                    if key == "database" {
                        format!("raise it, or lower [database] ttl (now {ttl}, at least 20)")
                    } else {
                        format!("promise at least {takes}")
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

fn is_identifier(text: &str) -> bool {
    text.len() <= 60
        && text.starts_with(|c: char| c.is_ascii_lowercase())
        && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
}
