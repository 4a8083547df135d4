//! A limit of bytes per second that several streams share.

use std::collections::BTreeMap;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

/// Bytes per second of one operator, both directions together. The nodes' status takes 10 kB a connection, so that of
/// 1,000 nodes takes 10 MB. A line of 1 Gbit/s, which Odoo's users share, carries eight times as much.
const OF_OPERATOR: u64 = 16_000_000;
/// Bytes per second of all operators.
const OF_ALL: u64 = 48_000_000;
/// How far streams may be ahead of the rate before their reads wait.
const BURST: Duration = Duration::from_secs(1);

/// The limits of all operators.
pub(super) struct Throttles {
    all: Arc<Throttle>,
    /// Limits of operators with open streams, by name.
    operators: Mutex<BTreeMap<String, Arc<Throttle>>>,
}

impl Throttles {
    pub(super) fn new() -> Self {
        Self { all: Arc::new(Throttle::new(OF_ALL)), operators: Mutex::default() }
    }

    /// Returns a stream of an operator, whose reads keep the limits.
    pub(super) fn limit<S>(&self, name: &str, inner: S) -> Throttled<S> {
        let mut operators = self.operators.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        operators.retain(|_, own| Arc::strong_count(own) > 1 || own.is_ahead(now));
        let own = operators.entry(name.to_owned()).or_insert_with(|| Arc::new(Throttle::new(OF_OPERATOR)));
        Throttled { inner, limits: [own.clone(), self.all.clone()], pause: None }
    }
}

/// A limit of bytes per second.
struct Throttle {
    /// Bytes per second.
    rate: u64,
    /// Time at which the bytes so far have the rate.
    even: Mutex<Instant>,
}

impl Throttle {
    fn new(rate: u64) -> Self {
        Self { rate, even: Mutex::new(Instant::now()) }
    }

    /// Counts bytes. Returns the time before which no further bytes should follow; `None` if they may follow now.
    fn take(&self, bytes: usize, now: Instant) -> Option<Instant> {
        let time = Duration::from_nanos(1_000_000_000_u64.saturating_mul(bytes as u64) / self.rate);
        let mut even = self.even.lock().unwrap_or_else(PoisonError::into_inner);
        *even = (*even).max(now) + time;
        even.checked_sub(BURST).filter(|until| *until > now)
    }

    fn is_ahead(&self, now: Instant) -> bool {
        *self.even.lock().unwrap_or_else(PoisonError::into_inner) > now
    }
}

/// A stream whose reads wait while the streams that share its limits exceed one.
pub(super) struct Throttled<S> {
    inner: S,
    limits: [Arc<Throttle>; 2],
    pause: Option<Pin<Box<Sleep>>>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Throttled<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Some(pause) = &mut self.pause {
            ready!(pause.as_mut().poll(cx));
            self.pause = None;
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.inner).poll_read(cx, buf))?;
        let (bytes, now) = (buf.filled().len() - before, Instant::now());
        let until = self.limits.iter().filter_map(|limit| limit.take(bytes, now)).max();
        self.pause = until.map(|until| Box::pin(sleep_until(until)));
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Throttled<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt as _;

    #[test]
    fn streams_share_the_limit_after_the_burst() {
        let (limit, now) = (Throttle::new(1000), Instant::now());
        assert_eq!(limit.take(1000, now), None);
        let half = limit.take(500, now).unwrap();
        assert!((half - now).abs_diff(Duration::from_millis(500)) < Duration::from_millis(5));
        let later = now + Duration::from_secs(10);
        assert_eq!(limit.take(900, later), None, "the limit recovers");
    }

    #[tokio::test]
    async fn reads_wait_at_the_limit_of_their_operator() {
        let throttles = Throttles::new();
        let bytes = vec![7_u8; 2 * OF_OPERATOR as usize];
        let mut one = throttles.limit("anna", &bytes[..bytes.len() / 2]);
        let mut two = throttles.limit("anna", &bytes[..bytes.len() / 4]);
        let begun = Instant::now();
        let mut read = Vec::with_capacity(bytes.len());
        one.read_to_end(&mut read).await.unwrap();
        two.read_to_end(&mut read).await.unwrap();
        let took = begun.elapsed();
        assert_eq!(read.len(), bytes.len() * 3 / 4);
        assert!(took >= Duration::from_millis(450), "{took:?}");
        // Another operator has a limit of its own.
        let mut other = throttles.limit("ben", &bytes[..1000]);
        let begun = Instant::now();
        other.read_to_end(&mut read).await.unwrap();
        assert!(begun.elapsed() < Duration::from_millis(400));
        drop((one, two, other));
        tokio::time::sleep(Duration::from_millis(5)).await;
        throttles.limit("carl", &bytes[..1]);
        assert!(!throttles.operators.lock().unwrap().contains_key("ben"), "a limit without streams is dropped");
    }
}
