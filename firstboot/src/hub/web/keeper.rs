//! One hub's part: it uses the certificate in etcd, and orders one when it is due and no other hub does.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use fleet::{HubKey, Topology, Web};
use tokio::sync::Mutex;
use tokio::time::{sleep, timeout};
use tracing::{error, info, warn};

use super::answers;
use super::certificate::WebCertificate;
use super::directory::Wait;
use super::install;
use super::metrics;
use super::order;
use super::records::{Attempt, Lock, Records, Stored};
use crate::client::backoff::{Backoff, chance};
use crate::client::etcd::Etcd;
use crate::error::{Error, Result};
use crate::hub::rollout::now;
use crate::node::state::StateDir;

/// Files and sockets of the certificate on a hub; tests use others.
#[derive(Clone, Debug)]
pub struct WebPaths {
    /// Folder of the agent's state.
    pub state: StateDir,
    /// File from which HAProxy reads certificates and key.
    pub pem: PathBuf,
    /// HAProxy's socket for its runtime API.
    pub haproxy: PathBuf,
    /// Socket on which the hub answers challenges.
    pub answers: PathBuf,
    /// File with the metrics.
    pub metrics: PathBuf,
    /// Root certificates that verify the directory, PEM: the first file that exists.
    pub authorities: Vec<PathBuf>,
}

impl WebPaths {
    /// Returns the paths of a hub.
    #[must_use]
    pub fn for_node(state: StateDir) -> Self {
        Self {
            state,
            pem: "/run/bakehouse/tls/web.pem".into(),
            haproxy: "/run/bakehouse/haproxy.sock".into(),
            answers: "/run/bakehouse/acme.sock".into(),
            metrics: "/run/bakehouse/metrics/web.prom".into(),
            authorities: vec![format!("/{}", Web::CA_FILE).into(), "/etc/ssl/certs/ca-certificates.crt".into()],
        }
    }
}

/// Times of the orders.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Longest time between two checks.
    pub check: Duration,
    /// Lease of the right to order, seconds: another hub continues after this time at the latest.
    pub lock: u32,
    /// Time until the second attempt. Each further one waits for three times as long.
    pub first_retry: Duration,
    /// Longest time between two attempts.
    pub longest_retry: Duration,
    /// Time after which every hub answers a challenge.
    pub spread: Duration,
}

impl Default for Pace {
    /// With these times, an hour has four attempts at most. Let's Encrypt permits five failed ones.
    fn default() -> Self {
        Self {
            check: Duration::from_secs(30),
            lock: 180,
            first_retry: Duration::from_secs(240),
            longest_retry: Duration::from_secs(6 * 3600),
            spread: 2 * answers::FRESH,
        }
    }
}

impl Pace {
    /// Returns the time to wait after a failed attempt: at least what the directory asked for, and random, so that two
    /// fleets do not order together.
    fn pause(&self, failures: u32, wait: Option<Duration>) -> Duration {
        let factor = 3_u32.saturating_pow(failures.saturating_sub(1).min(16));
        let part = |whole: Duration| whole.mul_f64(chance(1024) as f64 / 1024.0);
        let full = self.first_retry.saturating_mul(factor).min(self.longest_retry);
        let own = full / 2 + part(full / 2);
        wait.map_or(own, |wait| (wait + part(wait / 10)).max(own))
    }
}

/// The machine's clock, or a later time.
#[derive(Clone, Debug, Default)]
pub struct Clock(Arc<AtomicU64>);

impl Clock {
    /// Moves this clock and its copies forward. Tests use it.
    pub fn advance(&self, by: Duration) {
        self.0.fetch_add(by.as_secs(), Ordering::SeqCst);
    }

    /// Returns the Unix time.
    #[must_use]
    pub fn now(&self) -> u64 {
        now() + self.0.load(Ordering::SeqCst)
    }
}

/// What HAProxy on this hub has.
#[derive(Default)]
struct Used {
    certificate: Option<WebCertificate>,
    /// HAProxy has confirmed it.
    is_confirmed: bool,
    /// Last problem that was logged.
    problem: String,
}

/// One hub's part in the certificate.
pub struct WebKeeper {
    records: Records,
    web: Web,
    name: String,
    slot: String,
    eab: Option<Vec<u8>>,
    paths: WebPaths,
    pace: Pace,
    clock: Clock,
    used: Mutex<Used>,
}

