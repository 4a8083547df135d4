//! Rules for addresses, hosts and times. Without these rules, a build or a node would reject them later.

use super::Lint;
use crate::calendar::{is_calendar_event, point_in_time};
use crate::profile::{WHEEL_HELP, is_wheel};

/// Domains that RFC 2606 and RFC 6761 reserve for documentation, tests and the local host.
const RESERVED_DOMAINS: [&str; 7] =
    ["example", "example.com", "example.net", "example.org", "invalid", "localhost", "test"];

/// Address blocks that RFC 5737 reserves for documentation.
const RESERVED_BLOCKS: [[u8; 3]; 3] = [[192, 0, 2], [198, 51, 100], [203, 0, 113]];

impl Lint<'_> {
    /// Warns about endpoints that no other node can reach, because their names or addresses are reserved.
    pub(super) fn reserved_names(&mut self) {
        let fleet = self.fleet;
        let endpoints = fleet.groups.values().flat_map(|group| &group.endpoints);
        let reserved: Vec<_> = endpoints.filter(|endpoint| is_reserved(endpoint.get_ref())).collect();
        let Some(first) = reserved.first() else { return };
        let names: Vec<String> = reserved.iter().map(|endpoint| format!("`{}`", endpoint.get_ref())).collect();
        self.warning(
            first.span(),
            format!("names and addresses that are reserved for examples: {}", names.join(", ")),
            "write the hubs' public names or addresses before you install machines; local machines (`bakehouse up`) \
             do not need them"
                .to_owned(),
        );
    }

    /// Reports apt sources with an invalid address, suite or package name.
    pub(super) fn archives(&mut self) {
        let fleet = self.fleet;
        let debian = &fleet.debian;
        let mut addresses = vec![
            (debian.mirror.as_ref(), vec!["debian", "mirror"]),
            (debian.security_mirror.as_ref(), vec!["debian", "security_mirror"]),
        ];
        let numbers: Vec<String> = (0..debian.sources.len()).map(|number| number.to_string()).collect();
        for (source, number) in debian.sources.iter().zip(&numbers) {
            addresses.push((source.uri.as_ref(), vec!["debian", "sources", number.as_str(), "uri"]));
        }
        for (address, path) in addresses {
            if let Some(address) = address.filter(|address| !is_archive(address)) {
                self.error(
                    fleet.source.value(&path),
                    format!("[debian] `{}` is not the address of an archive", address.escape_debug()),
                    "begin it with https://, http:// or file:, such as \"https://mirror.example.com/debian\""
                        .to_owned(),
                );
            }
        }
        let is_word =
            |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "._-/+~".contains(c));
        let mut words = vec![(&debian.suite, vec!["debian", "suite"])];
        for (source, number) in debian.sources.iter().zip(&numbers) {
            words.push((&source.suite, vec!["debian", "sources", number.as_str(), "suite"]));
            let path = vec!["debian", "sources", number.as_str(), "components"];
            words.extend(source.components.iter().map(|component| (component, path.clone())));
        }
        for (word, path) in words.into_iter().filter(|(word, _)| !is_word(word)) {
            self.error(
                fleet.source.value(&path),
                format!("[debian] `{}` cannot be a suite or a component", word.escape_debug()),
                "write its name in the archive, such as \"trixie\" or \"main\"".to_owned(),
            );
        }
        let lists =
            (fleet.groups.iter().map(|(name, group)| (&group.packages, vec!["groups", name.as_str(), "packages"])))
                .chain(debian.sources.iter().zip(&numbers).map(|(source, number)| {
                    (&source.packages, vec!["debian", "sources", number.as_str(), "packages"])
                }));
        for (packages, path) in lists {
            for (number, package) in packages.iter().enumerate().filter(|(_, package)| !is_package(package)) {
                let number = number.to_string();
                let path: Vec<&str> = path.iter().copied().chain([number.as_str()]).collect();
                self.error(
                    fleet.source.value(&path),
                    format!("`{}` cannot be the name of a Debian package", package.escape_debug()),
                    "use lower-case letters, digits, `+`, `-` and `.`".to_owned(),
                );
            }
        }
        for (name, group) in &fleet.groups {
            for (number, wheel) in group.wheels.iter().enumerate().filter(|(_, wheel)| !is_wheel(wheel)) {
                self.error(
                    fleet.source.value(&["groups", name, "wheels", &number.to_string()]),
                    format!("`{}` is not a Python package with its version", wheel.escape_debug()),
                    WHEEL_HELP.to_owned(),
                );
            }
        }
    }

    /// Reports port numbers that do not exist.
    pub(super) fn port_numbers(&mut self) {
        let fleet = self.fleet;
        // A hub listens on `mesh.port` for workers, and on a higher port for each other hub.
        let last = u32::from(fleet.mesh.port) + self.topology.hubs.len() as u32;
        if fleet.mesh.port == 0 || last > u32::from(u16::MAX) {
            self.error(
                fleet.source.value(&["mesh", "port"]),
                format!("[mesh] port = {} leaves no room for the ports of the hubs after it", fleet.mesh.port),
                "set 1 to 65000; the default is 51820".to_owned(),
            );
        }
        for (number, _) in fleet.firewall.get_ref().open.iter().enumerate().filter(|(_, open)| open.port == 0) {
            self.error(
                fleet.source.value(&["firewall", "open", &number.to_string(), "port"]),
                "[firewall] there is no port 0".to_owned(),
                "set 1 to 65535".to_owned(),
            );
        }
    }

    /// Reports invalid S3 services, and an invalid disk of network installations.
    pub(super) fn stores(&mut self) {
        let fleet = self.fleet;
        if let Some(s3) = fleet.backup.get_ref().s3.as_ref().filter(|s3| s3.endpoint.contains('/')) {
            self.error(
                fleet.source.value(&["backup", "s3", "endpoint"]),
                format!("[backup.s3] endpoint = `{}` has more than a host name", s3.endpoint.escape_debug()),
                "leave out `https://` and the path, such as \"s3.eu-central-1.amazonaws.com\"".to_owned(),
            );
        }
        if let Some(disk) = fleet.netboot.get_ref().disk.as_ref().filter(|disk| !disk.starts_with("/dev/")) {
            self.error(
                fleet.source.value(&["netboot", "disk"]),
                format!("[netboot] `{}` is not a disk", disk.escape_debug()),
                "write its device, such as \"/dev/nvme0n1\"".to_owned(),
            );
        }
    }

    /// Reports times of backups and of a restore that systemd, pgBackRest or PostgreSQL would reject.
    pub(super) fn backup_times(&mut self) {
        let fleet = self.fleet;
        let backup = fleet.backup.get_ref();
        for (key, time) in [("full", &backup.full), ("incremental", &backup.incremental)] {
            self.calendar_event("backup", key, time, "\"Sun 01:30\" or \"Mon..Sat 01:30\"");
        }
        if let Some(time) = backup.restore.as_ref().filter(|time| *time != "latest" && point_in_time(time).is_none()) {
            self.error(
                fleet.source.value(&["backup", "restore"]),
                format!("[backup] restore = `{}` is not a point in time", time.escape_debug()),
                "write it as RFC 3339 does, such as \"2026-11-23T10:00:00Z\", or \"latest\"".to_owned(),
            );
        }
    }

    /// Warns about a fleet that cannot be updated, and reports an invalid time of updates.
    pub(super) fn updates(&mut self) {
        let fleet = self.fleet;
        let update = fleet.update.get_ref();
        self.calendar_event("update", "when", &update.when, "\"*:0/5\" or \"Sun *-*-* 02..04:0/5\"");
        // A machine that runs from memory loads the new version at its next boot.
        if update.url.is_none() && fleet.netboot.get_ref().diskless.is_empty() && !fleet.groups.is_empty() {
            self.warning(
                fleet.source.key(&["update"]),
                "[update] has no `url`: nodes keep their version until you flash them again".to_owned(),
                "set `[update] url = \"https://…\"` before the first installation: a folder of any web server, to \
                 which `bakehouse publish` writes"
                    .to_owned(),
            );
        }
    }

    fn calendar_event(&mut self, section: &str, key: &str, time: &str, such: &str) {
        if !is_calendar_event(time) {
            self.error(
                self.fleet.source.value(&[section, key]),
                format!("[{section}] {key} = `{}` is not a time of a systemd timer", time.escape_debug()),
                format!("write it as in `OnCalendar=` (systemd.time(7)), such as {such}"),
            );
        }
    }
}

