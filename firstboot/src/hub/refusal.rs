//! Refusals: how they are made, and the journal's part of refused joins, which strangers must not fill.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use fleet::{Reason, Refusal};

/// Refusals that are logged within [`WINDOW`]; of the others the number.
const MOST: u32 = 20;
const WINDOW: Duration = Duration::from_secs(10);

/// Returns a refusal with this reason and text.
pub(super) fn no(reason: Reason, text: &str) -> Refusal {
    Refusal { reason, text: text.to_owned() }
}

/// Text for a machine whose slot has no owner any more.
pub(super) fn gone(slot: &str) -> String {
    format!("this machine was {slot}, and has left the fleet; wipe it and give it a new ticket to have it again")
}

/// The lines of one window.
struct Window {
    began: Option<Instant>,
    logged: u32,
    left_out: u32,
}

static LOG: Mutex<Window> = Mutex::new(Window { began: None, logged: 0, left_out: 0 });

/// Logs why a join was refused, on one line, if few have been within the last seconds.
pub(super) fn log(refusal: &Refusal) {
    let mut window = LOG.lock().unwrap_or_else(PoisonError::into_inner);
    let left_out = window.advance(Instant::now());
    let logs = window.take();
    drop(window);
    if left_out > 0 {
        println!("{left_out} more joins were refused");
    }
    if logs {
        // Part of it may be the stranger's own words.
        println!("refused ({:?}): {}", refusal.reason, refusal.text.escape_debug());
    }
}

impl Window {
    /// Begins a new window if it is time; gives how many lines the last one left out.
    fn advance(&mut self, now: Instant) -> u32 {
        if self.began.is_some_and(|began| now.saturating_duration_since(began) < WINDOW) {
            return 0;
        }
        (self.began, self.logged) = (Some(now), 0);
        std::mem::take(&mut self.left_out)
    }

    /// Whether one more line is logged.
    fn take(&mut self) -> bool {
        let logs = self.logged < MOST;
        if logs {
            self.logged += 1;
        } else {
            self.left_out += 1;
        }
        logs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_refusals_is_counted_instead_of_logged() {
        let now = Instant::now();
        let mut window = Window { began: None, logged: 0, left_out: 0 };
        assert_eq!(window.advance(now), 0);
        assert_eq!((0..1000).filter(|_| window.take()).count(), MOST as usize);
        assert_eq!(window.advance(now + Duration::from_secs(1)), 0);
        assert!(!window.take());
        assert_eq!(window.advance(now + WINDOW), 981);
        assert!(window.take());
    }
}