impl WebKeeper {
    /// Returns the keeper of a hub; `None` without `[web] acme`, or if the hub has no etcd password.
    #[must_use]
    pub fn new(etcd: Etcd, topology: &Topology, slot: &str, etcd_root: &str, paths: WebPaths) -> Option<Self> {
        let web = topology.web.clone();
        let name = web.name.clone().filter(|_| web.acme)?;
        let Some(key) = HubKey::derive(&topology.name, etcd_root) else {
            warn!("the hub orders no certificate: its ticket has no etcd password");
            return None;
        };
        let eab = topology.web_secrets.open(&key, Web::EAB).and_then(|text| base64url(&text));
        let records = Records::new(etcd, key, &web)?;
        let (slot, pace, clock, used) = (slot.to_owned(), Pace::default(), Clock::default(), Mutex::default());
        Some(Self { records, web, name, slot, eab, paths, pace, clock, used })
    }

    /// Sets other times, and another clock.
    #[must_use]
    pub fn with_pace(self, pace: Pace, clock: Clock) -> Self {
        Self { pace, clock, ..self }
    }

    /// Answers challenges, uses the certificate in etcd, and orders one when it is due. Never returns.
    pub async fn keep(&self) {
        match install::load(&self.paths.state, &self.name) {
            Ok(certificate) => self.used.lock().await.certificate = certificate,
            Err(e) => error!("the stored certificate is not used: {}", e.chain()),
        }
        let answered = async {
            let mut pause = Backoff::default();
            loop {
                if let Err(e) = answers::serve(self.records.etcd().reconnected(), &self.paths.answers).await {
                    warn!("cannot answer challenges of the certificate authority: {}", e.chain());
                }
                sleep(pause.next_delay()).await;
            }
        };
        let followed = async {
            let mut pause = Backoff::default();
            loop {
                match self.follow().await {
                    Ok(()) => pause = Backoff::default(),
                    Err(e) => warn!("cannot follow the certificate in etcd: {}", e.chain()),
                }
                sleep(pause.next_delay()).await;
            }
        };
        tokio::join!(answered, followed);
    }

    /// Follows the records until the watch ends.
    async fn follow(&self) -> Result<()> {
        let etcd = self.records.etcd();
        let seen = self.step().await?;
        let mut watch = etcd.watch(self.records.prefix(), seen).await?;
        loop {
            if let Ok(changes) = timeout(self.pace.check, etcd.next(&mut watch)).await
                && changes?.is_none()
            {
                return Ok(());
            }
            self.step().await?;
        }
    }

    /// Uses the certificate in etcd, and orders one if it is due. Returns the revision of the records.
    async fn step(&self) -> Result<u64> {
        let stored = self.records.read().await?;
        let (revision, now) = (stored.revision, self.clock.now());
        let is_used = self.take(stored.certificate.as_ref()).await;
        let is_due = stored.certificate.as_ref().is_none_or(|certificate| certificate.due() <= now);
        // A hub whose clock was weeks ahead may have failed.
        let failed = if is_due { stored.attempt.clone() } else { Attempt::default() };
        if let Err(e) = metrics::write(&self.paths.metrics, stored.certificate.as_ref(), &failed, is_used) {
            warn!("metrics of the certificate are not written: {}", e.chain());
        }
        let directory = &self.web.authority.directory;
        let is_wanted = |own: &WebCertificate| own.until > now && own.directory == *directory;
        let known = self.used.lock().await.certificate.clone().filter(is_wanted);
        match (&stored.certificate, known) {
            (None, Some(own)) => {
                info!("etcd has no certificate for {}: storing this hub's", self.name);
                self.records.restore(&own).await?;
            }
            _ if is_due && stored.attempt.is_over(now) && stored.locked_by.is_none() => self.attempt(stored).await?,
            _ => {}
        }
        Ok(revision)
    }

    /// Makes HAProxy use a certificate. Returns whether it does.
    async fn take(&self, certificate: Option<&WebCertificate>) -> bool {
        let mut used = self.used.lock().await;
        let taken = async {
            if let Some(new) = certificate.filter(|new| used.certificate.as_ref() != Some(*new)) {
                let new = new.clone().verified(&self.name)?;
                install::store(&self.paths.state, &self.paths.pem, &new)?;
                (used.certificate, used.is_confirmed) = (Some(new), false);
            }
            if let Some(certificate) = used.certificate.clone().filter(|_| !used.is_confirmed) {
                install::use_now(&self.paths.haproxy, &self.paths.pem, &certificate).await?;
                used.is_confirmed = true;
                info!("HAProxy uses the certificate for {}, valid until {}", self.name, certificate.until);
            }
            Ok::<_, Error>(())
        };
        let problem = taken.await.map_or_else(|e| e.chain(), |()| String::new());
        if !problem.is_empty() && problem != used.problem {
            warn!("HAProxy does not use the newest certificate for {} yet: {problem}", self.name);
        }
        used.problem = problem;
        used.is_confirmed
    }

