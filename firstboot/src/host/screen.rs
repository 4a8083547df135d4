//! What a node without a hub shows on its screen and its serial console: what it waits for, its addresses, and the last
//! warnings of its journal. For an operator in front of a machine that no other machine reaches.

mod layout;

use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::net::IpAddr;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;
use nix::sys::socket::{SockaddrIn6, SockaddrStorage};
use rustix::termios::tcgetwinsize;
use serde::Deserialize;
use serde_json::Value;
use tracing::warn;

use crate::host::console::{CONSOLES, is_taken};
use layout::{Page, plain};

/// Time without a hub or a slot after which the node shows its state.
const PATIENCE: Duration = Duration::from_secs(60);
/// Shortest time between two pages.
const REFRESH: Duration = Duration::from_secs(60);
/// Number of journal entries on a page.
const ENTRIES: usize = 12;
/// Largest output of `journalctl` that the agent reads, in bytes.
const MOST: u64 = 256 * 1024;
/// Time limit for `journalctl`. The disk may be what is broken.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The screen: the virtual terminal in the foreground.
const SCREEN: &str = "/dev/tty0";

static STATE: Mutex<State> = Mutex::new(State { title: String::new(), waits: None });

/// What the agent has reported.
struct State {
    /// Slot or group, and fleet.
    title: String,
    /// Since when the node waits for a hub or a slot, and why.
    waits: Option<(Instant, String)>,
}

impl State {
    /// Records why the node waits, or that it does not. The wait begins with the first reason.
    fn waits(&mut self, why: Option<String>) {
        let since = self.waits.as_ref().map_or_else(Instant::now, |(since, _)| *since);
        self.waits = why.map(|why| (since, why));
    }
}

/// Sets the name of this node on the page.
pub(crate) fn name(title: &str) {
    title.clone_into(&mut STATE.lock().unwrap_or_else(PoisonError::into_inner).title);
}

/// Reports why the node waits for a hub or a slot, or that it does not wait.
pub(crate) fn waits(why: Option<String>) {
    STATE.lock().unwrap_or_else(PoisonError::into_inner).waits(why);
}

/// Starts the thread that shows the page while the node waits. The thread has nothing to do with the node's duties, so
/// a disk or a console that hangs delays only the page.
pub(crate) fn keep() {
    let started = std::thread::Builder::new().name("screen".to_owned()).spawn(|| {
        let mut shown = Shown::default();
        loop {
            std::thread::sleep(Duration::from_secs(1));
            shown.update();
        }
    });
    if let Err(e) = started {
        warn!("cannot start the thread of the console's page: {e}");
    }
}

/// What the consoles show.
#[derive(Default)]
struct Shown {
    /// Time of the last page, while the node waits.
    at: Option<Instant>,
    /// The part of the last page that does not change each minute.
    told: Option<(String, Vec<String>)>,
}

impl Shown {
    /// Shows a page, or removes it, if that is due.
    fn update(&mut self) {
        if is_taken() {
            // A new page follows as soon as the console is free.
            *self = Self::default();
            return;
        }
        let (title, waits) = {
            let state = STATE.lock().unwrap_or_else(PoisonError::into_inner);
            (state.title.clone(), state.waits.clone())
        };
        let Some((since, why)) = waits else {
            if self.at.take().is_some() {
                self.told = None;
                // Programs read the agent's messages on the serial console, so nothing goes there.
                if let (Some(mut screen), _) = consoles() {
                    let _ = screen.write_all(b"\x1b[H\x1b[JConnected to a hub.\r\n");
                }
            }
            return;
        };
        if since.elapsed() < PATIENCE || self.at.is_some_and(|at| at.elapsed() < REFRESH) {
            return;
        }
        let (screen, serial) = consoles();
        self.at = Some(Instant::now());
        let page = Page {
            title: plain(&title),
            why: plain(&why),
            minutes: since.elapsed().as_secs() / 60,
            addresses: addresses(),
            entries: entries(),
        };
        if let Some(mut screen) = screen {
            let size = tcgetwinsize(&screen).map_or((0, 0), |size| (size.ws_col, size.ws_row));
            // There is no other place to report that a screen cannot be written.
            let _ = screen.write_all(page.for_screen(size).as_bytes());
        }
        let told = Some((page.why.clone(), page.addresses.clone()));
        // A serial console may be a log, so only news go there.
        if told != self.told
            && let Some(mut serial) = serial
        {
            let _ = serial.write_all(page.for_serial().as_bytes());
            self.told = told;
        }
    }
}

/// Opens the screen and the serial console, if the kernel uses them as consoles.
fn consoles() -> (Option<File>, Option<File>) {
    let active = fs::read_to_string(CONSOLES).unwrap_or_default();
    let (has_screen, has_serial) = devices(&active);
    let open = |path: &str| OpenOptions::new().write(true).open(path).ok();
    (has_screen.then(|| open(SCREEN)).flatten(), has_serial.then(|| open("/dev/console")).flatten())
}

