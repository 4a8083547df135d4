//! A node's side of joining: asks the hubs for a slot until one gives it.

use fleet::{Grant, JoinReply, JoinRequest, Joiner, LONGEST, PROTOCOL, encoding};

use crate::client::backoff::Backoff;
use crate::error::{Error, Result};
use crate::host::console::say;
use crate::host::journal::Event;
use crate::node::hubs::{Hubs, read};
use crate::node::image::Image;
use crate::node::keys::Keys;

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
    say(Event::Asking, &format!("asking {} for a slot in {}", hubs.slots().join(", "), asked.group));
    let mut pause = Backoff::default();
    let mut told = String::new();
    loop {
        let mut answers = Vec::new();
        for hub in hubs.shuffled() {
            let slot = &hub.slot;
            let answer = async {
                let mut connection = hubs.public(hub).await?;
                Ok(connection.post_signed("/v1/join", &body, |message| joiner.key.sign(message), LONGEST).await?)
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
        tokio::time::sleep(pause.next_delay()).await;
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
}
