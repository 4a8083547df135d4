//! Messages on the machine's console, for an operator in front of it and for remote consoles.

use std::fs::OpenOptions;
use std::io::Write;
use std::sync::LazyLock;

use tokio::sync::watch;

use crate::host::journal::{Event, record};
use crate::host::notify::notify;

static LAST: LazyLock<watch::Sender<String>> = LazyLock::new(|| watch::Sender::new(String::new()));

/// Writes a message to the console, the journal, `systemctl status` and D-Bus.
pub fn say(event: Event, text: &str) {
    record(event, text);
    notify(&format!("STATUS={text}"));
    LAST.send_replace(text.to_owned());
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
