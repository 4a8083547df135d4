//! A loop's clock that notices when the loop is late.

use std::time::{Duration, Instant};

/// A tick that is later than this is logged.
const LATE: Duration = Duration::from_millis(250);
/// At most one message in this time.
const QUIET: Duration = Duration::from_secs(10);

/// Ticks some time after each other.
pub struct Ticker {
    name: &'static str,
    period: Duration,
    worst: Duration,
    logged: Option<Instant>,
}

impl Ticker {
    #[must_use]
    pub fn new(name: &'static str, period: Duration) -> Self {
        Self { name, period, worst: Duration::ZERO, logged: None }
    }

    /// Waits one period from now. Logs if this process, or the machine, is so busy that the tick is late by more
    /// than 250 ms.
    pub async fn tick(&mut self) {
        let due = Instant::now() + self.period;
        tokio::time::sleep(self.period).await;
        let late = due.elapsed();
        self.worst = self.worst.max(late);
        if late > LATE && self.logged.is_none_or(|at| at.elapsed() >= QUIET) {
            self.logged = Some(Instant::now());
            println!("{} is late by {} ms: this machine is overloaded", self.name, late.as_millis());
        }
    }

    /// The latest tick so far, by how much.
    #[must_use]
    pub fn worst(&self) -> Duration {
        self.worst
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_tick_behind_other_work_is_late() {
        let mut ticker = Ticker::new("the test", Duration::from_millis(50));
        ticker.tick().await;
        let before = ticker.worst();
        // Another task takes the thread for longer than the period.
        tokio::spawn(async { std::thread::sleep(Duration::from_millis(400)) });
        ticker.tick().await;
        assert!(before < LATE && ticker.worst() > LATE, "{before:?} {:?}", ticker.worst());
    }
}
