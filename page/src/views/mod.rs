//! The page's parts, as HTML. Templates escape every value. Each part has an identifier, so that the server can send a
//! part again when it changes.

mod alerts;
mod chart;
mod history;
mod map;
mod nodes;
mod summary;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::OnceLock;

use minijinja::value::{Serde, Value};
use minijinja::{AutoEscape, Environment, UndefinedBehavior};
use serde::Serialize;

use crate::config::Fleet;
use crate::history::{Drawn, Fired, Promises, Range, Version};
use crate::state::{Health, State};

/// Everything that the page shows.
#[derive(Clone, Debug)]
pub(crate) struct Content<'a> {
    pub(crate) fleet: &'a Fleet,
    pub(crate) state: &'a State,
    pub(crate) graphs: Option<&'a [Drawn]>,
    pub(crate) versions: Option<&'a [Version]>,
    pub(crate) fired: Option<&'a [Fired]>,
    pub(crate) promises: Option<&'a Promises>,
    pub(crate) audit: &'a Audit,
}

/// The last requests of operators.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Audit {
    /// No node of the monitor writes them to a file.
    #[default]
    Absent,
    /// The newest first.
    Requests(Vec<Request>),
}

/// A request of an operator to a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    /// Unix time in seconds.
    pub(crate) at: u64,
    /// Node that got the request.
    pub(crate) node: String,
    /// Who, from where, what, and the result.
    pub(crate) text: String,
}

/// The person who looks at the page.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Viewer {
    /// Name and role, as the operator's own machine or the node's agent reports them.
    pub(crate) name: Option<String>,
    /// Whether links for actions work: `bakehouse open page` serves them on the operator's own machine.
    pub(crate) acts: bool,
    /// Range of the graphs.
    pub(crate) range: Range,
}

/// Templates, by the name of their part.
const TEMPLATES: [(&str, &str); 9] = [
    ("summary", include_str!("../../templates/summary.html")),
    ("map", include_str!("../../templates/map.html")),
    ("alerts", include_str!("../../templates/alerts.html")),
    ("recent", include_str!("../../templates/recent.html")),
    ("graphs", include_str!("../../templates/graphs.html")),
    ("nodes", include_str!("../../templates/nodes.html")),
    ("rollout", include_str!("../../templates/rollout.html")),
    ("backups", include_str!("../../templates/backups.html")),
    ("record", include_str!("../../templates/record.html")),
];
pub(crate) const SHELL: &str = include_str!("../../templates/page.html");

/// HTML of each part, by its identifier.
pub(crate) type Parts = BTreeMap<&'static str, String>;

fn environment() -> &'static Environment<'static> {
    static ENVIRONMENT: OnceLock<Environment<'static>> = OnceLock::new();
    ENVIRONMENT.get_or_init(|| {
        let mut environment = Environment::new();
        environment.set_auto_escape_callback(|_| AutoEscape::Html);
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        for (name, text) in TEMPLATES.into_iter().chain([("page", SHELL)]) {
            // A unit test renders every template.
            let _ = environment.add_template(name, text);
        }
        environment
    })
}

/// Renders a part. If the template fails, which is a fault of the page, the viewer sees a message in its place.
fn render(part: &'static str, context: &impl Serialize) -> String {
    let rendered = environment().get_template(part).and_then(|template| template.render(Serde(context)));
    rendered.unwrap_or_else(|e| {
        eprintln!("the part {part} cannot be rendered: {e:#}");
        format!("<p class=\"empty\">The page cannot show this part ({part}).</p>")
    })
}

/// Renders all parts.
pub(crate) fn parts(content: &Content, viewer: &Viewer) -> Parts {
    Parts::from([
        ("summary", render("summary", &summary::context(content))),
        ("map", render("map", &map::context(content))),
        ("alerts", render("alerts", &alerts::context(content, viewer))),
        ("recent", render("recent", &alerts::recent(content))),
        ("graphs", render("graphs", &chart::context(content, viewer))),
        ("nodes", render("nodes", &nodes::context(content, viewer))),
        ("rollout", render("rollout", &history::rollout(content))),
        ("backups", render("backups", &history::backups(content))),
        ("record", render("record", &history::record(content))),
    ])
}

/// Renders the whole page.
pub(crate) fn page(content: &Content, viewer: &Viewer, build: &str) -> String {
    #[derive(Serialize)]
    struct Shell<'a> {
        fleet: &'a str,
        monitor: &'a str,
        viewer: Option<&'a str>,
        build: &'a str,
        range: &'static str,
        parts: BTreeMap<&'static str, Value>,
    }
    let parts = parts(content, viewer).into_iter().map(|(name, html)| (name, Value::from_safe_string(html)));
    render(
        "page",
        &Shell {
            fleet: &content.fleet.name,
            monitor: &content.fleet.monitor,
            viewer: viewer.name.as_deref(),
            build,
            range: viewer.range.name(),
            parts: parts.collect(),
        },
    )
}

/// A button: a link to the operator's own machine, which asks before it acts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Button {
    pub(crate) text: String,
    pub(crate) href: String,
}

impl Button {
    /// Makes a button for a verb. The operator's machine checks the values again.
    fn new(text: impl Into<String>, verb: &str, node: Option<&str>, unit: Option<&str>) -> Self {
        use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
        let mut href = format!("act?verb={verb}");
        for (name, value) in [("node", node), ("unit", unit)] {
            if let Some(value) = value {
                href.push_str(&format!("&{name}={}", utf8_percent_encode(value, NON_ALPHANUMERIC)));
            }
        }
        Self { text: text.into(), href }
    }
}

/// Returns the name of a health in the style sheet.
fn class(health: Health) -> &'static str {
    match health {
        Health::Good => "good",
        Health::Unwell => "unwell",
        Health::Blind => "blind",
        Health::Down => "down",
        Health::Unknown => "unknown",
    }
}

/// Returns a health in words.
fn words(health: Health) -> &'static str {
    match health {
        Health::Good => "works",
        Health::Unwell => "has failed units",
        Health::Blind => "sends no metrics",
        Health::Down => "does not answer",
        Health::Unknown => "no information",
    }
}

/// Returns `one node`, `2 nodes`.
fn count(number: usize, one: &str, many: &str) -> String {
    if number == 1 { format!("1 {one}") } else { format!("{number} {many}") }
}

/// Returns names as a list for people. Long lists end with the number of the others.
fn names<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    const SHOWN: usize = 4;
    let all: Vec<&str> = names.into_iter().collect();
    let shown = all.iter().take(SHOWN).copied().collect::<Vec<_>>().join(", ");
    if all.len() > SHOWN { format!("{shown} and {} more", all.len() - SHOWN) } else { shown }
}

#[cfg(test)]
impl<'a> Content<'a> {
    /// Returns content without history.
    fn of(fleet: &'a Fleet, state: &'a State) -> Self {
        static AUDIT: Audit = Audit::Absent;
        Content { fleet, state, graphs: None, versions: None, fired: None, promises: None, audit: &AUDIT }
    }
}
