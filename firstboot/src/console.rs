//! One line for whoever stands before the machine, and for whoever watches its console.

use std::fs::OpenOptions;
use std::io::Write;

use crate::notify::notify;

/// Says it on the console, in the journal and in `systemctl status`.
pub fn say(text: &str) {
    println!("{text}");
    notify(&format!("STATUS={text}"));
    // A machine without a console still works.
    if let Ok(mut console) = OpenOptions::new().write(true).open("/dev/console") {
        let _ = console.write_all(format!("bakehouse: {text}\r\n").as_bytes());
    }
}
