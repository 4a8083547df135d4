//! Rules of `[odoo]`: its processes, and further keys of `odoo.conf`.

use super::Lint;
use super::services::is_identifier;
use crate::diagnostic::nearest;
use crate::odoo::{MAX_CONNECTIONS, OTHER_CONNECTIONS, OdooOption};
use crate::profile::parse_size;

/// Keys of `odoo.conf` that Bakehouse sets, with the reason or the key of fleet.toml.
const OWN: &[(&str, &str)] = &[
    ("addons_path", "name folders in `[odoo] addons`"),
    ("admin_passwd", "fleet.key has the password"),
    ("data_dir", "files are in the database, and each node has the same folder"),
    ("db_app_name", "the database's logs have the node"),
    ("db_host", "HAProxy of each node forwards to the primary"),
    ("db_maxconn", "set `[odoo] db_maxconn`"),
    ("db_name", "set `[odoo] database`"),
    ("db_password", "fleet.key has the password"),
    ("db_port", "HAProxy of each node forwards to the primary"),
    ("db_replica_host", "HAProxy of each node forwards to the primary"),
    ("db_replica_port", "HAProxy of each node forwards to the primary"),
    ("db_sslmode", "each connection is encrypted"),
    ("db_template", "Bakehouse creates the database"),
    ("db_user", "Bakehouse creates the user"),
    ("dbfilter", "a fleet has one database of Odoo"),
    ("email_from", "set `[odoo.mail] from`"),
    ("from_filter", "set `[odoo.mail] from_filter`"),
    ("gevent_port", "the packet filter opens this port"),
    ("http_enable", "each service of Odoo sets it"),
    ("http_interface", "Odoo listens on the node's address in the mesh"),
    ("http_port", "the packet filter opens this port"),
    ("limit_memory_hard", "set `[odoo] memory_hard`"),
    ("limit_memory_soft", "set `[odoo] memory_soft`"),
    ("limit_time_cpu", "set `[odoo] time_cpu`"),
    ("limit_time_real", "set `[odoo] time_real`"),
    ("list_db", "a fleet has one database of Odoo"),
    ("log_db", "the journal has the log: `bakehouse logs -u odoo-http`"),
    ("logfile", "the journal has the log: `bakehouse logs -u odoo-http`"),
    ("max_cron_threads", "set `[odoo] cron_threads` or `cron`"),
    ("pidfile", "systemd starts Odoo"),
    ("proxy_mode", "set `[odoo] proxy`"),
    ("server_wide_modules", "Bakehouse loads its own add-on"),
    ("smtp_password", "type `bakehouse secret odoo_mail`"),
    ("smtp_port", "set `[odoo.mail] smarthost`"),
    ("smtp_server", "set `[odoo.mail] smarthost`"),
    ("smtp_ssl", "set `[odoo.mail] tls`"),
    ("smtp_ssl_certificate_filename", "Odoo would not verify the mail server's certificate"),
    ("smtp_ssl_private_key_filename", "an image has no private key"),
    ("smtp_user", "set `[odoo.mail] user`"),
    ("syslog", "the journal has the log: `bakehouse logs -u odoo-http`"),
    ("with_demo", "Bakehouse creates the database"),
    ("without_demo", "Bakehouse creates the database"),
    ("workers", "set `[odoo] workers`"),
];
/// Further keys of `odoo.conf` that Odoo 19 has.
const KNOWN: &[&str] = &[
    "bin_path",
    "csv_internal_sep",
    "db_maxconn_gevent",
    "default_productivity_apps",
    "dev_mode",
    "geoip_city_db",
    "geoip_country_db",
    "import_file_maxbytes",
    "import_file_timeout",
    "import_url_regex",
    "limit_memory_hard_gevent",
    "limit_memory_soft_gevent",
    "limit_request",
    "limit_time_real_cron",
    "limit_time_worker_cron",
    "load_language",
    "log_db_level",
    "log_handler",
    "log_level",
    "osv_memory_count_limit",
    "overwrite_existing_translations",
    "pg_path",
    "pre_upgrade_scripts",
    "proxy_access_token",
    "publisher_warranty_url",
    "reportgz",
    "screencasts",
    "screenshots",
    "skip_auto_install",
    "transient_age_limit",
    "unaccent",
    "upgrade_path",
    "websocket_keep_alive_timeout",
    "websocket_rate_limit_burst",
    "websocket_rate_limit_delay",
    "x_sendfile",
];

