//! Timer of a loop that detects delays of the loop.

use tracing::warn;

use std::time::{Duration, Instant};

/// Delay of a tick from which on it is logged.
const LATE: Duration = Duration::from_millis(250);
/// Shortest time between two messages.
const QUIET: Duration = Duration::from_secs(10);

/// A periodic timer.
pub struct Ticker {
    name: &'static str,
    period: Duration,
    worst: Duration,
    logged: Option<Instant>,
}

impl Ticker {
    /// Makes a timer. `name` is the loop's name in messages.
    #[must_use]
    pub fn new(name: &'static str, period: Duration) -> Self {
        Self { name, period, worst: Duration::ZERO, logged: None }
    }

    /// Waits for one period. Logs if the tick is late by more than 250 ms, because the process or the machine is
    /// overloaded.
    pub async fn tick(&mut self) {
        let due = Instant::now() + self.period;
        tokio::time::sleep(self.period).await;
        let late = due.elapsed();
        self.worst = self.worst.max(late);
        if late > LATE && self.logged.is_none_or(|at| at.elapsed() >= QUIET) {
            self.logged = Some(Instant::now());
            warn!("{} is late by {} ms: this machine is overloaded", self.name, late.as_millis());
        }
    }

    /// Returns the longest delay of a tick so far.
    #[must_use]
    pub fn worst(&self) -> Duration {
        self.worst
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn tick_behind_a_blocking_task_is_late() {
        let mut ticker = Ticker::new("the test", Duration::from_millis(50));
        ticker.tick().await;
        let before = ticker.worst();
        // Another task takes the thread for longer than the period.
        tokio::spawn(async { std::thread::sleep(Duration::from_millis(400)) });
        ticker.tick().await;
        assert!(before < LATE && ticker.worst() > LATE, "{before:?} {:?}", ticker.worst());
    }
}
