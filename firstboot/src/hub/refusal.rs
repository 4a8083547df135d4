//! Refusals, and their log. The log has a rate limit, so that strangers cannot fill the journal.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use fleet::{Reason, Refusal};
use tracing::warn;

/// Refusals that are logged within [`WINDOW`]. The others are counted.
const MOST: u32 = 20;
const WINDOW: Duration = Duration::from_secs(10);

/// Returns a refusal with this reason and text.
pub(super) fn refuse(reason: Reason, text: &str) -> Refusal {
    Refusal { reason, text: text.to_owned() }
}

/// Returns the text for a machine that has left the fleet.
pub(super) fn left_text(slot: &str) -> String {
    format!("this machine was {slot}, and has left the fleet; to use it again, wipe it and give it a new ticket")
}

/// The log lines of one window.
struct Window {
    began: Option<Instant>,
    logged: u32,
    left_out: u32,
}

static LOG: Mutex<Window> = Mutex::new(Window { began: None, logged: 0, left_out: 0 });

/// Logs the reason of a refused join on one line, unless the window's limit is reached.
pub(super) fn log(refusal: &Refusal) {
    let mut window = LOG.lock().unwrap_or_else(PoisonError::into_inner);
    let left_out = window.advance(Instant::now());
    let logs = window.take();
    drop(window);
    if left_out > 0 {
        warn!("refused {left_out} more joins");
    }
    if logs {
        // The text may quote the stranger's request.
        warn!(reason = ?refusal.reason, "refused a join ({:?}): {}", refusal.reason, refusal.text.escape_debug());
    }
}

impl Window {
    /// Begins a new window if the current one has ended. Returns how many lines the ended window left out.
    fn advance(&mut self, now: Instant) -> u32 {
        if self.began.is_some_and(|began| now.saturating_duration_since(began) < WINDOW) {
            return 0;
        }
        (self.began, self.logged) = (Some(now), 0);
        std::mem::take(&mut self.left_out)
    }

    /// Counts a line, and returns whether to log it.
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
    fn counts_refusals_beyond_the_limit() {
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