/// Whether the screen is one of the kernel's consoles, and whether `/dev/console` is another device.
fn devices(active: &str) -> (bool, bool) {
    let is_screen = |name: &str| name.strip_prefix("tty").is_some_and(|n| n.bytes().all(|b| b.is_ascii_digit()));
    let names = || active.split_whitespace();
    (names().any(is_screen), !names().next_back().is_some_and(is_screen))
}

/// Returns a line for each interface, with its addresses, or the reason why it has none.
fn addresses() -> Vec<String> {
    let Ok(all) = getifaddrs() else { return Vec::new() };
    let mut lines: Vec<(String, bool, Vec<String>)> = Vec::new();
    for one in all.filter(|one| !one.flags.contains(InterfaceFlags::IFF_LOOPBACK)) {
        let at = lines.iter().position(|(name, ..)| *name == one.interface_name).unwrap_or(lines.len());
        if at == lines.len() {
            lines.push((one.interface_name.clone(), one.flags.contains(InterfaceFlags::IFF_RUNNING), Vec::new()));
        }
        let address = one.address.as_ref();
        let v4 = address.and_then(SockaddrStorage::as_sockaddr_in).map(|a| IpAddr::from(a.ip()));
        let v6 = address.and_then(SockaddrStorage::as_sockaddr_in6).map(SockaddrIn6::ip);
        let v6 = v6.filter(|ip| !ip.is_unicast_link_local()).map(IpAddr::from);
        lines[at].2.extend(v4.or(v6).iter().map(ToString::to_string));
    }
    let line = |(name, runs, addresses): (String, bool, Vec<String>)| match (addresses.is_empty(), runs) {
        (false, true) => format!("{name} {}", addresses.join(" ")),
        (false, false) => format!("{name} {} (no link)", addresses.join(" ")),
        (true, true) => format!("{name} has no address"),
        (true, false) => format!("{name} has no link"),
    };
    lines.into_iter().map(|one| plain(&line(one))).collect()
}

/// An entry of the journal, as `journalctl` prints it. A message that is not text is an array of bytes.
#[derive(Deserialize)]
struct Entry {
    #[serde(rename = "SYSLOG_IDENTIFIER")]
    identifier: Option<Value>,
    #[serde(rename = "MESSAGE")]
    message: Option<Value>,
}

/// Returns the last entries of this boot's journal with the level warning or above, the oldest first.
fn entries() -> Vec<String> {
    let count = format!("--lines={ENTRIES}");
    let mut journalctl = Command::new("journalctl");
    journalctl.args(["--boot", "--priority=warning", "--output=json", "--output-fields=SYSLOG_IDENTIFIER,MESSAGE"]);
    journalctl.arg(count).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let Ok(mut child) = journalctl.spawn() else { return Vec::new() };
    let (send, receive) = mpsc::channel();
    if let Some(output) = child.stdout.take() {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            let read = output.take(MOST).read_to_end(&mut bytes);
            let _ = send.send(read.map(|_| String::from_utf8_lossy(&bytes).into_owned()));
        });
    }
    let text = receive.recv_timeout(TIMEOUT).ok().and_then(Result::ok).unwrap_or_default();
    let _ = child.kill();
    let _ = child.wait();
    text.lines().filter_map(entry).collect()
}

/// Returns an entry as `PROGRAM: MESSAGE`.
fn entry(json: &str) -> Option<String> {
    let entry: Entry = serde_json::from_str(json).ok()?;
    let text = |value: Option<&Value>| value.and_then(Value::as_str).map(plain);
    let message = text(entry.message.as_ref())?;
    Some(text(entry.identifier.as_ref()).map_or_else(|| message.clone(), |program| format!("{program}: {message}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serial_console_is_not_the_screen() {
        assert_eq!(devices("tty0 ttyS0\n"), (true, true));
        // A machine without a serial port.
        assert_eq!(devices("tty0\n"), (true, false));
        assert_eq!(devices("hvc0\n"), (false, true));
        // A container has no /sys/class/tty.
        assert_eq!(devices(""), (false, true));
    }

    #[test]
    fn entry_has_program_and_message() {
        let json = r#"{"SYSLOG_IDENTIFIER":"kernel","MESSAGE":"I/O error\u001b[2J","__CURSOR":"s=1"}"#;
        assert_eq!(entry(json).unwrap(), "kernel: I/O error?[2J");
        assert_eq!(entry(r#"{"MESSAGE":"alone"}"#).unwrap(), "alone");
        assert_eq!(entry(r#"{"SYSLOG_IDENTIFIER":"x","MESSAGE":[1,2]}"#), None);
        assert_eq!(entry("not json"), None);
    }

    #[test]
    fn loopback_is_not_shown() {
        assert!(addresses().iter().all(|line| !line.starts_with("lo ")), "{:?}", addresses());
    }

    #[test]
    fn wait_begins_with_the_first_report() {
        let mut state = State { title: String::new(), waits: None };
        state.waits(Some("hub-1 does not answer".to_owned()));
        let (first, _) = state.waits.clone().unwrap();
        state.waits(Some("hub-2 does not answer".to_owned()));
        assert_eq!(state.waits, Some((first, "hub-2 does not answer".to_owned())));
        state.waits(None);
        assert_eq!(state.waits, None);
    }
}
