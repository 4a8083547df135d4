//! The template engine: minijinja with strict undefined values, in the builder and in the agent.

use std::collections::{BTreeMap, BTreeSet};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, UndefinedBehavior};
use serde::{Serialize, Serializer};

use crate::dns::dnssec_key;
use crate::lan::LanPlace;
use crate::membership::{Secrets, Tls};
use crate::odoo_server::OdooServer;
use crate::ports::Filter;
use crate::topology::{DNS, Node, Topology};
use crate::web::HubKey;

/// Variables of the templates that the agent renders on the node. The builder's checks use the same variables.
#[derive(Clone, Copy, Debug)]
pub struct NodeContext<'a> {
    /// All nodes, and the settings of the fleet.
    pub fleet: &'a Topology,
    /// The node that renders the template.
    pub node: &'a Node,
    /// Epoch of the node's slot: 1 for the first owner.
    pub epoch: u64,
    /// Memory, processors and disk of the machine.
    pub machine: MachineSize,
    /// Certificates and key of the node.
    pub tls: &'a Tls,
    /// Passwords of the fleet's services.
    pub secrets: &'a Secrets,
    /// Certificate and key for browsers, PEM. Default: the node's own.
    pub web: &'a str,
    /// Where this hub can hold the addresses of its local network.
    pub lan: &'a [LanPlace],
}

impl Serialize for NodeContext<'_> {
    /// Serializes the fields, `filter` with the input of the packet filter's template, `odoo` with the values of Odoo's
    /// configuration, and on monitors `alert_secrets` with the decrypted passwords of `[alerts]`.
    /// `dnssec_key` is the key of the zone on hubs that sign it, and `hook_token` the token of `[vip] hook` on hubs; both
    /// are empty on other nodes.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Variables<'a> {
            fleet: &'a Topology,
            node: &'a Node,
            epoch: u64,
            machine: MachineSize,
            tls: &'a Tls,
            secrets: &'a Secrets,
            web: &'a str,
            lan: &'a [LanPlace],
            filter: Filter,
            odoo: OdooServer,
            alert_secrets: BTreeMap<String, String>,
            dnssec_key: String,
            hook_token: String,
        }
        let Self { fleet, node, epoch, machine, tls, secrets, web, lan } = *self;
        let filter = Filter::for_node(fleet, node);
        let wanted = if node.has_role("monitor") { fleet.alerts.secrets() } else { BTreeSet::new() };
        let odoo = OdooServer::for_node(fleet, node, (machine.memory, machine.cpus), secrets);
        let alert_secrets = fleet.alert_secrets.values(secrets.alert_key().as_ref(), &fleet.name, &wanted);
        let hub_key = HubKey::derive(&fleet.name, &secrets.etcd_root).filter(|_| fleet.hook && node.hub > 0);
        let token = hub_key.and_then(|key| fleet.web_secrets.open(&key, Topology::HOOK_SECRET));
        let hook_token = token.and_then(|token| String::from_utf8(token).ok()).unwrap_or_default();
        let zone = fleet.dns.name.as_ref().filter(|_| fleet.dns.dnssec && node.has_role(DNS));
        let dnssec_key = zone.and_then(|zone| dnssec_key(&secrets.etcd_root, &fleet.name, zone)).unwrap_or_default();
        #[rustfmt::skip]
        let variables = Variables {
            fleet, node, epoch, machine, tls, secrets, web, lan, filter, odoo, alert_secrets, dnssec_key, hook_token,
        };
        variables.serialize(serializer)
    }
}

/// Size of the machine that a node runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MachineSize {
    /// Memory in MiB.
    pub memory: u64,
    /// Size of /var in MiB.
    pub var: u64,
    /// Number of processors.
    pub cpus: u64,
    /// Factor for the time-outs of failure detection (BFD, VRRP, etcd's elections, health checks): 1 on real
    /// processors, [`EMULATED_TIMEOUT_SCALE`] on processors that QEMU emulates.
    #[serde(rename = "patience")]
    pub timeout_scale: u64,
}

/// Factor for time-outs on emulated processors. With a smaller factor, BFD and etcd report slow machines as dead when
/// the host runs several of them.
pub const EMULATED_TIMEOUT_SCALE: u64 = 10;

/// Error in a template.
#[derive(Debug, thiserror::Error)]
#[error("{name}:{line}: {message}")]
pub struct RenderError {
    /// Name of the template, as the caller passed it.
    pub name: String,
    /// Line of the template, counted from 1.
    pub line: usize,
    /// The template engine's message.
    pub message: String,
}

fn environment() -> Environment<'static> {
    let mut env = Environment::new();
    env.set_undefined_behavior(UndefinedBehavior::Strict);
    // Lines with only a block tag leave no blank lines.
    let mut syntax = SyntaxConfig::builder();
    syntax.keep_trailing_newline(true).trim_blocks(true).lstrip_blocks(true);
    env.add_test("contains", |list: minijinja::Value, item: minijinja::Value| {
        list.try_iter().is_ok_and(|mut all| all.any(|v| v == item))
    });
    env.set_syntax(syntax.build().unwrap_or_default());
    // Configuration files are not HTML.
    env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    env
}

