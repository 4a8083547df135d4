//! A machine's serial console: its text, and waiting for a text.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use super::command::REPLY_TIMEOUT;
use super::machine::Vm;
use crate::error::{Error, Result};

/// Text that Linux prints when QEMU's emulation lost a processor's timer.
const LOST_TIMER: &str = "Possible timer handling issue";
/// Lines that Linux prints after a lost timer, and time without output after which the processors count as stopped.
const AFTER_LOST_TIMER: (usize, Duration) = (100, Duration::from_secs(60));
/// Interval between checks whether a machine still runs, if its console prints nothing.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

impl Vm {
    /// Returns the text of the serial console since the last start.
    #[must_use]
    pub fn console(&self) -> String {
        plain(&fs::read(self.path("console.log")).unwrap_or_default())
    }

    /// Waits until `done` returns a result for the console's text. If the emulated processors have stopped, this
    /// function restarts QEMU and writes a line to the console.
    ///
    /// # Errors
    /// If the machine stops, or `timeout` expires. The message has the console's last lines.
    pub fn wait_console<T>(&self, timeout: Duration, mut done: impl FnMut(&str) -> Option<T>) -> Result<T> {
        let until = Instant::now() + timeout;
        let log = self.path("console.log");
        let context = |e: nix::Error| Error::cannot(format!("watch {}", log.display()))(e);
        let events = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC).map_err(context)?;
        events.add_watch(&log, AddWatchFlags::IN_MODIFY).map_err(context)?;
        let mut file = File::open(&log).map_err(Error::io("open", &log))?;
        let mut bytes = Vec::new();
        let mut last_output = Instant::now();
        loop {
            file.seek(SeekFrom::Start(bytes.len() as u64)).map_err(Error::io("read", &log))?;
            if file.read_to_end(&mut bytes).map_err(Error::io("read", &log))? > 0 {
                last_output = Instant::now();
            }
            let text = plain(&bytes);
            if let Some(found) = done(&text) {
                return Ok(found);
            }
            if last_output.elapsed() > AFTER_LOST_TIMER.1 && has_lost_timer(&text) {
                // An idle machine also prints nothing, but runs commands.
                if self.exec_within("true", REPLY_TIMEOUT).is_err() {
                    self.restart()?;
                }
                last_output = Instant::now();
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.console_error(&format!("is not ready after {} s", timeout.as_secs())));
            }
            if !self.is_running() {
                return Err(self.console_error("stopped"));
            }
            // inotify does not report that QEMU exits, so the loop also polls for it.
            let mut fds = [PollFd::new(events.as_fd(), PollFlags::POLLIN)];
            let interval = PollTimeout::try_from(left.min(CHECK_INTERVAL)).unwrap_or(PollTimeout::MAX);
            poll(&mut fds, interval).map_err(context)?;
            let _ = events.read_events();
        }
    }

    /// Passes the console's text to `print`, and then each new line, until the machine is off.
    ///
    /// # Errors
    /// If the console's file cannot be read, or `print` fails.
    pub fn follow_console(&self, mut print: impl FnMut(&str) -> Result<()>) -> Result<()> {
        let log = self.path("console.log");
        let mut lines = Lines::default();
        let mut read_from = 0;
        loop {
            // Check before the read, so that this function also prints the last lines of a machine that stops.
            let runs = self.is_running();
            let mut file = File::open(&log).map_err(Error::io("open", &log))?;
            let size = file.metadata().map_err(Error::io("read", &log))?.len();
            if size < read_from {
                // The machine has restarted with an empty log.
                (lines, read_from) = (Lines::default(), 0);
            }
            file.seek(SeekFrom::Start(read_from)).map_err(Error::io("read", &log))?;
            let mut bytes = Vec::new();
            read_from += file.read_to_end(&mut bytes).map_err(Error::io("read", &log))? as u64;
            let text = if runs { lines.add(&bytes) } else { lines.add(&bytes) + &lines.end() };
            if !text.is_empty() {
                print(&text)?;
            }
            if !runs {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    fn console_error(&self, what: &str) -> Error {
        let console = self.console();
        let lines: Vec<&str> = console.lines().collect();
        let tail = lines[lines.len().saturating_sub(30)..].join("\n");
        Error::Failed(format!("{} {what}; its console's last lines:\n{tail}", self.node))
    }
}

/// Turns pieces of a console's output into whole lines, because a piece may end within an escape sequence.
#[derive(Default)]
struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    /// Adds a piece. Returns the lines that are complete now.
    fn add(&mut self, bytes: &[u8]) -> String {
        self.rest.extend_from_slice(bytes);
        let end = self.rest.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        plain(&self.rest.drain(..end).collect::<Vec<u8>>())
    }

    /// Returns the incomplete last line.
    fn end(&mut self) -> String {
        plain(&std::mem::take(&mut self.rest))
    }
}

/// Returns whether the console's last lines report a timer that did not fire.
fn has_lost_timer(console: &str) -> bool {
    console.lines().rev().take(AFTER_LOST_TIMER.0).any(|line| line.contains(LOST_TIMER))
}

/// Returns the text without terminal escape sequences.
fn plain(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\u{1b}' => match chars.next() {
                Some('[') => while chars.next().is_some_and(|c| !('@'..='~').contains(&c)) {},
                Some(']' | 'P') => while chars.next().is_some_and(|c| c != '\u{7}' && c != '\\') {},
                Some('(' | ')') => drop(chars.next()),
                _ => {}
            },
            '\r' => {}
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removes_escape_sequences() {
        assert_eq!(plain(b"\x1b[0;32m  OK  \x1b[0m a\r\nb\x1b]0;t\x07c"), "  OK   a\nbc");
    }

    #[test]
    fn follows_whole_lines() {
        let mut lines = Lines::default();
        assert_eq!(lines.add(b"one\r\ntw"), "one\n");
        assert_eq!(lines.add(b"o\x1b[0;3"), "");
        assert_eq!(lines.add(b"2m end\nthree"), "two end\n");
        assert_eq!((lines.end(), lines.end()), ("three".to_owned(), String::new()));
    }

    #[test]
    fn follows_a_console_until_the_machine_is_off() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("console.log"), "bakehouse: ready\r\nlast").unwrap();
        let mut text = String::new();
        let vm = Vm::at("hub-1", dir.path().to_owned());
        vm.follow_console(|piece| {
            text.push_str(piece);
            Ok(())
        })
        .unwrap();
        assert_eq!(text, "bakehouse: ready\nlast");
    }

    #[test]
    fn lost_timer_of_an_earlier_boot_does_not_count() {
        let stopped = format!("[  0.1] Linux\n[ 63.1] rcu: {LOST_TIMER} on cpu=0\n[ 63.2]  </TASK>\n");
        assert!(has_lost_timer(&stopped));
        assert!(!has_lost_timer(&format!("{stopped}{}", "[  0.1] Linux\n".repeat(200))));
    }

    proptest::proptest! {
        #[test]
        fn plain_never_panics(bytes: Vec<u8>) {
            plain(&bytes);
        }
    }
}
