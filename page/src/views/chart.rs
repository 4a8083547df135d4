//! Graphs, drawn by the server.

use serde::Serialize;

use super::{Content, Viewer};
use crate::format::{Unit, axis_time, whole};
use crate::history::{Drawn, Line, Range};

#[derive(Debug, Serialize)]
pub(super) struct Graphs {
    ranges: Vec<RangeLink>,
    /// Whether the graphs are still being read.
    waiting: bool,
    graphs: Vec<Chart>,
}

#[derive(Debug, Serialize)]
struct RangeLink {
    name: &'static str,
    title: &'static str,
    current: bool,
}

#[derive(Debug, Serialize)]
struct Chart {
    id: &'static str,
    title: &'static str,
    note: &'static str,
    /// Reason why there are no lines.
    empty: Option<String>,
    grid: Vec<Grid>,
    times: Vec<Tick>,
    lines: Vec<Shape>,
    /// For the script that shows values under the pointer.
    start: f64,
    step: f64,
    points: usize,
}

/// A horizontal line with its value.
#[derive(Debug, Serialize)]
struct Grid {
    y: f64,
    text: String,
}

#[derive(Debug, Serialize)]
struct Tick {
    x: f64,
    text: String,
    anchor: &'static str,
}

#[derive(Debug, Serialize)]
struct Shape {
    name: String,
    /// Number of the line's colour.
    colour: usize,
    /// Whether the line is dashed, because another line has the colour.
    is_dashed: bool,
    d: String,
    /// The surface below the only line of a graph.
    area: Option<String>,
    now: String,
    highest: String,
    /// Values as texts, separated by `|`, for the script.
    values: String,
}

/// Number of colours in the style sheet.
const COLOURS: usize = 8;
/// The surface of the lines, in the units of the picture.
pub(super) const LEFT: f64 = 52.0;
pub(super) const RIGHT: f64 = 408.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 128.0;
/// Number of lines with a legend. Others would have no colour of their own.
const MOST_LINES: usize = 40;

pub(super) fn context(content: &Content, viewer: &Viewer) -> Graphs {
    let title = |range: Range| match range {
        Range::Hour => "last hour",
        Range::SixHours => "last 6 hours",
        Range::Day => "last 24 hours",
        Range::Week => "last 7 days",
        Range::Month => "last 30 days",
    };
    let ranges =
        Range::ALL.map(|range| RangeLink { name: range.name(), title: title(range), current: range == viewer.range });
    let graphs = content.graphs.unwrap_or_default();
    Graphs { ranges: ranges.into(), waiting: content.graphs.is_none(), graphs: graphs.iter().map(chart).collect() }
}

fn chart(drawn: &Drawn) -> Chart {
    let (graph, window) = (&drawn.graph, drawn.window);
    let length = window.end - window.start;
    let points = whole((length / window.step).round()) + 1;
    let (lines, empty) = match &drawn.lines {
        Ok(lines) if lines.iter().any(|line| line.values.iter().any(Option::is_some)) => (lines.as_slice(), None),
        Ok(_) => (&[][..], Some("There is no data in this range.".to_owned())),
        Err(e) => (&[][..], Some(format!("{e}."))),
    };
    let highest = lines.iter().flat_map(|line| line.values.iter().flatten()).copied().fold(0.0, f64::max);
    let scale = Scale::new(highest, graph.top, graph.unit);
    let time = |share: f64, anchor| Tick {
        x: LEFT + share * (RIGHT - LEFT),
        text: axis_time(window.start + share * length, length),
        anchor,
    };
    let shape = |(i, line): (usize, &Line)| Shape {
        name: line.name.clone(),
        colour: i % COLOURS,
        is_dashed: i >= COLOURS,
        d: path(&line.values, &scale),
        area: (lines.len() == 1).then(|| area(&line.values, &scale)),
        now: text(graph.unit, line.values.iter().rev().flatten().next()),
        highest: text(graph.unit, line.values.iter().flatten().max_by(|a, b| a.total_cmp(b))),
        values: values(&line.values, graph.unit),
    };
    Chart {
        id: graph.id,
        title: graph.title,
        note: graph.note,
        empty,
        grid: scale.grid(),
        times: vec![time(0.0, "start"), time(0.5, "middle"), time(1.0, "end")],
        lines: lines.iter().take(MOST_LINES).enumerate().map(shape).collect(),
        start: window.start,
        step: window.step,
        points,
    }
}

fn text(unit: Unit, value: Option<&f64>) -> String {
    value.map_or_else(|| "–".to_owned(), |value| unit.text(*value))
}

