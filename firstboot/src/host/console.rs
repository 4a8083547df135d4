//! Messages on the machine's console, for an operator in front of it and for remote consoles.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::sync::LazyLock;

use fleet::netboot::printable;
use tokio::sync::watch;

use crate::host::journal::{Event, record};
use crate::host::notify::notify;

/// The kernel's consoles; `/dev/console` is the last one.
pub(crate) const CONSOLES: &str = "/sys/class/tty/console/active";
/// Folder with a folder for each rescue disk that has opened the maintenance console.
const RESCUE: &str = "/run/bakehouse-rescue";
/// File in the folder of a rescue disk, with the text above the shell's first prompt. It exists while the maintenance
/// console is open.
pub(crate) const BANNER: &str = "banner";

static LAST: LazyLock<watch::Sender<String>> = LazyLock::new(|| watch::Sender::new(String::new()));

/// Writes a message to the console, the journal, `systemctl status` and D-Bus. While the maintenance console is open, a
/// person types on the console, and the message does not go there.
pub fn log_event(event: Event, text: &str) {
    record(event, text);
    notify(&status(text));
    let text = printable(text);
    LAST.send_replace(text.clone());
    if is_taken() {
        return;
    }
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

/// Whether a person has the maintenance console, where nothing else may write.
#[must_use]
pub fn is_taken() -> bool {
    has_banner(Path::new(RESCUE))
}

fn has_banner(dir: &Path) -> bool {
    let disks = fs::read_dir(dir).into_iter().flatten().flatten();
    disks.map(|disk| disk.path().join(BANNER)).any(|banner| banner.exists())
}

/// Returns the names of the terminals that the kernel uses as consoles, for example `tty1` and `ttyS0`.
#[must_use]
pub(crate) fn terminals() -> Vec<String> {
    let active = fs::read_to_string(CONSOLES).unwrap_or_default();
    let found = terminals_of(&active);
    found.into_iter().filter(|name| Path::new("/dev").join(name).exists()).collect()
}

fn terminals_of(active: &str) -> Vec<String> {
    let is_name = |name: &&str| name.bytes().all(|byte| byte.is_ascii_alphanumeric());
    // `tty0` is the virtual terminal in the foreground, and `tty1` is in the foreground after a boot.
    let terminal = |name: &str| if name == "tty0" { "tty1".to_owned() } else { name.to_owned() };
    let mut names: Vec<String> = active.split_whitespace().filter(is_name).map(terminal).collect();
    names.sort_unstable();
    names.dedup();
    names
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
    fn maintenance_console_is_on_every_console_of_the_kernel() {
        assert_eq!(terminals_of("tty0 ttyS0\n"), ["tty1", "ttyS0"]);
        assert_eq!(terminals_of("hvc0 ../x tty1 tty0"), ["hvc0", "tty1"]);
        assert_eq!(terminals_of(""), [""; 0]);
    }

    #[test]
    fn console_is_taken_while_a_disk_has_a_banner() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!has_banner(&dir.path().join("missing")) && !has_banner(dir.path()));
        fs::create_dir(dir.path().join("vdb1")).unwrap();
        assert!(!has_banner(dir.path()));
        fs::write(dir.path().join("vdb1").join(BANNER), "").unwrap();
        assert!(has_banner(dir.path()));
    }

    #[test]
    fn reply_of_a_hub_is_one_assignment_of_a_notification() {
        assert_eq!(
            status("still without a slot: no\nSTOPPING=1\r\x1b[2J"),
            "STATUS=still without a slot: no\\nSTOPPING=1\\r\\u{1b}[2J"
        );
    }
}
