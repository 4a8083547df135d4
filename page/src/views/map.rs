//! The map: hubs, groups of nodes, the paths between them, and what the nodes hold. It is drawn twice, for wide and for
//! narrow screens.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{Content, class, count, words};
use crate::config::Node;
use crate::format::{duration, whole};
use crate::state::{Database, Health, NodeState, Path};

#[derive(Debug, Serialize)]
pub(super) struct Maps {
    /// Sentence with the content of the picture.
    label: String,
    maps: [Map; 2],
}

#[derive(Debug, Serialize)]
struct Map {
    class: &'static str,
    width: f64,
    height: f64,
    clients: Option<Clients>,
    wires: Vec<Wire>,
    groups: Vec<Group>,
    cards: Vec<Card>,
    dots: Vec<Dot>,
}

/// Box of the fleet's clients above the hubs.
#[derive(Debug, Serialize)]
struct Clients {
    x: f64,
    width: f64,
    text: String,
}

#[derive(Debug, Serialize)]
struct Wire {
    d: String,
    class: &'static str,
    title: String,
}

#[derive(Debug, Serialize)]
struct Group {
    x: f64,
    y: f64,
    width: f64,
    height: f64,
    title: String,
}

#[derive(Debug, Serialize)]
struct Card {
    x: f64,
    y: f64,
    width: f64,
    name: String,
    /// The node's row in the table.
    href: String,
    label: String,
    health: &'static str,
    is_drained: bool,
    badges: Vec<Badge>,
}

#[derive(Debug, Serialize)]
struct Badge {
    x: f64,
    width: f64,
    text: &'static str,
    class: &'static str,
}

/// A node of a large group.
#[derive(Debug, Serialize)]
struct Dot {
    x: f64,
    y: f64,
    health: &'static str,
    is_drained: bool,
    title: String,
}

const CARD_HEIGHT: f64 = 54.0;
const GAP: f64 = 14.0;
const PADDING: f64 = 14.0;
/// Height of a group's title.
const TITLE: f64 = 24.0;
/// Space for the wires between hubs and groups.
const WIRES: f64 = 78.0;
/// Top of the hubs, below the clients and the link that passes over other hubs.
const HUBS: f64 = 74.0;
const DOT: f64 = 13.0;
/// Width of a character in a badge.
const CHARACTER: f64 = 6.3;
/// Number of nodes of a group that have cards.
const CARDS: usize = 12;

pub(super) fn context(content: &Content) -> Maps {
    let state = content.state;
    let down = state.paths.iter().filter(|path| path.up == Some(false)).count();
    let holder = |names: &[String]| if names.is_empty() { "no node".to_owned() } else { names.join(", ") };
    let mut label = format!("Map of {}", count(content.fleet.nodes.len(), "node", "nodes"));
    if content.fleet.with_role("hub").next().is_some() {
        label.push_str(&format!(". {} holds the VIP", holder(&state.vip)));
    }
    if content.fleet.with_role("db").next().is_some() {
        let primaries: Vec<String> = state.primaries().into_iter().map(str::to_owned).collect();
        label.push_str(&format!(". {} has the primary", holder(&primaries)));
    }
    match state.nodes.iter().filter(|node| node.drained.is_some()).count() {
        0 => {}
        drained => label.push_str(&format!(". {} drained", count(drained, "node is", "nodes are"))),
    }
    label.push_str(&match down {
        0 => ". No path is down.".to_owned(),
        down => format!(". {} down.", count(down, "path is", "paths are")),
    });
    let states: BTreeMap<&str, &NodeState> = state.nodes.iter().map(|node| (node.name.as_str(), node)).collect();
    let draw = |class, width, card| Drawing { content, states: &states, width, card }.map(class);
    Maps { label, maps: [draw("wide", 1080.0, 138.0), draw("narrow", 372.0, 104.0)] }
}

struct Drawing<'a> {
    content: &'a Content<'a>,
    /// States of the nodes by name.
    states: &'a BTreeMap<&'a str, &'a NodeState>,
    width: f64,
    /// Width of a card.
    card: f64,
}

