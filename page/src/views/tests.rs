//! Tests of whole pages: every template, and hostile texts of nodes in every place.

use super::*;
use crate::history::{Kept, Line};
use crate::probe::Reachable;
use crate::prometheus::{Alert, Window};
use crate::queries;
use crate::state::Replies;
use crate::testing;

/// Texts that a hostile node could put into labels of its metrics.
const HOSTILE: &str = r#""><script>alert(1)</script><img src=x onerror=alert(2)>'{{ 7 * 7 }}&lt;javascript:"#;

fn alert(labels: &[(&str, &str)], annotations: &[(&str, &str)]) -> Alert {
    let map = |pairs: &[(&str, &str)]| pairs.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
    let since = "2026-11-30T00:00:00.123Z".to_owned();
    Alert { labels: map(labels), annotations: map(annotations), state: "firing".to_owned(), since, muted: None }
}

fn drawn(name: &str) -> Vec<Drawn> {
    let window = Window { start: 0.0, end: 3600.0, step: 20.0 };
    let graphs = queries::graphs(&testing::fleet(), 20.0);
    let line =
        || Line { name: name.to_owned(), values: (0..=180).map(|i| (i % 7 != 0).then_some(f64::from(i))).collect() };
    let lines = |i: usize| match i {
        0 => Err(HOSTILE.to_owned()),
        1 => Ok(Vec::new()),
        2 => Ok(vec![line()]),
        _ => Ok((0..10).map(|_| line()).collect()),
    };
    graphs.into_iter().enumerate().map(|(i, graph)| Drawn { graph, window, lines: lines(i) }).collect()
}

#[test]
fn hostile_texts_never_become_markup() {
    let fleet = testing::fleet();
    let mut replies = testing::replies(&fleet);
    testing::add(&mut replies, "failed", &[("node", "db-2"), ("name", HOSTILE)], 1.0);
    testing::add(&mut replies, "version", &[("node", "app-1"), ("image_version", HOSTILE)], 1.0);
    testing::add(&mut replies, "probe", &[("job", HOSTILE)], 0.0);
    for (query, label) in [("up", "node"), ("vip", "node"), ("paths", "name"), ("odoo", "server"), ("lag", "node")] {
        testing::add(&mut replies, query, &[(label, HOSTILE)], 1.0);
    }
    let alerts = vec![
        alert(
            &[("alertname", HOSTILE), ("node", HOSTILE), ("severity", HOSTILE)],
            &[
                ("summary", HOSTILE),
                ("impact", HOSTILE),
                ("runbook", &format!("{HOSTILE} `{HOSTILE}`\nType `bakehouse restart db-2 {HOSTILE}`.")),
            ],
        ),
        alert(&[("alertname", "A"), ("severity", "critical")], &[]),
    ];
    let mut state = State::new(&fleet, 1_796_000_000.0, &replies, alerts, &Reachable::new());
    state.missing = vec![HOSTILE.to_owned()];
    let versions = [Version {
        version: HOSTILE.to_owned(),
        first: Some(1_795_000_000.0),
        last: 1_795_009_000.0,
        nodes: 2,
        now: 1,
    }];
    let fired = [Fired {
        name: HOSTILE.to_owned(),
        node: Some(HOSTILE.to_owned()),
        severity: HOSTILE.to_owned(),
        from: 0.0,
        to: 60.0,
    }];
    let promises = Promises {
        since: 1_795_000_000.0,
        kept: vec![Kept { title: "T", share: Some(0.9), measured: 0.5, failed: 3.0, broken: 15.0 }],
        promotions: Some(2.0),
    };
    let audit = Audit::Requests(vec![Request { at: 1, node: HOSTILE.to_owned(), text: HOSTILE.to_owned() }]);
    let graphs = drawn(HOSTILE);
    let content = Content {
        fleet: &fleet,
        state: &state,
        graphs: Some(&graphs),
        versions: Some(&versions),
        fired: Some(&fired),
        promises: Some(&promises),
        audit: &audit,
    };
    for acts in [false, true] {
        let viewer = Viewer { name: Some(HOSTILE.to_owned()), acts, range: Range::Day };
        let html = page(&content, &viewer, "build");
        assert!(!html.contains("cannot show this part"), "a template fails");
        assert_eq!(html.matches("<script").count(), 1, "only the page's own script");
        for text in ["<img src=x", "onerror=alert(2)>", "alert(1)</script>", "49&lt;", "href=\"javascript"] {
            assert!(!html.contains(text), "{text}");
        }
        assert!(html.contains("&lt;script&gt;alert(1)"), "the text itself is there");
        assert_eq!(html.contains("href=\"act?verb=reboot&amp;node=hub%2D1\""), acts);
        assert!(!html.contains("unit=%22"), "a unit with such a name has no button");
        // The policy of the page forbids these.
        for text in [" style=", " onclick=", "http://", "https://"] {
            assert!(!html.contains(text), "{text}");
        }
    }
}

