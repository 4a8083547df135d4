//! Ports of the roles' profiles: two listeners for one, and who may reach them.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::Lint;
use crate::diagnostic::nearest;
use crate::ports::{EVERY, has_rule};
use crate::settings::Proto;

/// Role and service by port.
pub(super) type Listeners = BTreeMap<(u16, Proto), (String, String)>;

impl Lint<'_> {
    /// Two roles of one group can't listen on one port.
    pub(super) fn listeners(&mut self, group: &str, role: &str, span: &Range<usize>, known: &mut Listeners) {
        let profiles = self.profiles;
        for port in profiles.get(role).iter().flat_map(|p| &p.ports) {
            if let Some((other, service)) = known.insert((port.port, port.proto), (role.to_owned(), port.service.clone()))
                // The same service in two roles is one listener.
                && service != port.service
            {
                self.error(
                    span.clone(),
                    format!(
                        "group `{group}`: {} of `{role}` and {service} of `{other}` both want {} port {}",
                        port.service, port.proto, port.port
                    ),
                    "put the roles in two groups".to_owned(),
                );
            }
        }
    }

    /// Every port of a role in use says who may reach it: by a built-in rule, or by `from`.
    pub(super) fn ports(&mut self) {
        let profiles = self.profiles;
        let roles: BTreeSet<String> = self.topology.nodes.iter().flat_map(|n| n.roles.iter().cloned()).collect();
        for role in roles.iter().map(String::as_str).chain(["base"]) {
            for port in profiles.get(role).iter().flat_map(|p| &p.ports) {
                let what = format!("role `{role}`: {} port {} of {}", port.proto, port.port, port.service);
                for from in port.from.iter().flatten().filter(|f| *f != EVERY && !profiles.contains_key(*f)) {
                    let help = nearest(from, profiles.keys().map(String::as_str));
                    self.error(0..0, format!("{what}: `from` names no role: `{from}`"), help);
                }
                if port.from.is_none() && !has_rule(role, port) {
                    self.warning(
                        0..0,
                        format!("{what} can be reached by every node"),
                        format!(
                            "name who needs it in profiles/roles/{role}.toml: `from = [\"app\"]`; `from = []` \
                             for the node itself alone, `from = [\"{EVERY}\"]` for every node"
                        ),
                    );
                }
            }
        }
    }
}
