//! A node's side of joining: asks the hubs for a slot until one gives it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use fleet::{
    Answer, Grant, Introduction, JoinReply, JoinRequest, Joiner, LONGEST, Node, PROTOCOL, Peers, Renewal, Report,
    Topology, encoding,
};
use tokio_rustls::rustls::ClientConfig;

use crate::console::say;
use crate::error::{Error, Result};
use crate::https::{Connection, request};
use crate::image::Image;
use crate::journal::Event;
use crate::keys::Keys;

/// The longest pause between two attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// The hubs, as this node reaches them.
pub struct Hubs {
    /// Slot and public host of each.
    hosts: Vec<(String, String)>,
    port: u16,
    tls: Arc<ClientConfig>,
}

impl Hubs {
    /// All hubs but this node itself.
    #[must_use]
    pub fn of(topology: &Topology, endpoints: &BTreeMap<String, String>, own: &str, tls: Arc<ClientConfig>) -> Self {
        let hosts = topology
            .hubs
            .iter()
            .filter(|h| h.name != own)
            .filter_map(|h| Some((h.name.clone(), endpoint(h, endpoints)?)));
        Self { hosts: hosts.collect(), port: topology.mesh.port, tls }
    }

    /// In an order of chance, so that a rack that starts does not ask one of them alone.
    fn shuffled(&self) -> Vec<&(String, String)> {
        let mut hosts: Vec<_> = self.hosts.iter().collect();
        for i in (1..hosts.len()).rev() {
            hosts.swap(i, chance(i + 1));
        }
        hosts
    }

    /// Asks one hub something that a member may ask.
    ///
    /// # Errors
    /// It does not answer.
    async fn ask(&self, slot: &str, host: &str, method: &str, path: &str, body: &[u8]) -> Result<bytes::Bytes> {
        let mut connection = Connection::open(host, self.port, slot, &self.tls).await?;
        connection.ask(request(method, host, path, &[], body.to_vec().into())?, LONGEST).await
    }

    /// Who is where, from whichever hub answers first.
    ///
    /// # Errors
    /// None does.
    pub async fn peers(&self) -> Result<Peers> {
        let mut last = Error::Failed("the fleet has no other hub".to_owned());
        for (slot, host) in self.shuffled() {
            match self.ask(slot, host, "GET", "/v1/peers", b"").await.and_then(|b| read(slot, &b)) {
                Ok(peers) => return Ok(peers),
                Err(e) => last = e,
            }
        }
        Err(last)
    }

    /// Says what this node runs, to whichever hub answers first.
    ///
    /// # Errors
    /// None does, or the one that does says no.
    pub async fn turn(&self, report: &Report) -> Result<Answer> {
        let body = serde_json::to_vec(report).map_err(|e| Error::Failed(e.to_string()))?;
        let mut last = Error::Failed("the fleet has no other hub".to_owned());
        for (slot, host) in self.shuffled() {
            match self.ask(slot, host, "POST", "/v1/turn", &body).await.and_then(|b| read(slot, &b)) {
                Ok(answer) => return Ok(answer),
                Err(e) => last = e,
            }
        }
        Err(last)
    }

    /// Says that this node is about to leave, to whichever hub answers first.
    ///
    /// # Errors
    /// None does, or etcd can't do without this node now.
    pub async fn leave(&self) -> Result<()> {
        self.tell("/v1/leave").await
    }

    /// Says that this node has stopped for good.
    ///
    /// # Errors
    /// No hub answers.
    pub async fn left(&self) -> Result<()> {
        self.tell("/v1/left").await
    }

    async fn tell(&self, path: &str) -> Result<()> {
        let mut last = Error::Failed("the fleet has no other hub".to_owned());
        for (slot, host) in self.shuffled() {
            match self.ask(slot, host, "POST", path, b"").await {
                Ok(_) => return Ok(()),
                Err(e) => last = e,
            }
        }
        Err(last)
    }

    /// Gives the hubs this node's next keys. A hub that says "later" is not the last one asked.
    ///
    /// # Errors
    /// None answers.
    pub async fn renew(&self, next: &Keys) -> Result<JoinReply> {
        let asked = Renewal {
            version: PROTOCOL,
            mesh_key: next.mesh_public()?,
            tls_key: encoding::encode(next.tls.public()?.as_bytes()),
        };
        let body = serde_json::to_vec(&asked).map_err(|e| Error::Failed(e.to_string()))?;
        let mut last = Err(Error::Failed("the fleet has no other hub".to_owned()));
        for (slot, host) in self.shuffled() {
            last = self.ask(slot, host, "POST", "/v1/renew", &body).await.and_then(|b| read(slot, &b));
            let later = match &last {
                Ok(JoinReply::Refused(no)) => no.reason.passes(),
                Ok(JoinReply::Granted(_)) => false,
                Err(_) => true,
            };
            if !later {
                break;
            }
        }
        last
    }

    /// Tells every hub whose key is not known who this founder is; gives what they know, by hub.
    pub async fn introduce(&self, own: &Introduction, known: impl Fn(&str) -> bool) -> Vec<(String, Peers)> {
        let body = serde_json::to_vec(own).unwrap_or_default();
        let asked = self.hosts.iter().filter(|(slot, _)| !known(slot)).map(async |(slot, host)| {
            let answer = self.ask(slot, host, "POST", "/v1/introduce", &body).await;
            let peers = answer.and_then(|b| read::<Peers>(slot, &b)).inspect_err(|e| println!("{e}")).ok();
            peers.map(|peers| (slot.clone(), peers))
        });
        futures_util::future::join_all(asked).await.into_iter().flatten().collect()
    }
}