#[test]
fn an_empty_fleet_and_missing_sources_have_a_page() {
    let mut fleet = testing::fleet();
    let state = State::new(&fleet, 0.0, &Replies::default(), Vec::new(), &Reachable::new());
    let html = page(&Content::of(&fleet, &state), &Viewer::default(), "build");
    for text in
        ["Prometheus has no answer yet", "does not know the alerts", "Reading the graphs", "Reading the history"]
    {
        assert!(html.contains(text), "{text}");
    }
    // A fleet of one application node: no hubs, no database, no backups.
    fleet.nodes.retain(|node| node.name == "app-1");
    (fleet.voters, fleet.backups, fleet.updates) = (Vec::new(), false, false);
    let state = State::new(&fleet, 0.0, &testing::replies(&fleet), Vec::new(), &Reachable::new());
    let html = page(&Content::of(&fleet, &state), &Viewer::default(), "build");
    for text in ["The node works", "makes no backups", "do not update themselves"] {
        assert!(html.contains(text), "{text}");
    }
    assert!(!html.contains("cannot show this part") && !html.contains("<span class=\"label\">VIP"));
}

#[test]
fn a_drained_node_is_marked_with_a_text_on_the_map_and_in_the_table() {
    for (fleet, node, group) in [
        (testing::fleet(), "app-2", "app: 2 of 2 work, 1 drained"),
        (testing::large_fleet(1000), "app-700", "app: 1000 of 1000 work, 1 drained"),
    ] {
        let mut replies = testing::replies(&fleet);
        let metric = ("__name__", "bakehouse_drained_since_seconds");
        testing::add(&mut replies, queries::METRICS, &[metric, ("node", node)], 1_796_000_000.0 - 7200.0);
        let state = State::new(&fleet, 1_796_000_000.0, &replies, Vec::new(), &Reachable::new());
        let html = page(&Content::of(&fleet, &state), &Viewer::default(), "build");
        assert!(html.contains(". 1 node is drained. No path is down.") && html.contains(group), "{group}");
        let shape =
            if fleet.is_small() { "<g class=\"node good drained\"" } else { "<circle class=\"dot good drained\"" };
        // One on each of the two maps.
        assert_eq!(html.matches(shape).count(), 2, "{shape}");
        let title = if fleet.is_small() { "app-2: works, is drained, serves Odoo" } else { "app-700: works, drained" };
        assert!(html.contains(title), "{title}");
        assert_eq!(html.contains("text-anchor=\"middle\">drained</text>"), fleet.is_small());
        let row = html.split(&format!("id=\"node-{node}\"")).nth(1).expect("a row of the node");
        assert!(row.split("</tr>").next().is_some_and(|row| row.contains("drained for 2 h")), "{row:.900}");
    }
}

#[test]
fn a_thousand_nodes_are_a_small_page() {
    let fleet = testing::large_fleet(1000);
    let begun = std::time::Instant::now();
    let state = State::new(&fleet, 0.0, &testing::replies(&fleet), Vec::new(), &Reachable::new());
    let html = page(&Content::of(&fleet, &state), &Viewer::default(), "build");
    assert!(html.len() < 500_000, "{} bytes", html.len());
    assert!(begun.elapsed().as_secs_f64() < 5.0, "{:?}", begun.elapsed());
}

#[test]
fn parts_that_did_not_change_are_the_same_bytes() {
    let fleet = testing::fleet();
    let state = |at| State::new(&fleet, at, &testing::replies(&fleet), Vec::new(), &Reachable::new());
    let (one, two) = (state(1_796_000_000.0), state(1_796_000_002.0));
    let viewer = Viewer::default();
    let (before, after) = (parts(&Content::of(&fleet, &one), &viewer), parts(&Content::of(&fleet, &two), &viewer));
    assert_eq!(before, after);
    assert_eq!(before.len(), TEMPLATES.len());
}