impl Lint<'_> {
    /// Reports numbers that Odoo cannot work with, and machines or a database that are too small for them.
    pub(super) fn odoo(&mut self) {
        if self.odoo_numbers() {
            self.odoo_machines();
            self.odoo_connections();
        }
        self.odoo_jobs();
        self.odoo_options();
        self.odoo_mail();
    }

    /// Returns whether all numbers are valid.
    fn odoo_numbers(&mut self) -> bool {
        let odoo = self.fleet.odoo.get_ref().clone();
        let at = |key: &str| self.fleet.source.value(&["odoo", key]);
        let mut wrong = Vec::new();
        for (key, value, least, most) in [
            ("workers", odoo.workers.unwrap_or(1), 1, 256),
            ("cron_threads", odoo.cron_threads, 1, 16),
            ("db_maxconn", odoo.db_maxconn, 4, 64),
        ] {
            if !(least..=most).contains(&value) {
                let help = if (key, value) == ("cron_threads", 0) {
                    "name the groups that run scheduled jobs: `cron = [\"GROUP\"]`".to_owned()
                } else {
                    format!("set {least} to {most}")
                };
                wrong.push((at(key), format!("[odoo] {key} = {value} is not from {least} to {most}"), help));
            }
        }
        for (key, size) in [("memory_soft", &odoo.memory_soft), ("memory_hard", &odoo.memory_hard)] {
            let Some(text) = size else { continue };
            let message = match parse_size(text) {
                None => format!("[odoo] `{}` is not a size", text.escape_debug()),
                Some(bytes) if bytes < 256 << 20 => format!("[odoo] {key} = \"{text}\" is too small for Odoo"),
                Some(_) => continue,
            };
            wrong.push((at(key), message, "write at least \"256M\", such as \"640M\" or \"2G\"".to_owned()));
        }
        let (soft, hard) = odoo.memory();
        if wrong.is_empty() && hard <= soft {
            let key = if odoo.memory_hard.is_some() { "memory_hard" } else { "memory_soft" };
            let message = format!("[odoo] memory_hard ({} MB) is not more than memory_soft", hard >> 20);
            wrong.push((at(key), message, format!("set `memory_hard = \"{}M\"`", (soft >> 20) * 3 / 2)));
        }
        if odoo.time_cpu < 10 {
            let message = format!("[odoo] time_cpu = {} s is too short for Odoo's reports", odoo.time_cpu);
            wrong.push((at("time_cpu"), message, "set at least 10".to_owned()));
        }
        if odoo.time_real < odoo.time_cpu {
            let source = &self.fleet.source;
            let own = source.value(&["odoo", "time_real"]);
            let span = if own == source.value(&["odoo"]) { at("time_cpu") } else { own };
            let message =
                format!("[odoo] time_real = {} s is less than time_cpu ({} s)", odoo.time_real, odoo.time_cpu);
            wrong.push((span, message, format!("set `time_real = {}`", odoo.time_cpu * 2)));
        }
        let is_valid = wrong.is_empty();
        for (span, message, help) in wrong {
            self.error(span, message, help);
        }
        is_valid
    }

    fn odoo_jobs(&mut self) {
        let fleet = self.fleet;
        let odoo = fleet.odoo.get_ref();
        for (number, name) in odoo.cron.iter().enumerate() {
            let at = fleet.source.value(&["odoo", "cron", &number.to_string()]);
            match fleet.groups.get(name) {
                None => {
                    let help = nearest(name, fleet.groups.keys().map(String::as_str));
                    self.error(at, format!("[odoo] there is no group `{}`", name.escape_debug()), help);
                }
                Some(group) if !group.role_names(name).contains(&"app") => {
                    let help = "name groups with the role `app`".to_owned();
                    self.error(at, format!("[odoo] the nodes of group `{name}` do not run Odoo"), help);
                }
                Some(_) => {}
            }
        }
        let apps: Vec<_> = self.topology.nodes.iter().filter(|n| n.has_role("app")).collect();
        let jobs: Vec<_> = apps.iter().filter(|n| odoo.runs_jobs(&n.group)).map(|n| n.name.clone()).collect();
        if let ([only], 2..) = (&jobs[..], apps.len()) {
            self.warning(
                fleet.source.value(&["odoo", "cron"]),
                format!("[odoo] only {only} runs scheduled jobs: its loss stops them, and the sending of mail"),
                "name groups with two nodes".to_owned(),
            );
        }
    }

    fn odoo_options(&mut self) {
        let fleet = self.fleet;
        for (key, value) in &fleet.odoo.get_ref().options {
            let at = fleet.source.key(&["odoo", "options", key]);
            if let Some((_, help)) = OWN.iter().find(|(own, _)| own == key) {
                self.error(at, format!("[odoo.options] Bakehouse sets `{key}` itself"), (*help).to_owned());
            } else if !is_identifier(key) {
                let message = format!("[odoo.options] `{}` cannot be a key of odoo.conf", key.escape_debug());
                self.error(at, message, "use lower-case letters, digits and `_`, a letter first".to_owned());
            } else if !KNOWN.contains(&key.as_str()) {
                let known = KNOWN.iter().chain(OWN.iter().map(|(own, _)| own)).copied();
                let help = nearest(key, known).unwrap_or_else(|| "make sure that an add-on reads it".to_owned());
                self.warning(at, format!("[odoo.options] Odoo 19 has no option `{key}`"), help);
            }
            if matches!(value, OdooOption::Text(text) if text.contains(char::is_control) || text.trim() != text) {
                let at = fleet.source.value(&["odoo", "options", key]);
                let message = format!("[odoo.options] `{key}` has a control character, or a space at an end");
                self.error(at, message, "write a text of one line".to_owned());
            }
        }
    }

    /// Compares the processes with the size of `bakehouse up`'s virtual machines.
    fn odoo_machines(&mut self) {
        let fleet = self.fleet;
        let odoo = fleet.odoo.get_ref();
        for (name, group) in fleet.groups.iter().filter(|(name, group)| group.role_names(name).contains(&"app")) {
            let Some((memory, cpus)) = self.machine(name) else { continue };
            let workers = odoo.workers_on(memory >> 20, cpus);
            let needed = workers * odoo.memory_of_worker();
            if needed <= memory {
                continue;
            }
            let role = group.role_names(name).join("`, `");
            let keys = ["workers", "memory_soft"].map(|key| fleet.source.value(&["odoo", key]));
            let whole = fleet.source.value(&["odoo"]);
            self.warning(
                keys.into_iter().find(|span| *span != whole).unwrap_or(whole),
                format!(
                    "[odoo] {workers} workers need {} MB, and the machine of group `{name}` has {} MB",
                    needed >> 20,
                    memory >> 20
                ),
                format!("lower `workers`, or raise `[vm] memory` in the profile of `{role}` (docs/howto/sizing.md)"),
            );
        }
    }

    /// Returns memory, in bytes, and CPUs of a group's virtual machine; `None` if a profile has no size.
    fn machine(&self, group: &str) -> Option<(u64, u64)> {
        let node = self.topology.nodes.iter().find(|node| node.group == group)?;
        let roles = std::iter::once("base").chain(node.roles.iter().map(String::as_str));
        let sizes: Vec<_> = roles.filter_map(|role| self.profiles.get(role)).map(|profile| &profile.vm).collect();
        let memory: u64 = sizes.iter().filter_map(|vm| parse_size(vm.memory.as_deref()?)).sum();
        let cpus = sizes.iter().filter_map(|vm| vm.cpus).max().unwrap_or(2);
        (memory > 0).then_some((memory, cpus.into()))
    }

    /// Compares the connections that Odoo may open with those that PostgreSQL accepts.
    fn odoo_connections(&mut self) {
        let fleet = self.fleet;
        let odoo = fleet.odoo.get_ref();
        let mut connections = 0;
        for node in self.topology.nodes.iter().filter(|node| node.has_role("app")) {
            let (memory, cpus) = self.machine(&node.group).unwrap_or((1 << 30, 2));
            let jobs = if odoo.runs_jobs(&node.group) { u64::from(odoo.cron_threads) } else { 0 };
            // One process serves the websockets.
            connections += (odoo.workers_on(memory >> 20, cpus) + jobs + 1) * u64::from(odoo.db_maxconn);
        }
        let most = MAX_CONNECTIONS - OTHER_CONNECTIONS;
        if connections <= most {
            return;
        }
        let whole = fleet.source.value(&["odoo"]);
        let keys = ["db_maxconn", "workers", "cron_threads"].map(|key| fleet.source.value(&["odoo", key]));
        let fits = u64::from(odoo.db_maxconn) * most / connections;
        let help = if fits >= 4 {
            format!("set `db_maxconn = {fits}`, or lower `workers` (docs/howto/sizing.md)")
        } else {
            "lower `workers` (docs/howto/sizing.md)".to_owned()
        };
        self.warning(
            keys.into_iter().find(|span| *span != whole).unwrap_or(whole),
            format!("[odoo] the app nodes may open {connections} connections, and PostgreSQL has {most} for Odoo"),
            help,
        );
    }
}