/// Asks until a hub gives a slot.
///
/// # Errors
/// A refusal that no waiting can change.
pub async fn join(hubs: &Hubs, joiner: &Joiner, image: &Image, keys: &Keys) -> Result<Grant> {
    let asked = JoinRequest {
        version: PROTOCOL,
        token: joiner.token.clone(),
        group: image.info.group.clone(),
        image: image.info.version.clone(),
        mesh_key: keys.mesh_public()?,
        tls_key: encoding::encode(keys.tls.public()?.as_bytes()),
    };
    let body = serde_json::to_vec(&asked).map_err(|e| Error::Failed(e.to_string()))?;
    let names: Vec<&str> = hubs.hosts.iter().map(|(slot, _)| slot.as_str()).collect();
    say(Event::Asking, &format!("asking {} for a slot in {}", names.join(", "), asked.group));
    let mut pause = Pause::default();
    let mut told = String::new();
    loop {
        let mut answers = Vec::new();
        for (slot, host) in hubs.shuffled() {
            let answer = async {
                let mut connection = Connection::open(host, hubs.port, slot, &hubs.tls).await?;
                connection.post_signed("/v1/join", &body, |message| joiner.key.sign(message), LONGEST).await
            };
            match answer.await.and_then(|b| read(slot, &b)) {
                Ok(JoinReply::Granted(grant)) => return Ok(grant),
                Ok(JoinReply::Refused(no)) if !no.reason.passes() => {
                    return Err(Error::Configuration(format!("{slot} refuses this node: {}", no.text)));
                }
                Ok(JoinReply::Refused(no)) => answers.push((slot.as_str(), Ok(no.text))),
                Err(e) => answers.push((slot.as_str(), Err(e.to_string()))),
            }
        }
        // On the console once, not once a second.
        let why = summed_up(answers);
        if why != told {
            say(Event::Waiting, &format!("still without a slot: {why}"));
            told = why;
        }
        tokio::time::sleep(pause.longer()).await;
    }
}

/// What hubs answered, or why one did not: the same answer once, and in the same order whoever was asked first.
fn summed_up(mut answers: Vec<(&str, std::result::Result<String, String>)>) -> String {
    answers.sort_unstable();
    let mut lines: Vec<(Vec<&str>, String)> = Vec::new();
    for (hub, answer) in answers {
        match answer {
            Ok(text) => match lines.iter_mut().find(|(_, there)| *there == text) {
                Some((hubs, _)) => hubs.push(hub),
                None => lines.push((vec![hub], text)),
            },
            // It names the hub.
            Err(why) => lines.push((vec![], why)),
        }
    }
    let line = |(hubs, text): (Vec<&str>, String)| {
        if hubs.is_empty() { text } else { format!("{}: {text}", hubs.join(", ")) }
    };
    lines.into_iter().map(line).collect::<Vec<_>>().join("; ")
}

/// Where a hub is reached.
#[must_use]
pub fn endpoint(hub: &Node, endpoints: &BTreeMap<String, String>) -> Option<String> {
    endpoints.get(&hub.name).or(hub.endpoint.as_ref()).cloned()
}

/// Pauses that grow from half a second to a minute, each by chance up to a half shorter.
#[derive(Default)]
pub struct Pause(u32);

impl Pause {
    pub fn longer(&mut self) -> Duration {
        let full = (Duration::from_millis(500) * 2_u32.pow(self.0.min(8))).min(LONGEST_PAUSE);
        self.0 += 1;
        full.mul_f64(0.5 + chance(512) as f64 / 1024.0)
    }
}

/// A number below `n`.
fn chance(n: usize) -> usize {
    let mut bytes = [0; 8];
    let _ = getrandom::fill(&mut bytes);
    usize::from_le_bytes(bytes) % n.max(1)
}

fn read<T: for<'de> serde::Deserialize<'de>>(slot: &str, bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes)
        .map_err(|e| Error::Network { to: slot.to_owned(), why: format!("its answer is not readable: {e}") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_answer_is_told_once() {
        let no = |text: &str| Ok(text.to_owned());
        let cut = Err("hub-2 does not answer".to_owned());
        let one = vec![("hub-3", no("taken")), ("hub-2", cut.clone()), ("hub-1", no("taken")), ("hub-4", no("later"))];
        let mut other = one.clone();
        other.reverse();
        assert_eq!(summed_up(one), "hub-1, hub-3: taken; hub-2 does not answer; hub-4: later");
        assert_eq!(summed_up(other), "hub-1, hub-3: taken; hub-2 does not answer; hub-4: later");
    }

    #[test]
    fn pauses_grow_and_differ() {
        let mut pause = Pause::default();
        let pauses: Vec<Duration> = std::iter::repeat_with(|| pause.longer()).take(20).collect();
        assert!(pauses[0] <= Duration::from_millis(500));
        assert!(pauses[19] >= LONGEST_PAUSE / 2 && pauses.iter().all(|p| *p <= LONGEST_PAUSE));
        assert!(pauses[10..].windows(2).any(|w| w[0] != w[1]));
    }
}
