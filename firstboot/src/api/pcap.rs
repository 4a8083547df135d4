//! Captures of packets, for operators. systemd runs `firstboot capture` in a service of its own, because the agent's
//! sandbox has no right to capture.

use std::sync::Arc;
use std::time::Duration;

use fleet::node_api::{LARGEST_CAPTURE, LARGEST_SNAP, LONGEST_CAPTURE, PcapRequest};
use hyper::StatusCode;

use super::exec::{self, Job};
use super::listener::Client;
use super::reply::{Answer, Refusal};
use crate::host::capture::Capture;

/// The agent's program.
const PROGRAM: &str = "/usr/lib/bakehouse/firstboot";
/// Longest name of an interface, in bytes.
const LONGEST_NAME: usize = 15;
/// Time beyond the capture's own limit after which systemd stops the program, in seconds.
const STOP: u32 = 5;

/// Captures packets, and returns the file while it grows.
pub(super) async fn run(client: &Arc<Client>, asked: &PcapRequest) -> Answer {
    let capture = checked(asked)?;
    let [interface, seconds, bytes, snap] = capture.args();
    let what = format!("pcap of {interface} for up to {seconds} s, {bytes} bytes, {snap} bytes of each packet");
    let command = [PROGRAM.to_owned(), "capture".to_owned(), interface, seconds, bytes, snap];
    exec::stream(client, Job::new(command.to_vec(), asked.seconds + STOP, what)?).await
}

fn checked(asked: &PcapRequest) -> Result<Capture, Refusal> {
    let invalid = |text: String| Err(Refusal::new(StatusCode::BAD_REQUEST, text));
    let permitted = |c: char| c.is_ascii_alphanumeric() || "-_.@:".contains(c);
    let is_name = |name: &String| (1..=LONGEST_NAME).contains(&name.len()) && name.chars().all(permitted);
    // A name that begins with a hyphen would be an option.
    if asked.interface.as_ref().is_some_and(|name| !is_name(name) || name.starts_with('-')) {
        return invalid("the name of the interface is not valid".to_owned());
    }
    if !(1..=LONGEST_CAPTURE).contains(&asked.seconds) {
        return invalid(format!("the time limit is not from 1 to {LONGEST_CAPTURE} s"));
    }
    if !(1..=LARGEST_CAPTURE).contains(&asked.bytes) {
        return invalid(format!("the size is not from 1 to {LARGEST_CAPTURE} bytes"));
    }
    if !(1..=LARGEST_SNAP).contains(&asked.snap) {
        return invalid(format!("the number of bytes of each packet is not from 1 to {LARGEST_SNAP}"));
    }
    let time = Duration::from_secs(asked.seconds.into());
    Ok(Capture { interface: asked.interface.clone(), time, bytes: asked.bytes, snap: asked.snap })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_checked() {
        let good = PcapRequest { interface: Some("wg-hub1".to_owned()), seconds: 30, bytes: 1 << 20, snap: 256 };
        assert!(checked(&good).is_ok());
        assert!(checked(&PcapRequest { interface: None, ..good.clone() }).is_ok());
        for name in ["", "-i", "a b", "a/b", "ä", "0123456789abcdef", "$(x)"] {
            let asked = PcapRequest { interface: Some(name.to_owned()), ..good.clone() };
            assert_eq!(checked(&asked).map_err(|refusal| refusal.status), Err(StatusCode::BAD_REQUEST), "{name}");
        }
        for asked in [
            PcapRequest { seconds: 0, ..good.clone() },
            PcapRequest { seconds: LONGEST_CAPTURE + 1, ..good.clone() },
            PcapRequest { bytes: 0, ..good.clone() },
            PcapRequest { bytes: LARGEST_CAPTURE + 1, ..good.clone() },
            PcapRequest { snap: 0, ..good.clone() },
            PcapRequest { snap: LARGEST_SNAP + 1, ..good.clone() },
        ] {
            assert!(checked(&asked).is_err(), "{asked:?}");
        }
    }
}
