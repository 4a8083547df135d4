//! One line for whoever stands before the machine, and for whoever watches its console.

use std::fs::OpenOptions;
use std::io::Write;
use std::sync::LazyLock;

use tokio::sync::watch;

use crate::host::journal::{Event, record};
use crate::host::notify::notify;

static LAST: LazyLock<watch::Sender<String>> = LazyLock::new(|| watch::Sender::new(String::new()));

/// Says it on the console, in the journal, in `systemctl status` and over D-Bus.
pub fn say(event: Event, text: &str) {
    record(event, text);
    notify(&format!("STATUS={text}"));
    LAST.send_replace(text.to_owned());
    // A machine without a console still works.
    if let Ok(mut console) = OpenOptions::new().write(true).open("/dev/console") {
        let _ = console.write_all(format!("bakehouse: {text}\r\n").as_bytes());
    }
}

/// What was said last, and what will be.
#[must_use]
pub fn said() -> watch::Receiver<String> {
    LAST.subscribe()
}