/// A node's place.
struct Place<'a> {
    node: &'a Node,
    x: f64,
    y: f64,
}

/// A group's place.
struct Area<'a> {
    group: Group,
    nodes: Vec<&'a Node>,
    columns: usize,
    has_cards: bool,
}

impl Drawing<'_> {
    fn map(&self, class: &'static str) -> Map {
        let fleet = self.content.fleet;
        let hubs: Vec<&Node> = fleet.nodes.iter().filter(|node| node.hub > 0).collect();
        let (hub_places, hubs_end) = self.rows(&hubs, HUBS);
        let (areas, height) = self.areas(hubs_end + WIRES);
        let mut places: Vec<Place> = hub_places;
        let mut dots = Vec::new();
        for area in &areas {
            let (x, y) = (area.group.x + PADDING, area.group.y + TITLE);
            for (i, node) in area.nodes.iter().enumerate() {
                let (column, row) = ((i % area.columns) as f64, (i / area.columns) as f64);
                if area.has_cards {
                    let place = Place { node, x: x + column * (self.card + GAP), y: y + row * (CARD_HEIGHT + GAP) };
                    places.push(place);
                } else {
                    let (health, mut title) = self.health(node);
                    let is_drained = self.state(node).is_some_and(|of| of.drained.is_some());
                    if is_drained {
                        title.push_str(", drained");
                    }
                    let (x, y) = (x + column * DOT + DOT / 2.0, y + row * DOT + DOT / 2.0);
                    dots.push(Dot { x, y, health, is_drained, title });
                }
            }
        }
        let wires = self.wires(&places, &areas);
        let clients =
            places.iter().find(|place| self.content.state.vip.first() == Some(&place.node.name)).map(|place| {
                let width = 132.0_f64.min(self.width);
                let middle = (place.x + self.card / 2.0).clamp(width / 2.0, self.width - width / 2.0);
                Clients { x: middle - width / 2.0, width, text: format!("VIP {}", fleet.vip) }
            });
        Map {
            class,
            width: self.width,
            height: height.max(hubs_end),
            clients,
            wires,
            cards: places.iter().map(|place| self.card_of(place)).collect(),
            groups: areas.into_iter().map(|area| area.group).collect(),
            dots,
        }
    }

    /// Places nodes in centred rows. Returns the places, and the end of the last row.
    fn rows<'n>(&self, nodes: &[&'n Node], top: f64) -> (Vec<Place<'n>>, f64) {
        let columns = whole((self.width + GAP) / (self.card + GAP)).max(1);
        // More space between hubs, so that their wires are apart.
        let gap = if nodes.len() <= columns {
            ((self.width - nodes.len() as f64 * self.card) / (nodes.len() as f64 + 1.0)).clamp(GAP, 120.0)
        } else {
            GAP
        };
        let mut places = Vec::new();
        let mut y = top;
        for row in nodes.chunks(columns) {
            let length = row.len() as f64 * (self.card + gap) - gap;
            let begin = ((self.width - length) / 2.0).max(0.0);
            places.extend(row.iter().enumerate().map(|(i, node)| Place {
                node,
                x: begin + i as f64 * (self.card + gap),
                y,
            }));
            y += CARD_HEIGHT + GAP;
        }
        (places, if nodes.is_empty() { top } else { y - GAP })
    }

    /// Places the groups that have no hubs, one after the other, in as many rows as necessary.
    fn areas(&self, top: f64) -> (Vec<Area<'_>>, f64) {
        let fleet = self.content.fleet;
        let mut groups: Vec<(&str, Vec<&Node>)> = Vec::new();
        for node in fleet.nodes.iter().filter(|node| node.hub == 0) {
            match groups.iter_mut().find(|(name, _)| *name == node.group) {
                Some((_, nodes)) => nodes.push(node),
                None => groups.push((&node.group, vec![node])),
            }
        }
        // Databases first: they are what the others need.
        groups.sort_by_key(|(_, nodes)| nodes.first().is_none_or(|node| !node.has_role("db")));
        let mut areas: Vec<Area> = Vec::new();
        let (mut x, mut y, mut row_height) = (0.0_f64, top, 0.0_f64);
        let mut row_start = 0;
        for (name, nodes) in groups {
            let has_cards = nodes.len() <= CARDS;
            let cell = if has_cards { self.card + GAP } else { DOT };
            let fit = whole((self.width - 2.0 * PADDING + if has_cards { GAP } else { 0.0 }) / cell).max(1);
            let wanted = if has_cards { nodes.len().min(4) } else { nodes.len().div_ceil(12).max(20) };
            let columns = wanted.min(fit).max(1);
            let rows = nodes.len().div_ceil(columns) as f64;
            let inner = columns as f64 * cell - if has_cards { GAP } else { 0.0 };
            let width = (inner + 2.0 * PADDING).max(90.0);
            let height = if has_cards { rows * (CARD_HEIGHT + GAP) - GAP } else { rows * DOT } + TITLE + PADDING;
            if x > 0.0 && x + width > self.width {
                self.centre(&mut areas[row_start..], x - GAP);
                (x, y, row_height, row_start) = (0.0, y + row_height + GAP, 0.0, areas.len());
            }
            let title = self.title(name, &nodes);
            areas.push(Area { group: Group { x, y, width, height, title }, nodes, columns, has_cards });
            x += width + GAP;
            row_height = row_height.max(height);
        }
        self.centre(&mut areas[row_start..], x - GAP);
        (areas, y + row_height + 2.0)
    }

    fn centre(&self, row: &mut [Area], length: f64) {
        let shift = ((self.width - length) / 2.0).max(0.0);
        for area in row {
            area.group.x += shift;
        }
    }

    fn title(&self, name: &str, nodes: &[&Node]) -> String {
        let healthy = nodes.iter().filter(|node| self.state(node).is_some_and(|s| s.health == Health::Good)).count();
        let drained = nodes.iter().filter(|node| self.state(node).is_some_and(|s| s.drained.is_some())).count();
        match (nodes.len(), drained) {
            (1, _) => name.to_owned(),
            (all, 0) => format!("{name}: {healthy} of {all} work"),
            (all, drained) => format!("{name}: {healthy} of {all} work, {drained} drained"),
        }
    }

    fn state(&self, node: &Node) -> Option<&NodeState> {
        self.states.get(node.name.as_str()).copied()
    }

    fn health(&self, node: &Node) -> (&'static str, String) {
        let state = self.state(node);
        let health = state.map_or(Health::Unknown, |state| state.health);
        let text = words(health);
        (class(health), format!("{}: {text}", node.name))
    }

    fn card_of(&self, place: &Place) -> Card {
        let (node, state) = (place.node, self.content.state);
        let (health, mut label) = self.health(node);
        let mut texts: Vec<(&'static str, &'static str)> = Vec::new();
        let mut add = |text, class, words: &str| {
            texts.push((text, class));
            label.push_str(", ");
            label.push_str(words);
        };
        let is_drained = self.state(node).is_some_and(|of| of.drained.is_some());
        if is_drained {
            add("drained", "drained", "is drained");
        }
        if state.vip.contains(&node.name) {
            add("VIP", "key", "holds the VIP");
        }
        let of_node = self.state(node);
        match of_node.and_then(|of| of.database) {
            Some(Database::Primary) => add("primary", "key", "has the primary"),
            Some(Database::Standby { sync: true, .. }) => add("sync", "plain", "is the synchronous standby"),
            Some(Database::Standby { .. }) => add("standby", "plain", "is a standby"),
            Some(Database::Stopped) => add("stopped", "bad", "PostgreSQL does not run"),
            None => {}
        }
        if state.etcd_leader.contains(&node.name) {
            add("leader", "plain", "leads etcd");
        } else if state.votes.contains(&node.name) {
            add("vote", "plain", "has a vote in etcd");
        } else if self.content.fleet.voters.contains(&node.name) && state.has_metrics {
            add("no vote", "bad", "its etcd has no leader");
        }
        match of_node.and_then(|of| of.odoo) {
            Some(true) => add("Odoo", "plain", "serves Odoo"),
            // HAProxy does not use a drained node.
            Some(false) if is_drained => {}
            Some(false) => add("no Odoo", "bad", "HAProxy sends it no requests"),
            None => {}
        }
        if let Some(uptime) = of_node.and_then(|of| of.uptime) {
            label.push_str(&format!(", runs since {}", duration(uptime)));
        }
        let mut x = 10.0;
        let mut badges = Vec::new();
        for (text, class) in texts {
            let width = text.chars().count() as f64 * CHARACTER + 10.0;
            if x + width > self.card - 4.0 {
                break;
            }
            badges.push(Badge { x, width, text, class });
            x += width + 4.0;
        }
        let href = if self.content.fleet.is_small() { format!("#node-{}", node.name) } else { "#nodes".to_owned() };
        let (x, y, name) = (round(place.x), round(place.y), node.name.clone());
        Card { x, y, width: self.card, name, href, label, health, is_drained, badges }
    }

    /// Returns the wires: those that are up first, so that those that are down are above them.
    fn wires(&self, places: &[Place], areas: &[Area]) -> Vec<Wire> {
        let find = |name: &str| places.iter().find(|place| place.node.name == name);
        let mut wires: Vec<(u8, Wire)> = Vec::new();
        if let Some(holder) = self.content.state.vip.first().and_then(|name| find(name)) {
            let (x, top) = (round(holder.x + self.card / 2.0), round(holder.y));
            let d = format!("M{x},30V{top}");
            wires.push((3, Wire { d, class: "clients", title: "clients reach the VIP here".to_owned() }));
        }
        for path in &self.content.state.paths {
            let Some(hub) = find(&path.hub) else { continue };
            if let Some(from) = find(&path.from) {
                let d = if from.node.hub > 0 {
                    self.between_hubs(from, hub)
                } else {
                    self.down_from(hub, from.x + self.card / 2.0, from.y)
                };
                wires.push(wire(d, path));
            }
        }
        // A group of dots has one wire to each hub.
        for area in areas.iter().filter(|area| !area.has_cards) {
            for hub in places.iter().filter(|place| place.node.hub > 0) {
                let is_down = |path: &&Path| {
                    path.hub == hub.node.name
                        && path.up == Some(false)
                        && area.nodes.iter().any(|n| n.name == path.from)
                };
                let down = self.content.state.paths.iter().filter(is_down).count();
                let d = self.down_from(hub, area.group.x + area.group.width / 2.0, area.group.y);
                let title = format!(
                    "{} – {}: {} of {} paths are up",
                    hub.node.name,
                    area.nodes[0].group,
                    area.nodes.len() - down,
                    area.nodes.len()
                );
                let (rank, class) = match down {
                    0 => (0, "up thick"),
                    down if down < area.nodes.len() => (1, "some thick"),
                    _ => (2, "down thick"),
                };
                wires.push((rank, Wire { d, class, title }));
            }
        }
        wires.sort_by_key(|(rank, _)| *rank);
        wires.into_iter().map(|(_, wire)| wire).collect()
    }

    /// Returns the curve from the lower edge of a hub to a point below.
    fn down_from(&self, hub: &Place, x: f64, y: f64) -> String {
        let (x0, y0) = (hub.x + self.card / 2.0, hub.y + CARD_HEIGHT);
        let [x0, y0, middle, x, y] = [x0, y0, f64::midpoint(y0, y), x, y].map(round);
        format!("M{x0},{y0}C{x0},{middle} {x},{middle} {x},{y}")
    }

    /// Returns the line between two hubs: straight between neighbours, else over the others.
    fn between_hubs(&self, one: &Place, other: &Place) -> String {
        let (left, right) = if one.x <= other.x { (one, other) } else { (other, one) };
        let distance = right.x - left.x;
        if (left.y - right.y).abs() < 1.0 && distance < 2.0 * self.card + GAP {
            let y = round(left.y + CARD_HEIGHT / 2.0);
            return format!("M{},{y}H{}", round(left.x + self.card), round(right.x));
        }
        let (x0, x1) = (left.x + self.card * 0.75, right.x + self.card * 0.25);
        let top = left.y.min(right.y) - 22.0;
        format!(
            "M{},{}C{},{} {},{} {},{}",
            round(x0),
            round(left.y),
            round(x0 + 24.0),
            round(top),
            round(x1 - 24.0),
            round(top),
            round(x1),
            round(right.y)
        )
    }
}