/// Renders `text` with `context`. The same inputs give the same bytes.
///
/// # Errors
/// If the template has a syntax error or an unknown variable. The error has the template's line.
///
/// # Examples
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let toml = b"name = \"acme\"\n[groups.hub]\ncount = 1\nendpoints = [\"hub.example.net\"]\n";
/// let topology = fleet::Topology::from_fleet(&fleet::Fleet::parse("fleet.toml", toml)?);
/// let member = fleet::Membership::sample();
/// let context = fleet::NodeContext {
///     fleet: &topology,
///     node: &topology.nodes[0],
///     epoch: 1,
///     machine: fleet::MachineSize { memory: 2048, var: 4096, cpus: 2, timeout_scale: 1 },
///     tls: &member.tls,
///     secrets: &member.secrets,
///     web: "",
///     lan: &[],
/// };
/// let text = fleet::render("motd.j2", "{{ node.name }} has {{ node.address }}\n", &context)?;
/// assert_eq!(text, "hub-1 has 10.10.0.1\n");
///
/// let error = fleet::render("motd.j2", "Welcome\n{{ node.nmae }}\n", &context).unwrap_err();
/// assert_eq!(error.line, 2);
/// # Ok(())
/// # }
/// ```
pub fn render(name: &str, text: &str, context: &impl Serialize) -> Result<String, RenderError> {
    environment().render_named_str(name, text, Serde(context)).map_err(|e| RenderError {
        name: name.to_owned(),
        line: e.line().unwrap_or(1),
        message: e.detail().map_or_else(|| e.kind().to_string(), |d| format!("{}: {d}", e.kind())),
    })
}

/// Returns the variables that a template takes from its context, such as `node.address`.
///
/// # Examples
///
/// ```
/// let text = "{% for hub in fleet.hubs %}{{ hub.address }}{% endfor %} {{ node.name }}";
/// let names: Vec<String> = fleet::variables(text).into_iter().collect();
/// assert_eq!(names, ["fleet.hubs", "node.name"]);
/// ```
#[must_use]
pub fn variables(text: &str) -> BTreeSet<String> {
    let env = environment();
    env.template_from_str(text).map(|t| t.undeclared_variables(true).into_iter().collect()).unwrap_or_default()
}

/// Returns, for each line of the rendered text, the template's line that it came from, or 0 if that is not known. The
/// builder uses it to report a daemon's error with the line of the template.
///
/// # Examples
///
/// ```
/// let context = std::collections::BTreeMap::from([("ports", [80, 443])]);
/// let template = "# Ports\n{% for port in ports %}\nlisten {{ port }}\n{% endfor %}\n";
/// assert_eq!(fleet::render("x.j2", template, &context).unwrap(), "# Ports\nlisten 80\nlisten 443\n");
/// // Both `listen` lines come from line 3.
/// assert_eq!(fleet::line_map("x.j2", template, &context), [1, 3, 3]);
/// ```
#[must_use]
pub fn line_map(name: &str, text: &str, context: &impl Serialize) -> Vec<usize> {
    const OPEN: char = '\u{E000}';
    const CLOSE: char = '\u{E001}';
    let Ok(plain) = render(name, text, context) else { return Vec::new() };
    let unknown = vec![0; plain.lines().count()];
    // Lines with block tags get no mark, because the engine trims their white space.
    let marked: String = text
        .split_inclusive('\n')
        .enumerate()
        .map(|(i, line)| match line.strip_suffix('\n') {
            Some(body) if !body.contains("{%") && !body.contains("{#") => {
                format!("{body}{OPEN}{}{CLOSE}\n", i + 1)
            }
            _ => line.to_owned(),
        })
        .collect();
    let Ok(rendered) = render(name, &marked, context) else { return unknown };
    let mut stripped = String::new();
    let mut map = Vec::new();
    for line in rendered.split_inclusive('\n') {
        match (line.find(OPEN), line.find(CLOSE)) {
            (Some(open), Some(close)) if open < close => {
                map.push(line[open + OPEN.len_utf8()..close].parse().unwrap_or(0));
                stripped.push_str(&line[..open]);
                stripped.push_str(&line[close + CLOSE.len_utf8()..]);
            }
            _ => {
                map.push(0);
                stripped.push_str(line);
            }
        }
    }
    if stripped == plain { map } else { unknown }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_variable_has_a_line() {
        let e = render("x.j2", "a\n{{ nope }}\n", &()).unwrap_err();
        assert_eq!((e.name.as_str(), e.line), ("x.j2", 2));
    }

    #[test]
    fn line_map_returns_lines_of_the_template() {
        let context = serde_json::json!({ "xs": [1, 2] });
        let text = "top\n{% for x in xs %}\nx={{ x }}\n{% endfor %}\nend\n";
        assert_eq!(render("t", text, &context).unwrap(), "top\nx=1\nx=2\nend\n");
        assert_eq!(line_map("t", text, &context), [1, 3, 3, 5]);
    }
}
