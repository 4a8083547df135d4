//! Rate limits by source: the generic cell rate algorithm, which stores one instant for each source.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

/// A table drops the sources whose limit has recovered when it has grown by this many entries.
const SWEEP: usize = 1024;

/// A rate of events, with a burst and a delay.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rate {
    /// Time between two events at the average rate.
    interval: Duration,
    /// How far a source may be ahead of the average rate before its events are delayed.
    burst: Duration,
    /// Longest delay; an event that needs a longer delay is refused.
    delay: Duration,
}

impl Rate {
    /// Allows `events` a second and a burst of `burst`; further events are delayed by up to `delay`, then refused.
    pub(super) fn new(events: u32, burst: u32, delay: Duration) -> Self {
        let interval = Duration::from_secs(1) / events;
        Self { interval, burst: interval * burst.saturating_sub(1), delay }
    }
}

/// The state of one limit for each source.
#[derive(Debug)]
pub(super) struct Meter<K> {
    /// When each source is back at its average rate.
    arrival: BTreeMap<K, Instant>,
    sweep_at: usize,
}

impl<K: Ord> Default for Meter<K> {
    fn default() -> Self {
        Self { arrival: BTreeMap::new(), sweep_at: SWEEP }
    }
}

impl<K: Ord> Meter<K> {
    /// Returns the delay of one more event of `source`; `None` if it exceeds the rate's longest delay.
    pub(super) fn delay(&self, source: &K, rate: Rate, now: Instant) -> Option<Duration> {
        let ahead = self.arrival.get(source).map_or(Duration::ZERO, |at| at.saturating_duration_since(now));
        let delay = ahead.saturating_sub(rate.burst);
        (delay <= rate.delay).then_some(delay)
    }

    /// Counts one event of `source`.
    pub(super) fn count(&mut self, source: K, rate: Rate, now: Instant) {
        if self.arrival.len() >= self.sweep_at {
            self.arrival.retain(|_, at| *at > now);
            self.sweep_at = self.arrival.len() + SWEEP;
        }
        let at = self.arrival.entry(source).or_insert(now);
        *at = (*at).max(now) + rate.interval;
    }
}

/// The limits of an event: by address, by network, and for all sources together. Networks with few events and networks
/// with many have separate common limits, so that a flood does not block the former.
#[derive(Debug, Default)]
pub(super) struct Meters {
    addresses: Meter<IpAddr>,
    networks: Meter<IpAddr>,
    light: Meter<IpAddr>,
    all_light: Meter<()>,
    all: Meter<()>,
}

/// The rates of one class of sources.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rates {
    pub(super) address: Rate,
    pub(super) network: Rate,
    /// Rate up to which a network counts as one with few events.
    pub(super) light: Rate,
    /// Common rate of all networks with few events, and again of all networks with many.
    pub(super) all: Rate,
}

impl Meters {
    /// Counts an event, and returns its delay; `None` if a limit refuses the event. A refused event counts towards no
    /// limit, so that one source cannot use up the common limits.
    pub(super) fn take(&mut self, from: IpAddr, rates: Rates, now: Instant) -> Option<Duration> {
        let network = network(from);
        let delay = self.addresses.delay(&from, rates.address, now)?;
        let delay = delay.max(self.networks.delay(&network, rates.network, now)?);
        let light =
            self.light.delay(&network, rates.light, now).and_then(|_| self.all_light.delay(&(), rates.all, now));
        let delay = delay.max(if let Some(delay) = light {
            self.light.count(network, rates.light, now);
            self.all_light.count((), rates.all, now);
            delay
        } else {
            let delay = self.all.delay(&(), rates.all, now)?;
            self.all.count((), rates.all, now);
            delay
        });
        self.addresses.count(from, rates.address, now);
        self.networks.count(network, rates.network, now);
        Some(delay)
    }
}

/// Returns the network of an address: its /24 (IPv4) or its /64 (IPv6).
pub(super) fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => Ipv4Addr::from_bits(address.to_bits() & !0xff).into(),
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_then_refuses_events_beyond_the_burst() {
        let (start, rate) = (Instant::now(), Rate::new(10, 5, Duration::from_millis(500)));
        let mut meter = Meter::default();
        let mut take = |source: u8, at: u64| {
            let now = start + Duration::from_millis(at);
            let delay = meter.delay(&source, rate, now)?;
            meter.count(source, rate, now);
            Some(delay.as_millis())
        };
        let first: Vec<_> = (0..11).map(|_| take(1, 0)).collect();
        let at_once = [Some(0); 5];
        let delayed = [100, 200, 300, 400, 500].map(Some);
        assert_eq!(first, [&at_once[..], &delayed, &[None]].concat());
        assert_eq!(take(2, 0), Some(0), "another source has its own limit");
        assert_eq!(take(1, 100), Some(500));
        assert_eq!(take(1, 2000), Some(0), "the limit recovers");
    }

    #[test]
    fn drops_sources_that_recovered() {
        let (start, rate) = (Instant::now(), Rate::new(10, 1, Duration::ZERO));
        let mut meter = Meter::default();
        for source in 0..100_000_u32 {
            // 10,000 sources a second.
            meter.count(source, rate, start + Duration::from_micros(100) * source);
        }
        assert!(meter.arrival.len() <= 2 * 1000 + SWEEP, "{}", meter.arrival.len());
    }

    #[test]
    fn a_network_shares_a_limit_and_refused_events_do_not_count() {
        let at = |text: &str| text.parse::<IpAddr>().unwrap();
        assert_eq!(network(at("192.0.2.77")), at("192.0.2.0"));
        assert_eq!(network(at("::ffff:192.0.2.77")), at("192.0.2.0"));
        assert_eq!(network(at("2001:db8:0:1:ffff::1")), at("2001:db8:0:1::"));
        let rate = |burst| Rate::new(1, burst, Duration::ZERO);
        let rates = Rates { address: rate(2), network: rate(3), light: rate(1), all: rate(3) };
        let (now, mut meters) = (Instant::now(), Meters::default());
        let mut passes = |from: &str| meters.take(at(from), rates, now).is_some();
        assert!(passes("192.0.2.1") && passes("192.0.2.1") && !passes("192.0.2.1"));
        assert!(passes("192.0.2.2") && !passes("192.0.2.2") && !passes("192.0.2.3"));
        // 198.51.100.0 has few events at first, then shares the common limit that 192.0.2.0 has used up.
        assert!(passes("198.51.100.1") && passes("198.51.100.1") && !passes("198.51.100.2"));
        assert!(passes("203.0.113.1") && !passes("203.0.113.1"), "a network with few events exceeds its limit");
    }
}