fn wire(d: String, path: &Path) -> (u8, Wire) {
    let (rank, class, text) = match path.up {
        Some(true) => (0, "up", "up"),
        None => (1, "unknown", "no metrics"),
        Some(false) => (2, "down", "down"),
    };
    (rank, Wire { d, class, title: format!("{} – {}: {text}", path.from, path.hub) })
}

fn round(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::Reachable;
    use crate::state::State;
    use crate::testing;

    fn maps(fleet: &crate::config::Fleet, reachable: &Reachable) -> Maps {
        let state = State::new(fleet, 0.0, &testing::replies(fleet), Vec::new(), reachable);
        context(&Content::of(fleet, &state))
    }

    #[test]
    fn every_node_has_a_place_inside_the_picture() {
        for fleet in [testing::fleet(), testing::large_fleet(12), testing::large_fleet(1000)] {
            for map in maps(&fleet, &Reachable::new()).maps {
                assert_eq!(map.cards.len() + map.dots.len(), fleet.nodes.len());
                for card in &map.cards {
                    assert!(
                        card.x >= 0.0 && card.x + card.width <= map.width && card.y + CARD_HEIGHT <= map.height,
                        "{card:?}"
                    );
                }
                for dot in &map.dots {
                    assert!(dot.x > 0.0 && dot.x < map.width && dot.y < map.height, "{dot:?}");
                }
                for (i, card) in map.cards.iter().enumerate() {
                    let overlaps =
                        |other: &&Card| (other.x - card.x).abs() < card.width && (other.y - card.y).abs() < CARD_HEIGHT;
                    assert_eq!(
                        map.cards[i + 1..].iter().find(overlaps).map(|other| &other.name),
                        None,
                        "{}",
                        card.name
                    );
                }
            }
        }
    }

    #[test]
    fn the_label_has_what_the_picture_shows() {
        let fleet = testing::fleet();
        let all = maps(&fleet, &Reachable::new());
        assert_eq!(all.label, "Map of 8 nodes. hub-1 holds the VIP. db-1 has the primary. No path is down.");
        let [wide, _] = all.maps;
        let card = |name: &str| wide.cards.iter().find(|card| card.name == name).unwrap();
        let badges = |name: &str| card(name).badges.iter().map(|badge| badge.text).collect::<Vec<_>>();
        assert_eq!(badges("hub-1"), ["VIP", "vote"]);
        assert_eq!((badges("hub-2"), badges("db-1"), badges("app-1")), (vec!["leader"], vec!["primary"], vec!["Odoo"]));
        assert!(card("hub-1").label.starts_with("hub-1: works, holds the VIP, has a vote in etcd"));
        assert_eq!(wide.wires.len(), 19);

        let cut = maps(&fleet, &Reachable::from([("hub-1".to_owned(), false)]));
        assert_eq!(cut.label, "Map of 8 nodes. no node holds the VIP. db-1 has the primary. 7 paths are down.");
        let [wide, _] = cut.maps;
        assert!(wide.clients.is_none());
        // Wires that are down are above the others.
        assert!(wide.wires.iter().rev().take(7).all(|wire| wire.class == "down"));
    }
}
