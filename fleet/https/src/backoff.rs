//! Pauses between two attempts: longer each time, and different on each node.

use std::time::Duration;

/// The longest pause between two attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// How often a node asks who is where, if nothing has changed.
const ROUND: Duration = Duration::from_secs(30);

/// Pauses that grow from half a second to a minute, each by chance up to a half shorter.
#[derive(Default)]
pub struct Backoff(u32);

impl Backoff {
    pub fn next_delay(&mut self) -> Duration {
        let full = (Duration::from_millis(500) * 2_u32.pow(self.0.min(8))).min(LONGEST_PAUSE);
        self.0 += 1;
        full.mul_f64(0.5 + chance(512) as f64 / 1024.0)
    }
}

/// A number below `n`.
pub fn chance(n: usize) -> usize {
    let mut bytes = [0; 8];
    let _ = getrandom::fill(&mut bytes);
    usize::from_le_bytes(bytes) % n.max(1)
}

/// Milliseconds until the next attempt: longer each time, never the same for two hubs.
pub fn jitter(attempt: u64) -> u64 {
    let mut byte = [0; 1];
    let _ = getrandom::fill(&mut byte);
    (2 << attempt.min(6)) * (128 + u64::from(byte[0])) / 256
}

/// [`ROUND`], for each node a little different, so that a fleet that started at once does not
/// ask at once.
pub fn round() -> Duration {
    let mut byte = [0; 1];
    let _ = getrandom::fill(&mut byte);
    ROUND.mul_f64(0.75 + f64::from(byte[0]) / 512.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_differ() {
        let mut pause = Backoff::default();
        let pauses: Vec<Duration> = std::iter::repeat_with(|| pause.next_delay()).take(20).collect();
        assert!(pauses[0] <= Duration::from_millis(500));
        assert!(pauses[19] >= LONGEST_PAUSE / 2 && pauses.iter().all(|p| *p <= LONGEST_PAUSE));
        assert!(pauses[10..].windows(2).any(|w| w[0] != w[1]));
    }
}