fn values(values: &[Option<f64>], unit: Unit) -> String {
    values.iter().map(|value| value.map(|value| unit.text(value)).unwrap_or_default()).collect::<Vec<_>>().join("|")
}

/// The vertical axis, from 0 to a round value.
struct Scale {
    top: f64,
    step: f64,
    unit: Unit,
}

impl Scale {
    fn new(highest: f64, top: Option<f64>, unit: Unit) -> Self {
        if let Some(top) = top {
            return Self { top, step: top / 2.0, unit };
        }
        // Without data, and where everything is 0.
        let least = match unit {
            Unit::Bytes | Unit::BytesPerSecond => 1000.0,
            Unit::Seconds => 0.01,
            _ => 1.0,
        };
        let rough = highest.max(least) / 2.0;
        let power = 10.0_f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 2.5, 5.0, 10.0].iter().map(|factor| factor * power).find(|step| *step >= rough * 0.999);
        let step = step.unwrap_or(rough);
        Self { top: step * 2.0, step, unit }
    }

    fn y(&self, value: f64) -> f64 {
        BOTTOM - (value / self.top).clamp(0.0, 1.0) * (BOTTOM - TOP)
    }

    fn grid(&self) -> Vec<Grid> {
        let at = |n: u8| f64::from(n) * self.step;
        (0..=2).map(|n| Grid { y: self.y(at(n)), text: self.unit.text(at(n)) }).collect()
    }
}

fn x(i: usize, count: usize) -> f64 {
    LEFT + i as f64 / (count.max(2) - 1) as f64 * (RIGHT - LEFT)
}

/// Returns the points of each part of a line without gaps.
fn parts(values: &[Option<f64>], scale: &Scale) -> Vec<Vec<(f64, f64)>> {
    let mut parts = vec![Vec::new()];
    for (i, value) in values.iter().enumerate() {
        match (value, parts.last_mut()) {
            (Some(value), Some(part)) => part.push((x(i, values.len()), scale.y(*value))),
            (None, Some(part)) if !part.is_empty() => parts.push(Vec::new()),
            _ => {}
        }
    }
    parts.retain(|part| !part.is_empty());
    parts
}

fn path(values: &[Option<f64>], scale: &Scale) -> String {
    let mut d = String::new();
    for part in parts(values, scale) {
        for (i, (x, y)) in part.iter().enumerate() {
            d.push_str(&format!("{}{x:.1},{y:.1}", if i == 0 { "M" } else { "L" }));
        }
        // A single point has a length, so that it is visible.
        if part.len() == 1 {
            d.push_str("h1");
        }
    }
    d
}

fn area(values: &[Option<f64>], scale: &Scale) -> String {
    let mut d = String::new();
    for part in parts(values, scale) {
        let (Some(first), Some(last)) = (part.first(), part.last()) else { continue };
        d.push_str(&format!("M{:.1},{BOTTOM}", first.0));
        d.extend(part.iter().map(|(x, y)| format!("L{x:.1},{y:.1}")));
        d.push_str(&format!("L{:.1},{BOTTOM}Z", last.0));
    }
    d
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_axis_ends_with_a_round_value_above_the_highest() {
        let top = |highest: f64, unit| Scale::new(highest, None, unit).top;
        for (highest, unit, expected) in [
            (0.0, Unit::Bytes, 1000.0),
            (7.0, Unit::PerSecond, 10.0),
            (11.0, Unit::PerSecond, 20.0),
            (1.0, Unit::Number, 1.0),
            (4.1e6, Unit::Bytes, 5e6),
            (0.013, Unit::Seconds, 0.02),
        ] {
            assert!((top(highest, unit) - expected).abs() < expected * 1e-9, "{highest}: {}", top(highest, unit));
        }
        let texts: Vec<String> = Scale::new(0.4, Some(1.0), Unit::Share).grid().into_iter().map(|g| g.text).collect();
        assert_eq!(texts, ["0 %", "50 %", "100 %"]);
    }

    #[test]
    fn gaps_split_lines() {
        let scale = Scale { top: 2.0, step: 1.0, unit: Unit::Number };
        let values = [Some(0.0), Some(2.0), None, Some(1.0), None];
        assert_eq!(path(&values, &scale), "M52.0,128.0L141.0,10.0M319.0,69.0h1");
        assert_eq!(area(&values[..2], &scale), "M52.0,128L52.0,128.0L408.0,10.0L408.0,128Z");
        assert_eq!(path(&[None, None], &scale), "");
    }
}
