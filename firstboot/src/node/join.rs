//! A node's side of joining: sends claims to the hubs until one grants a slot.

use fleet::{Grant, JoinReply, JoinRequest, Joiner, LONGEST, PROTOCOL, encoding};

use crate::client::backoff::Backoff;
use crate::error::{Error, Result};
use crate::host::console::log_event;
use crate::host::journal::Event;
use crate::host::screen;
use crate::node::hubs::{Hubs, read};
use crate::node::image::Image;
use crate::node::keys::Keys;

/// Sends claims to the hubs until one grants a slot.
///
/// # Errors
/// If a hub refuses the claim for a reason that does not change with time.
pub async fn join(hubs: &Hubs, joiner: &Joiner, image: &Image, keys: &Keys) -> Result<Grant> {
    let asked = JoinRequest {
        version: PROTOCOL,
        token: joiner.token.clone(),
        group: image.info.group.clone(),
        image: image.info.version.clone(),
        mesh_key: keys.mesh_public()?,
        tls_key: encoding::encode(keys.tls.public()?.as_bytes()),
    };
    let body = serde_json::to_vec(&asked).map_err(Error::json("the claim"))?;
    log_event(Event::Asking, &format!("asking {} for a slot in {}", hubs.slots().join(", "), asked.group));
    let mut pause = Backoff::default();
    let mut reported = String::new();
    loop {
        let mut answers = Vec::new();
        for hub in hubs.shuffled() {
            let slot = &hub.slot;
            let answer = async {
                let mut connection = hubs.public(hub).await?;
                Ok(connection.post_signed("/v1/join", &body, |message| joiner.key.sign(message), LONGEST).await?)
            };
            match answer.await.and_then(|b| read(slot, &b)) {
                Ok(JoinReply::Granted(grant)) => {
                    screen::waits(None);
                    return Ok(grant);
                }
                Ok(JoinReply::Refused(refusal)) if !refusal.reason.passes() => {
                    return Err(Error::Configuration(format!("{slot} refuses this node: {}", refusal.text)));
                }
                Ok(JoinReply::Refused(refusal)) => answers.push((slot.as_str(), Ok(refusal.text))),
                Err(e) => answers.push((slot.as_str(), Err(e.chain()))),
            }
        }
        // Only a new reason goes to the console, because the node asks every minute or more often.
        let why = summary(answers);
        screen::waits(Some(format!("no slot yet: {why}")));
        if why != reported {
            log_event(Event::Waiting, &format!("still without a slot: {why}"));
            reported = why;
        }
        tokio::time::sleep(pause.next_delay()).await;
    }
}

/// Returns the hubs' replies and errors as one line. Equal replies appear once, with the names of their hubs. The order
/// of the requests does not change the line.
fn summary(mut answers: Vec<(&str, std::result::Result<String, String>)>) -> String {
    answers.sort_unstable();
    let mut lines: Vec<(Vec<&str>, String)> = Vec::new();
    for (hub, answer) in answers {
        match answer {
            Ok(text) => match lines.iter_mut().find(|(_, there)| *there == text) {
                Some((hubs, _)) => hubs.push(hub),
                None => lines.push((vec![hub], text)),
            },
            // The error names the hub.
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
    fn summary_has_equal_replies_once() {
        let refused = |text: &str| Ok(text.to_owned());
        let unreachable = Err("hub-2 does not answer".to_owned());
        let one = vec![
            ("hub-3", refused("taken")),
            ("hub-2", unreachable),
            ("hub-1", refused("taken")),
            ("hub-4", refused("later")),
        ];
        let mut other = one.clone();
        other.reverse();
        assert_eq!(summary(one), "hub-1, hub-3: taken; hub-2 does not answer; hub-4: later");
        assert_eq!(summary(other), "hub-1, hub-3: taken; hub-2 does not answer; hub-4: later");
    }
}
