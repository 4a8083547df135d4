//! Rules for the ports of the roles' profiles.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::Lint;
use crate::diagnostic::nearest;
use crate::ports::{EVERY, has_rule};
use crate::settings::Proto;

/// Role and service by port.
pub(super) type Listeners = BTreeMap<(u16, Proto), (String, String)>;

impl Lint<'_> {
    /// Reports two roles of one group that listen on the same port.
    pub(super) fn listeners(&mut self, group: &str, role: &str, span: &Range<usize>, known: &mut Listeners) {
        let profiles = self.profiles;
        for port in profiles.get(role).iter().flat_map(|p| &p.ports) {
            let listener = (role.to_owned(), port.service.clone());
            if let Some((other, service)) = known.insert((port.port, port.proto), listener)
                // The same service in two roles is one listener.
                && service != port.service
            {
                self.error(
                    span.clone(),
                    format!(
                        "group `{group}`: {} of `{role}` and {service} of `{other}` both use {} port {}",
                        port.service, port.proto, port.port
                    ),
                    "put the roles in two groups".to_owned(),
                );
            }
        }
    }

    /// Reports ports of roles in use that neither a built-in rule nor `from` limits.
    pub(super) fn ports(&mut self) {
        let profiles = self.profiles;
        let roles: BTreeSet<String> = self.topology.nodes.iter().flat_map(|n| n.roles.iter().cloned()).collect();
        for role in roles.iter().map(String::as_str).chain(["base"]) {
            for port in profiles.get(role).iter().flat_map(|p| &p.ports) {
                let what = format!("role `{role}`: {} port {} of {}", port.proto, port.port, port.service);
                for from in port.from.iter().flatten().filter(|f| *f != EVERY && !profiles.contains_key(*f)) {
                    let help = nearest(from, profiles.keys().map(String::as_str));
                    self.error(0..0, format!("{what}: `from` has the unknown role `{from}`"), help);
                }
                if port.from.is_none() && !has_rule(role, port) {
                    self.warning(
                        0..0,
                        format!("{what} can be reached by every node"),
                        format!(
                            "name the roles that need it in profiles/roles/{role}.toml: `from = [\"app\"]`; \
                             `from = []` for the node itself alone, `from = [\"{EVERY}\"]` for every node"
                        ),
                    );
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::{Fleet, Profile, Profiles, Severity, lint};

    /// Returns the diagnostics of the ports of a role `report`.
    fn found(ports: &str) -> Vec<(Severity, String)> {
        let profile = |text: &str| Profile::parse("p", text.as_bytes()).unwrap();
        let mut profiles: Profiles = ["base", "hub", "app"].map(|role| (role.to_owned(), profile(""))).into();
        profiles.insert("report".to_owned(), profile(ports));
        let text = "name = \"x\"\n[groups.hub]\ncount = 1\nendpoints = [\"a\"]\n[groups.report]\ncount = 1\n";
        let fleet = Fleet::parse("fleet.toml", text.as_bytes()).unwrap();
        let all = lint(&fleet, &profiles).into_iter().map(|d| (d.severity, d.to_string()));
        all.filter(|(_, message)| message.contains("port 7000")).collect()
    }

    #[test]
    fn warns_about_port_without_limit() {
        let port = "[[ports]]\nport = 7000\nproto = \"tcp\"\nservice = \"report\"\n";
        let [(Severity::Warning, message)] = &found(port)[..] else { panic!("{:?}", found(port)) };
        assert!(
            message.contains("can be reached by every node") && message.contains("profiles/roles/report.toml"),
            "{message}"
        );
        for from in ["[]", "[\"app\"]", "[\"every\"]"] {
            assert_eq!(found(&format!("{port}from = {from}\n")), []);
        }
        let wrong = found(&format!("{port}from = [\"apps\"]\n"));
        let [(Severity::Error, message)] = &wrong[..] else { panic!("{wrong:?}") };
        assert!(message.contains("the unknown role `apps`") && message.contains("did you mean `app`?"), "{message}");
    }
}
