//! Delays between attempts. They grow with each attempt, and differ between nodes.

use std::time::Duration;

/// Longest delay between two attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// Interval at which a node asks the hubs for its peers, if nothing has changed.
const ROUND: Duration = Duration::from_secs(30);

/// Exponential backoff with jitter: delays from 0.5 s to 60 s, each shortened by a random part of up to a half.
#[derive(Default)]
pub struct Backoff(u32);

impl Backoff {
    /// Returns the next delay.
    pub fn next_delay(&mut self) -> Duration {
        let full = (Duration::from_millis(500) * 2_u32.pow(self.0.min(8))).min(LONGEST_PAUSE);
        self.0 += 1;
        full.mul_f64(0.5 + chance(512) as f64 / 1024.0)
    }
}

/// Returns a random number below `n`.
pub fn chance(n: usize) -> usize {
    let mut bytes = [0; 8];
    let _ = getrandom::fill(&mut bytes);
    usize::from_le_bytes(bytes) % n.max(1)
}

/// Returns the delay before an attempt in milliseconds. It grows with `attempt`, and is random, so that transactions of
/// two hubs do not conflict again.
pub fn jitter(attempt: u64) -> u64 {
    let mut byte = [0; 1];
    let _ = getrandom::fill(&mut byte);
    (2 << attempt.min(6)) * (128 + u64::from(byte[0])) / 256
}

/// Returns 30 s, longer or shorter by up to 25 %, so that nodes that started together do not send their requests
/// together.
pub fn round() -> Duration {
    let mut byte = [0; 1];
    let _ = getrandom::fill(&mut byte);
    ROUND.mul_f64(0.75 + f64::from(byte[0]) / 512.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_and_differ() {
        let mut backoff = Backoff::default();
        let delays: Vec<Duration> = std::iter::repeat_with(|| backoff.next_delay()).take(20).collect();
        assert!(delays[0] <= Duration::from_millis(500));
        assert!(delays[19] >= LONGEST_PAUSE / 2 && delays.iter().all(|p| *p <= LONGEST_PAUSE));
        assert!(delays[10..].windows(2).any(|w| w[0] != w[1]));
    }
}
