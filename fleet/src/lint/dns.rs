//! Rules for the name that the hubs serve.

use std::net::IpAddr;

use super::Lint;
use super::names::is_host;

impl Lint<'_> {
    /// Reports a name that the hubs cannot serve, and hubs that browsers cannot reach by it.
    pub(super) fn served_name(&mut self) {
        let source = &self.fleet.source;
        let dns = self.fleet.dns.get_ref();
        let at = |key: &str| source.value(&["dns", key]);
        let Some(zone) = dns.zone() else {
            if dns.dnssec {
                self.error(at("dnssec"), "[dns] dnssec needs a name".to_owned(), "set `[dns] name`".to_owned());
            }
            return;
        };
        let span = at("name");
        let is_top = !zone.contains('.') || zone.parse::<IpAddr>().is_ok();
        // The longest label in front of it is that of a hub.
        if !is_host(&zone) || is_top || zone.len() > 220 {
            return self.error(
                span,
                format!("[dns] `{}` cannot be delegated to the hubs", zone.escape_debug()),
                "write a name below one of yours, such as \"erp.acme.example\"".to_owned(),
            );
        }
        let inside = |endpoint: &str| {
            let endpoint = endpoint.to_ascii_lowercase();
            endpoint == zone || endpoint.strip_suffix(&zone).is_some_and(|rest| rest.ends_with('.'))
        };
        let hubs = || self.topology.hubs.iter().filter_map(|hub| Some((&hub.name, hub.endpoint.as_deref()?)));
        if let Some((hub, endpoint)) = hubs().find(|(_, endpoint)| inside(endpoint)) {
            let text = format!("[dns] {hub} has the endpoint {endpoint}, which is in the name {zone}");
            let fix = "give users a name of their own, such as \"erp.acme.example\" beside \"hub1.acme.example\"";
            return self.error(span, text, fix.to_owned());
        }
        let private: Vec<String> = hubs()
            .filter(|(_, endpoint)| endpoint.parse().is_ok_and(|at: std::net::Ipv4Addr| at.is_private()))
            .map(|(hub, endpoint)| format!("{hub} ({endpoint})"))
            .collect();
        let (alone, apps) = (hubs().count() == 1, self.topology.nodes.iter().any(|n| n.has_role("app")));
        if !private.is_empty() {
            self.warning(
                span.clone(),
                format!("[dns] the name leads to private addresses: {}", private.join(", ")),
                "browsers outside that network cannot use it; write the hubs' public addresses as `endpoints`"
                    .to_owned(),
            );
        }
        if alone {
            let text = "[dns] the fleet has one hub: if it dies, nothing answers for the name".to_owned();
            self.warning(span.clone(), text, "have at least two hubs".to_owned());
        }
        if !apps {
            let text = "[dns] no node has the role `app`: the name leads to no page".to_owned();
            self.warning(span, text, None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{errors, one, warnings};

    fn with(dns: &str, endpoints: [&str; 2]) -> String {
        format!(
            "name = \"acme\"\n[dns]\n{dns}\n[groups.hub]\ncount = 2\nendpoints = {endpoints:?}\n[groups.app]\ncount = 1\n"
        )
    }

    const HUBS: [&str; 2] = ["hub1.acme.test", "198.18.0.2"];

    #[test]
    fn name_has_to_be_one_that_is_delegated_to_the_hubs() {
        assert_eq!(errors(&with("name = \"erp.acme.test\"\ndnssec = true", HUBS)), Vec::<String>::new());
        one(&with("name = \"erp\"", HUBS), 3, "`erp` cannot be delegated");
        one(&with("name = \"192.0.2.7\"", HUBS), 3, "`192.0.2.7` cannot be delegated");
        one(&with("name = \"erp_1.acme.test\"", HUBS), 3, "cannot be delegated");
        one(&with("name = \"acme.test\"", HUBS), 3, "hub-1 has the endpoint hub1.acme.test, which is in the name");
        one(&with("name = \"HUB1.acme.test\"", HUBS), 3, "which is in the name hub1.acme.test");
        one(&with("dnssec = true", HUBS), 3, "dnssec needs a name");
    }

    #[test]
    fn warns_about_addresses_that_browsers_cannot_reach() {
        let found = warnings(&with("name = \"erp.acme.test\"", ["192.168.1.11", "198.18.0.2"]));
        assert!(found.iter().any(|w| w.contains("private addresses: hub-1 (192.168.1.11)")), "{found:#?}");
        let found = warnings(&with("name = \"erp.acme.test\"", HUBS));
        assert!(!found.iter().any(|w| w.contains("[dns]")), "{found:#?}");
    }
}
