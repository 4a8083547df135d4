//! Values of Odoo's configuration that depend on the node.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::mail::MailServer;
use crate::membership::Secrets;
use crate::topology::{Node, Topology};

/// Values of Odoo's configuration that depend on the node: the variable `odoo` of the templates.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct OdooServer {
    /// Number of processes for HTTP requests.
    pub workers: u64,
    /// Memory, in bytes, at which a process ends with its request.
    pub memory_soft: u64,
    /// Memory, in bytes, at which a request fails.
    pub memory_hard: u64,
    /// Number of processes for scheduled jobs; 0 on a node that runs none.
    pub cron_threads: u16,
    /// Further keys, with their values as `odoo.conf` has them.
    pub options: BTreeMap<String, String>,
    /// The mail server, on app nodes.
    pub mail: Option<MailServer>,
}

impl OdooServer {
    /// Returns the values for a node. `memory` of its machine is in MiB.
    #[must_use]
    pub fn for_node(fleet: &Topology, node: &Node, (memory, cpus): (u64, u64), secrets: &Secrets) -> Self {
        let odoo = &fleet.odoo;
        let (memory_soft, memory_hard) = odoo.memory();
        let mail = odoo.mail.as_ref().filter(|_| node.has_role("app")).map(|mail| {
            let (host, port) = mail.server().unwrap_or_default();
            let password = if mail.user.is_some() {
                fleet.mail_secrets.password(secrets.mail_key().as_ref(), &fleet.name)
            } else {
                String::new()
            };
            MailServer { host: host.to_owned(), port, password }
        });
        Self {
            workers: odoo.workers_on(memory, cpus),
            memory_soft,
            memory_hard,
            cron_threads: if odoo.runs_jobs(&node.group) { odoo.cron_threads } else { 0 },
            options: odoo.options.iter().map(|(key, value)| (key.clone(), value.to_string())).collect(),
            mail,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Fleet, MailKey};

    fn topology(odoo: &str) -> Topology {
        let text =
            format!("name = \"acme\"\n{odoo}\n[groups]\napp.count = 1\njobs.count = 1\njobs.roles = [\"app\"]\n");
        Topology::from_fleet(&Fleet::parse("f", text.as_bytes()).unwrap_or_else(|e| panic!("{}", e.message)))
    }

    fn on(fleet: &Topology, node: &str, secrets: &Secrets) -> OdooServer {
        OdooServer::for_node(fleet, fleet.node(node).unwrap(), (4096, 2), secrets)
    }

    #[test]
    fn a_larger_limit_leaves_room_for_fewer_processes() {
        let server = on(&topology("[odoo]\nmemory_soft = \"2G\"\nmemory_hard = \"3G\""), "app-1", &Secrets::default());
        assert_eq!((server.workers, server.memory_soft, server.memory_hard), (2, 2 << 30, 3 << 30));
        let server = on(&topology(""), "app-1", &Secrets::default());
        assert_eq!((server.workers, server.memory_soft, server.memory_hard), (4, 671_088_640, 1 << 30));
    }

    #[test]
    fn only_named_groups_run_scheduled_jobs() {
        let fleet = topology("[odoo]\ncron = [\"jobs\"]\ncron_threads = 3");
        let threads = |node| on(&fleet, node, &Secrets::default()).cron_threads;
        assert_eq!((threads("app-1"), threads("jobs-1")), (0, 3));
        assert_eq!(on(&topology(""), "app-1", &Secrets::default()).cron_threads, 1);
    }

    #[test]
    fn options_have_the_form_of_odoos_file() {
        let fleet =
            topology("[odoo.options]\nunaccent = true\nx_sendfile = false\ntransient_age_limit = \"0.5\"\na = -3");
        let options: Vec<_> = on(&fleet, "app-1", &Secrets::default()).options.into_iter().collect();
        let shown: Vec<_> = options.iter().map(|(key, value)| format!("{key}={value}")).collect();
        assert_eq!(shown, ["a=-3", "transient_age_limit=0.5", "unaccent=True", "x_sendfile=False"]);
    }

    #[test]
    fn only_app_nodes_with_the_key_have_the_password() {
        let mut fleet = topology("[odoo.mail]\nsmarthost = \"[2001:db8::1]:587\"\nuser = \"u\"");
        let founder = Secrets { etcd_root: "root".to_owned(), ..Secrets::default() };
        fleet.mail_secrets.seal(&MailKey::derive("root").unwrap(), "acme", "hunter2").unwrap();
        let app = founder.for_roles(&["app".to_owned()]);
        let mail = on(&fleet, "app-1", &app).mail.unwrap();
        assert_eq!((mail.host.as_str(), mail.port, mail.password.as_str()), ("2001:db8::1", 587, "hunter2"));
        let monitor = founder.for_roles(&["monitor".to_owned()]);
        assert_eq!(on(&fleet, "app-1", &monitor).mail.unwrap().password, "");
        fleet.nodes[0].roles = vec!["db".to_owned()];
        let other = fleet.nodes[0].name.clone();
        assert_eq!(on(&fleet, &other, &app).mail, None);
    }
}