#[cfg(test)]
mod tests {
    use crate::{Fleet, Profile, Profiles, Severity, lint};

    fn profiles() -> Profiles {
        let profile = |role: &str, text: &str| (role.to_owned(), Profile::parse(role, text.as_bytes()).unwrap());
        Profiles::from([
            profile("base", "[vm]\nmemory = \"768M\"\ncpus = 2"),
            profile("hub", "[vm]\nmemory = \"512M\"\ncpus = 2"),
            profile("app", "[vm]\nmemory = \"1G\"\ncpus = 2"),
        ])
    }

    /// Returns the errors and warnings about `[odoo`: severity and text.
    fn found(odoo: &str) -> Vec<(Severity, String)> {
        let text = format!(
            "name = \"x\"\n{odoo}\n[groups.hub]\ncount = 1\nendpoints = [\"hub.acme.com\"]\n[groups.app]\ncount = 2\n"
        );
        let fleet = Fleet::parse("f", text.as_bytes()).unwrap_or_else(|e| panic!("{odoo}: {}", e.message));
        let found = lint(&fleet, &profiles()).into_iter().filter(|d| d.message.contains("[odoo"));
        found.map(|d| (d.severity, d.render(false))).collect()
    }

    fn one(odoo: &str, severity: Severity, message: &str, underlined: &str) {
        let all = found(odoo);
        let [(found, shown)] = &all[..] else { panic!("{odoo}: {all:?}") };
        assert!(*found == severity && shown.contains(message), "{shown}");
        assert!(shown.lines().any(|line| line.contains('|') && line.contains(underlined)), "{shown}");
    }

