//! Messages on the machine's console, for an operator in front of it and for remote consoles.

use std::fs::OpenOptions;
use std::io::Write;
use std::sync::LazyLock;

use fleet::netboot::printable;
use tokio::sync::watch;

use crate::host::journal::{Event, record};
use crate::host::notify::notify;

static LAST: LazyLock<watch::Sender<String>> = LazyLock::new(|| watch::Sender::new(String::new()));

/// Writes a message to the console, the journal, `systemctl status` and D-Bus.
pub fn log_event(event: Event, text: &str) {
    record(event, text);
    notify(&status(text));
    let text = printable(text);
    LAST.send_replace(text.clone());
    // A machine may have no console.
    if let Ok(mut console) = OpenOptions::new().write(true).open("/dev/console") {
        let _ = console.write_all(format!("bakehouse: {text}\r\n").as_bytes());
    }
}

/// Returns a receiver of the last message, and of later ones.
#[must_use]
pub fn said() -> watch::Receiver<String> {
    LAST.subscribe()
}

/// Returns the notification that sets the unit's status. The text may quote the reply of a hub, in which a line break
/// would begin an assignment of its own.
fn status(text: &str) -> String {
    format!("STATUS={}", printable(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reply_of_a_hub_is_one_assignment_of_a_notification() {
        assert_eq!(
            status("still without a slot: no\nSTOPPING=1\r\x1b[2J"),
            "STATUS=still without a slot: no\\nSTOPPING=1\\r\\u{1b}[2J"
        );
    }
}
