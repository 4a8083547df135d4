//! What a machine says on its serial console, and waiting for it.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use super::command::ANSWER;
use super::machine::Vm;
use crate::error::{Error, Result};

/// What Linux says where QEMU's emulation lost a processor's timer.
const LOST_TIMER: &str = "Possible timer handling issue";
/// How much Linux says after it, in lines, and how long a machine is silent that has stopped for good.
const AFTER_LOST_TIMER: (usize, Duration) = (100, Duration::from_secs(60));
/// How often a machine that is waited for is looked at, if it says nothing.
const LOOK: Duration = Duration::from_secs(1);

impl Vm {
    /// Everything on the serial console since the last start.
    #[must_use]
    pub fn console(&self) -> String {
        plain(&fs::read(self.path("console.log")).unwrap_or_default())
    }

    /// Waits until `done` finds what it looks for in the console's text. A machine whose emulated
    /// processors have stopped is switched off and on, and its console says so.
    ///
    /// # Errors
    /// The machine ends, or the time does: with the console's last lines.
    pub fn wait_console<T>(&self, timeout: Duration, mut done: impl FnMut(&str) -> Option<T>) -> Result<T> {
        let until = Instant::now() + timeout;
        let log = self.path("console.log");
        let told = |e: nix::Error| Error::Failed(format!("cannot watch {}: {e}", log.display()));
        let events = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC).map_err(told)?;
        events.add_watch(&log, AddWatchFlags::IN_MODIFY).map_err(told)?;
        let mut file = File::open(&log).map_err(Error::io("open", &log))?;
        let mut bytes = Vec::new();
        let mut heard = Instant::now();
        loop {
            file.seek(SeekFrom::Start(bytes.len() as u64)).map_err(Error::io("read", &log))?;
            if file.read_to_end(&mut bytes).map_err(Error::io("read", &log))? > 0 {
                heard = Instant::now();
            }
            let text = plain(&bytes);
            if let Some(found) = done(&text) {
                return Ok(found);
            }
            if heard.elapsed() > AFTER_LOST_TIMER.1 && has_lost_its_timer(&text) {
                // One that only has nothing to say answers.
                if self.exec_within("true", ANSWER).is_err() {
                    self.start_again()?;
                }
                heard = Instant::now();
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.ended(&format!("did not come so far in {} s", timeout.as_secs())));
            }
            if !self.is_running() {
                return Err(self.ended("ended"));
            }
            // Its end is no event: it is looked for now and then.
            let mut fds = [PollFd::new(events.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::try_from(left.min(LOOK)).unwrap_or(PollTimeout::MAX)).map_err(told)?;
            let _ = events.read_events();
        }
    }

    fn ended(&self, how: &str) -> Error {
        let console = self.console();
        let lines: Vec<&str> = console.lines().collect();
        let tail = lines[lines.len().saturating_sub(30)..].join("\n");
        Error::Failed(format!("{} {how}; the end of its console:\n{tail}", self.node))
    }
}

/// Whether the last that a machine's Linux said is that a timer did not fire.
fn has_lost_its_timer(console: &str) -> bool {
    console.lines().rev().take(AFTER_LOST_TIMER.0).any(|line| line.contains(LOST_TIMER))
}

/// Text without the terminal's escape sequences.
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
    fn escape_sequences_go() {
        assert_eq!(plain(b"\x1b[0;32m  OK  \x1b[0m a\r\nb\x1b]0;t\x07c"), "  OK   a\nbc");
    }

    #[test]
    fn a_machine_that_started_again_has_not_lost_its_timer() {
        let stopped = format!("[  0.1] Linux\n[ 63.1] rcu: {LOST_TIMER} on cpu=0\n[ 63.2]  </TASK>\n");
        assert!(has_lost_its_timer(&stopped));
        assert!(!has_lost_its_timer(&format!("{stopped}{}", "[  0.1] Linux\n".repeat(200))));
    }

    proptest::proptest! {
        #[test]
        fn no_console_panics(bytes: Vec<u8>) {
            plain(&bytes);
        }
    }
}
