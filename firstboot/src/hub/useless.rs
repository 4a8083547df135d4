//! Tokens that grant nothing: expired, spent or revoked.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use fleet::Claims;

use super::rate::{Meter, Rate};

/// How long a hub remembers that a token grants nothing.
const REMEMBERED: Duration = Duration::from_secs(60);
/// Number of tokens that a hub remembers.
const MOST: usize = 1024;

/// Limits the reads of such tokens in etcd to a few a second, from all clients together. A node with a grant that this
/// hub has not read yet may be refused, and repeats its claim.
#[derive(Default)]
pub(super) struct UselessTokens(Mutex<UselessState>);

#[derive(Default)]
struct UselessState {
    /// Ids of spent or revoked tokens, with the time of the refusal.
    known: BTreeMap<String, Instant>,
    lookups: Meter<()>,
}

impl UselessTokens {
    /// Returns whether to refuse a claim with this token without reading etcd.
    pub(super) fn is_refused(&self, claims: &Claims) -> bool {
        let (now, rate) = (Instant::now(), Rate::new(5, 10, Duration::ZERO));
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = state.known.get(&claims.id).is_some_and(|at| now.saturating_duration_since(*at) < REMEMBERED);
        if !known && unix <= claims.expires {
            return false;
        }
        if state.lookups.delay(&(), rate, now).is_none() {
            return true;
        }
        state.lookups.count((), rate, now);
        false
    }

    /// Remembers that a token grants nothing.
    pub(super) fn remember(&self, id: &str) {
        let now = Instant::now();
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.known.len() >= MOST {
            state.known.retain(|_, at| now.saturating_duration_since(*at) < REMEMBERED);
        }
        if state.known.len() < MOST {
            state.known.insert(id.to_owned(), now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::token::tests::claims;
    use super::*;

    #[test]
    fn limits_only_tokens_known_to_grant_nothing() {
        let tokens = UselessTokens::default();
        let good = claims("db");
        assert!((0..1000).all(|_| !tokens.is_refused(&good)));
        let expired = Claims { expires: 1, ..claims("db") };
        let looked_up = (0..1000).filter(|_| !tokens.is_refused(&expired)).count();
        assert!((10..=15).contains(&looked_up), "{looked_up}");
        assert!(!tokens.is_refused(&good));
        tokens.remember(&good.id);
        assert!(tokens.is_refused(&good));
    }
}