    /// Orders a certificate if no other hub does.
    async fn attempt(&self, stored: Stored) -> Result<()> {
        // Hubs that start together do not all ask for the lock.
        sleep(self.pace.check.min(Duration::from_secs(1)).mul_f64(chance(1024) as f64 / 1024.0)).await;
        let Some(lock) = self.records.lock(&self.slot, self.pace.lock).await? else { return Ok(()) };
        // Another hub may have finished before this one got the lock.
        let current = self.records.read().await?;
        if current.certificate != stored.certificate || current.attempt != stored.attempt {
            return self.records.unlock(&lock).await;
        }
        let wait = Wait::default();
        // The time of the lease also has room for the last write.
        let limit = Duration::from_secs(u64::from(self.pace.lock)).mul_f64(0.8);
        let done = timeout(limit, self.certificate(&lock, current, wait.clone())).await;
        let done = done.unwrap_or_else(|_| Err(Error::Failed(format!("no certificate within {} s", limit.as_secs()))));
        match done {
            Ok(certificate) => {
                self.records.put_certificate(&lock, &certificate).await?;
                info!("the fleet has a certificate for {}, valid until {}", self.name, certificate.until);
                // Without a pause, this hub would order until the authority refuses.
                if certificate.due() <= self.clock.now() {
                    let e = "the new certificate is already due for renewal: this hub's clock is ahead".to_owned();
                    self.failed(&lock, &stored.attempt, e, None).await?;
                }
            }
            Err(e) => self.failed(&lock, &stored.attempt, e.chain(), wait.get()).await?,
        }
        self.records.unlock(&lock).await
    }

    /// Stores the time of the next attempt. `wait`: what the directory asked for.
    async fn failed(&self, lock: &Lock, before: &Attempt, error: String, wait: Option<Duration>) -> Result<()> {
        let failures = before.failures.saturating_add(1);
        let (pause, now) = (self.pace.pause(failures, wait).as_secs(), self.clock.now());
        error!("cannot get a certificate for {} (attempt {failures}, the next one in {pause} s): {error}", self.name);
        let failed_since = if before.failed_since == 0 { now } else { before.failed_since };
        self.records.put_attempt(lock, &Attempt { failures, next: now + pause, failed_since, error }).await
    }

    async fn certificate(&self, lock: &Lock, current: Stored, wait: Wait) -> Result<WebCertificate> {
        let found = self.paths.authorities.iter().find(|path| path.exists());
        let path = found.ok_or_else(|| Error::Failed("the image has no root certificates".to_owned()))?;
        let roots = fs::read_to_string(path).map_err(Error::io("read", path))?;
        let tls = fleet_https::client(&roots, None)?;
        let patience = Duration::from_secs(u64::from(self.pace.lock)).mul_f64(0.3);
        let (records, web, eab, spread) = (&self.records, &self.web, self.eab.clone(), self.pace.spread);
        order::Ordering { records, lock, web, eab, tls, wait, spread, patience }.certificate(current.order).await
    }
}

/// Decodes base64url (RFC 4648 § 5), with or without padding, as authorities print HMAC keys.
fn base64url(text: &[u8]) -> Option<Vec<u8>> {
    let mut text =
        String::from_utf8(text.to_vec()).ok()?.trim().trim_end_matches('=').replace('-', "+").replace('_', "/");
    text += &"===="[..(4 - text.len() % 4) % 4];
    fleet::encoding::decode(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_have_a_limit_and_respect_the_directory() {
        let pace = Pace::default();
        let pause = |failures, wait| pace.pause(failures, wait).as_secs();
        assert!((120..=240).contains(&pause(1, None)));
        assert!((360..=720).contains(&pause(2, None)));
        assert!((3 * 3600..=6 * 3600).contains(&pause(40, None)));
        assert!((3 * 3600..=6 * 3600).contains(&pause(u32::MAX, None)));
        let day = Some(Duration::from_secs(86_400));
        assert!((86_400..=95_040).contains(&pause(1, day)));
        assert!(pause(1, Some(Duration::from_secs(1))) >= 120);
        // The attempts of an hour: at once, then after these pauses at the earliest.
        assert!(pause(1, None) + pause(2, None) + pause(3, None) + pause(4, None) > 3600);
    }

    #[test]
    fn hmac_keys_have_any_padding() {
        assert_eq!(base64url(b"-_-_"), base64url(b"+/+/"));
        assert_eq!(base64url(b"YQ").as_deref(), Some(&b"a"[..]));
        assert_eq!(base64url(b"YQ==\n").as_deref(), Some(&b"a"[..]));
        assert_eq!(base64url(b"not base64!"), None);
    }
}