    #[test]
    fn errors_of_numbers_underline_the_value() {
        let error = |odoo: &str, message: &str, at: &str| one(&format!("[odoo]\n{odoo}"), Severity::Error, message, at);
        error("workers = 0", "workers = 0 is not from 1 to 256", "0");
        error("cron_threads = 0", "name the groups that run scheduled jobs", "cron_threads = 0");
        error("db_maxconn = 2", "db_maxconn = 2 is not from 4 to 64", "2");
        error("memory_soft = \"640 MB\"", "`640 MB` is not a size", "640 MB");
        error("memory_hard = \"64M\"", "too small for Odoo", "64M");
        error("memory_hard = \"640M\"", "memory_hard (640 MB) is not more than memory_soft", "640M");
        error("memory_soft = \"2G\"", "set `memory_hard = \"3072M\"`", "2G");
        error("time_cpu = 5", "time_cpu = 5 s is too short", "5");
        error("time_real = 60", "time_real = 60 s is less than time_cpu (600 s)", "60");
        error("time_cpu = 2000", "set `time_real = 4000`", "2000");
        error("cron = [\"hub\"]", "the nodes of group `hub` do not run Odoo", "hub");
        error("cron = [\"ap\"]", "did you mean `app`?", "ap");
    }

    #[test]
    fn options_that_bakehouse_sets_are_errors_with_the_reason() {
        let with = |options: &str| format!("[odoo.options]\n{options}");
        one(&with("workers = 4"), Severity::Error, "set `[odoo] workers`", "workers");
        one(&with("smtp_password = \"x\""), Severity::Error, "`bakehouse secret odoo_mail`", "smtp_password");
        one(&with("admin_passwd = \"x\""), Severity::Error, "fleet.key has the password", "admin_passwd");
        one(&with("Log-Level = \"info\""), Severity::Error, "cannot be a key of odoo.conf", "Log-Level");
        one(&with("log_level = \"a\\nb = c\""), Severity::Error, "has a control character", "a\\nb");
        one(&with("log_levle = \"info\""), Severity::Warning, "did you mean `log_level`?", "log_levle");
        one(&with("queue_job_channels = 3"), Severity::Warning, "make sure that an add-on reads it", "queue_job");
        assert_eq!(found(&with("log_level = \"info\"\nunaccent = true\nlimit_request = 4096")), []);
        let e = Fleet::parse("f", b"name = \"x\"\n[odoo.options]\nunaccent = [1]\n[groups]\n").unwrap_err();
        assert!(e.line == 3 && e.message.contains("`odoo.options.unaccent`"), "{}", e.message);
    }

