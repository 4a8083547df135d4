//! The journal, in its own protocol: what happens to a node has a number that stays, so that
//! `journalctl MESSAGE_ID=…` finds it in whatever words.

use std::os::unix::net::UnixDatagram;

const SOCKET: &str = "/run/systemd/journal/socket";

/// What happens to a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// It asks the hubs for a slot.
    Asking,
    /// No hub has given it a slot yet; the message says why.
    Waiting,
    /// It has its slot for the first time.
    Joined,
    /// Its role's services are started.
    Starting,
    /// All of them run.
    Ready,
    /// Another machine has its slot: it has stopped.
    Fenced,
    /// It is to leave the fleet: it hands over, and stops.
    Leaving,
    /// The primary is out of reach: a standby may take its place.
    Deposed,
    /// Something only a person can mend; the message says what.
    Stopped,
    /// The image did not prove itself; the machine restarts if there is another.
    Unwell,
    /// Its turn has come: a newer image is loaded.
    Changing,
    /// The newer image was not loaded; it stays as it is.
    NotLoaded,
    /// The newer image is loaded; it restarts.
    Restarting,
}

impl Event {
    /// Its `MESSAGE_ID`, for ever.
    #[must_use]
    pub fn id(self) -> &'static str {
        match self {
            Self::Asking => "2a940f1d1d3f4c08875d3666b5c85668",
            Self::Waiting => "c57ee05a949f4b0883ab0d71a5cbd1d8",
            Self::Joined => "4710a24b19b84f0f8d015e7414ab14be",
            Self::Starting => "74b55afba0f24abe81f825e454cced90",
            Self::Ready => "ed332b9acea34a0a815d470208bf32ac",
            Self::Fenced => "7821c7809036486380b365c57b3d1af7",
            Self::Leaving => "5b0e1f3a6c9d4b7e8a2f4d6c8e0b1a39",
            Self::Deposed => "8f0c2e9d61b34a7c9d5e47b1a2c36f58",
            Self::Stopped => "424c74a10ab84d0682252246d5d67e4a",
            Self::Unwell => "cd7f83f7efc4486e8ee0159ec8aa1aff",
            Self::Changing => "55e9a1067c1b47f380ecbd230fafea28",
            Self::NotLoaded => "bfee075d293e41ae8a9bbe02b6d0febf",
            Self::Restarting => "dba5ab0f619a404e81c1653a014dc3c8",
        }
    }

    /// As syslog numbers it: 3 error, 4 warning, 6 information.
    fn priority(self) -> u8 {
        match self {
            Self::Fenced | Self::Stopped | Self::Unwell => 3,
            Self::Waiting | Self::Deposed | Self::NotLoaded => 4,
            _ => 6,
        }
    }
}

/// Writes it down; on standard output where there is no journal.
pub fn record(event: Event, text: &str) {
    let entry = entry(event, text);
    let sent = UnixDatagram::unbound().and_then(|socket| socket.send_to(&entry, SOCKET));
    if sent.is_err() {
        println!("{text}");
    }
}

fn entry(event: Event, text: &str) -> Vec<u8> {
    let mut entry =
        format!("SYSLOG_IDENTIFIER=firstboot\nMESSAGE_ID={}\nPRIORITY={}\nMESSAGE\n", event.id(), event.priority())
            .into_bytes();
    // With its length before it, it may have lines.
    entry.extend((text.len() as u64).to_le_bytes());
    entry.extend(text.as_bytes());
    entry.push(b'\n');
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_what_journald_reads() {
        let entry = entry(Event::Ready, "two\nlines");
        let head = format!("SYSLOG_IDENTIFIER=firstboot\nMESSAGE_ID={}\nPRIORITY=6\nMESSAGE\n", Event::Ready.id());
        let text = [&9_u64.to_le_bytes()[..], b"two\nlines\n"].concat();
        assert_eq!(entry, [head.as_bytes(), &text].concat());
        assert_eq!(Event::Ready.id().len(), 32);
    }
}
