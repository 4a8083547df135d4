//! Compares the matrix with the expected results, and prints it as a section of `docs/security.md`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;

use super::table::expected;
use super::{Finding, Place, Reach, Target};
use crate::root;

const PAGE: &str = "docs/security.md";
const BEGIN: &str = "<!-- containment -->";
const END: &str = "<!-- /containment -->";

/// Findings of the attacks so far.
#[derive(Default)]
pub struct Matrix(BTreeMap<(Place, Target), Finding>);

impl Matrix {
    /// Records a finding and prints it.
    pub fn enter(&mut self, place: Place, target: Target, finding: Finding) {
        let mark = if finding.reach == expected(place, target).0 { " " } else { "!" };
        println!("{mark} {:<28} {:<33} {:<4} {}", place.title(), target.title(), word(finding.reach), finding.evidence);
        self.0.insert((place, target), finding);
    }

    /// Describes every cell that is not as expected.
    #[must_use]
    pub fn differences(&self) -> Vec<String> {
        let differs = |(place, target): (Place, Target)| {
            let wanted = expected(place, target).0;
            match self.0.get(&(place, target)) {
                None => Some(format!("{}: {}: no result", place.title(), target.title())),
                Some(found) if found.reach != wanted => Some(format!(
                    "{}: {}: expected {}, found {} ({})",
                    place.title(),
                    target.title(),
                    word(wanted),
                    word(found.reach),
                    found.evidence
                )),
                Some(_) => None,
            }
        };
        Place::ALL.iter().flat_map(|p| Target::ALL.iter().map(|t| (*p, *t))).filter_map(differs).collect()
    }

    /// Renders the table as Markdown, with the reasons below it.
    #[must_use]
    pub fn markdown(&self) -> String {
        let mut reasons: Vec<&str> = Vec::new();
        let mut text = String::from("| root on |");
        for target in Target::ALL {
            let _ = write!(text, " {} |", target.title());
        }
        text.push_str("\n|---|");
        text.push_str(&"---|".repeat(Target::ALL.len()));
        text.push('\n');
        for place in Place::ALL {
            let _ = write!(text, "| {} |", place.title());
            for target in Target::ALL {
                let Some(found) = self.0.get(&(place, target)) else {
                    text.push_str(" ? |");
                    continue;
                };
                let (wanted, why) = expected(place, target);
                let mut cell = word(found.reach).to_owned();
                if found.reach != Reach::No {
                    cell = format!("**{cell}**");
                    if wanted == found.reach {
                        let number = reasons.iter().position(|r| *r == why).unwrap_or_else(|| {
                            reasons.push(why);
                            reasons.len() - 1
                        });
                        let _ = write!(cell, " ({})", number + 1);
                    }
                }
                let _ = write!(text, " {cell} |");
            }
            text.push('\n');
        }
        text.push('\n');
        for (i, why) in reasons.iter().enumerate() {
            let _ = writeln!(text, "{}. {why}", i + 1);
        }
        text
    }
}

fn word(reach: Reach) -> &'static str {
    match reach {
        Reach::No => "no",
        Reach::Part => "part",
        Reach::Yes => "yes",
    }
}

/// Compares the table with the page's section. With `UPDATE_GOLDEN=1`, writes the section.
///
/// # Panics
/// If the page has another table, or no section for it.
pub fn publish(table: &str) {
    let path = root().join(PAGE);
    let page = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{PAGE}: {e}"));
    let (before, rest) = page.split_once(BEGIN).unwrap_or_else(|| panic!("{PAGE} has no `{BEGIN}`"));
    let (section, after) = rest.split_once(END).unwrap_or_else(|| panic!("{PAGE} has no `{END}`"));
    let wanted = format!("\n{table}");
    if section == wanted {
        return;
    }
    assert!(
        std::env::var_os("UPDATE_GOLDEN").is_some(),
        "{PAGE} has another table; UPDATE_GOLDEN=1 writes this one:\n{table}"
    );
    fs::write(&path, format!("{before}{BEGIN}{wanted}{END}{after}")).unwrap_or_else(|e| panic!("{PAGE}: {e}"));
}