    #[test]
    fn small_machines_and_few_connections_are_warnings() {
        let all = found("[odoo]\nworkers = 12\ndb_maxconn = 4");
        assert!(
            matches!(&all[..], [(Severity::Warning, text)] if text.contains("12 workers need 6144 MB, and the \
                     machine of group `app` has 1792 MB")),
            "{all:?}"
        );
        one("[odoo]\ndb_maxconn = 32", Severity::Warning, "may open 320 connections", "db_maxconn = 32");
        let shown = &found("[odoo]\ndb_maxconn = 32")[0].1;
        assert!(shown.contains("PostgreSQL has 192 for Odoo") && shown.contains("set `db_maxconn = 19`"), "{shown}");
        assert_eq!(found(""), [], "the defaults fit the profiles");
        assert_eq!(
            found("[odoo]\nworkers = 2\nmemory_soft = \"640M\"\ntime_cpu = 60\ntime_real = 120\nproxy = false"),
            []
        );
    }

    #[test]
    fn one_node_for_scheduled_jobs_is_a_warning() {
        let text = "name = \"x\"\n[odoo]\ncron = [\"jobs\"]\n[groups.hub]\ncount = 1\nendpoints = [\"hub.acme.com\"]\n\
                    [groups.app]\ncount = 2\n[groups.jobs]\ncount = 1\nroles = [\"app\"]\n";
        let fleet = Fleet::parse("f", text.as_bytes()).unwrap();
        let found: Vec<_> = lint(&fleet, &profiles()).into_iter().filter(|d| d.message.contains("[odoo")).collect();
        assert!(
            found.iter().any(|d| d.line == 3 && d.message.contains("only jobs-1 runs scheduled jobs")),
            "{found:?}"
        );
    }
}