/// Whether a host name or an IPv4 address is reserved for documentation or tests.
fn is_reserved(host: &str) -> bool {
    let host = host.to_ascii_lowercase();
    if let Ok(address) = host.parse::<std::net::Ipv4Addr>() {
        return RESERVED_BLOCKS.contains(&[address.octets()[0], address.octets()[1], address.octets()[2]]);
    }
    let is_below = |domain: &str| host.strip_suffix(domain).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
    RESERVED_DOMAINS.iter().any(|domain| is_below(domain))
}

/// Whether a text has the form of an archive's address. apt supports further kinds, such as `mirror+file:`. A host's name
/// with a port is no kind.
fn is_archive(text: &str) -> bool {
    let kind = text.split_once(':').map(|(kind, rest)| (kind, !rest.trim_matches('/').is_empty()));
    let is_kind = |kind: &str| {
        kind.starts_with(|c: char| c.is_ascii_lowercase())
            && kind.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "+-".contains(c))
    };
    kind.is_some_and(|(kind, has_place)| is_kind(kind) && has_place)
        && !text.contains(|c: char| c.is_whitespace() || c.is_control())
}

/// Whether a text has the form of a package's name in Debian policy 5.6.7, with an architecture (`:all`) or without.
fn is_package(text: &str) -> bool {
    let (name, arch) = text.split_once(':').unwrap_or((text, "any"));
    name.len() > 1
        && name.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "+-.".contains(c))
        && !arch.is_empty()
        && arch.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Fleet, Profile, Profiles, Severity, lint};

    const FLEET: &str = "name = \"x\"\n[groups.hub]\ncount = 1\nendpoints = [\"hub.acme.com\"]\n";

    /// Returns the diagnostics of a severity, each as `line: message` with the text under the caret.
    fn found(text: &str, severity: Severity) -> Vec<String> {
        let profile = |text: &str| Profile::parse("p", text.as_bytes()).unwrap();
        let profiles: Profiles = ["base", "hub", "db", "app", "monitor"].map(|r| (r.to_owned(), profile(""))).into();
        let fleet = Fleet::parse("f", text.as_bytes()).expect(text);
        let all = lint(&fleet, &profiles).into_iter().filter(|d| d.severity == severity);
        all.map(|d| format!("{d}\n{}", d.render(false))).collect()
    }

    #[track_caller]
    fn error(more: &str, message: &str, underlined: &str) {
        let found = found(&format!("{FLEET}{more}"), Severity::Error);
        let [one] = &found[..] else { panic!("{more}: {found:#?}") };
        assert!(one.starts_with("f:6: ") && one.contains(message), "{one}");
        let mut lines = one.lines().skip_while(|line| !(line.contains(" | ") && line.contains(underlined)));
        let (source, below) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
        assert_eq!((source.find(underlined), below.matches('^').count()), (below.find('^'), underlined.len()), "{one}");
    }

    #[test]
    fn errors_of_times_underline_the_value() {
        error("[backup]\nfull = \"Someday\"\n", "[backup] full = `Someday` is not a time", "\"Someday\"");
        error("[backup]\nincremental = \"sunday at 1\"\n", "such as \"Sun 01:30\"", "\"sunday at 1\"");
        error("[backup]\nrestore = \"yesterday\"\n", "is not a point in time", "\"yesterday\"");
        error("[update]\nwhen = \"nightly\"\nurl = \"http://a/\"\n", "[update] when = `nightly`", "\"nightly\"");
        for good in ["restore = \"latest\"", "restore = \"2026-11-23T10:00:00Z\"", "full = \"weekly\""] {
            assert_eq!(found(&format!("{FLEET}[backup]\n{good}\n"), Severity::Error), Vec::<String>::new());
        }
    }

    #[test]
    fn errors_of_addresses_and_names_underline_the_value() {
        error(
            "[debian]\nmirror = \"mirror.example.com:80\"\n",
            "is not the address of an archive",
            "\"mirror.example.com:80\"",
        );
        error("[debian]\nsuite = \"trixie main\"\n", "cannot be a suite", "\"trixie main\"");
        error("[mesh]\nport = 65535\n", "leaves no room", "65535");
        error("[firewall]\nopen = [{ port = 0, proto = \"tcp\" }]\n", "there is no port 0", "0");
        error("[netboot]\ndisk = \"sda\"\n", "is not a disk", "\"sda\"");
        let packages = "[groups.app]\npackages = [\"Vim\"]\ncount = 1\n";
        error(packages, "`Vim` cannot be the name of a Debian package", "\"Vim\"");
        let wheels = "[groups.app]\nwheels = [\"plutoprint>=0.2\"]\ncount = 1\n";
        error(wheels, "`plutoprint>=0.2` is not a Python package with its version", "\"plutoprint>=0.2\"");
        error(
            "[backup]\ns3 = { bucket = \"b\", endpoint = \"https://s3.acme.com\", region = \"r\" }\n",
            "has more than a host name",
            "\"https://s3.acme.com\"",
        );
    }

    #[test]
    fn warns_about_reserved_endpoints_once() {
        let text = "name = \"x\"\n[groups.hub]\ncount = 3\n\
                    endpoints = [\"hub1.example.net\", \"one.acme.com\", \"198.51.100.7\"]\n";
        let all = found(text, Severity::Warning);
        let about: Vec<&String> = all.iter().filter(|w| w.contains("reserved for examples")).collect();
        let expected = "f:4: names and addresses that are reserved for examples: `hub1.example.net`, `198.51.100.7`";
        assert!(about.len() == 1 && about[0].starts_with(expected), "{all:#?}");
        for real in ["hub.acme.com", "notexample.net", "test.acme.com", "10.0.0.1"] {
            assert!(!is_reserved(real), "{real}");
        }
        assert!(is_reserved("a.b.test") && is_reserved("EXAMPLE.org") && is_reserved("localhost"));
    }

    #[test]
    fn warns_about_fleet_without_updates() {
        let warns = |text: &str| found(text, Severity::Warning).iter().any(|w| w.contains("[update] has no `url`"));
        assert!(warns(FLEET) && warns(&format!("{FLEET}[update]\nwhen = \"daily\"\n")));
        assert!(!warns(&format!("{FLEET}[update]\nurl = \"https://updates.acme.com/\"\n")));
        assert!(!warns(&format!("{FLEET}[netboot]\ndiskless = [\"app\"]\n[groups.app]\ncount = 1\n")));
    }
}
