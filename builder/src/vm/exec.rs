//! Runs commands in a machine through a virtio serial port.

use std::io::{BufRead, BufReader, Write};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use super::command::Done;
use super::machine::Vm;
use crate::error::{Error, Result, fail};

impl Vm {
    /// Runs a shell command as root in the machine.
    ///
    /// # Errors
    /// If the machine does not run, or does not reply within 300 s.
    pub fn exec(&self, command: &str) -> Result<Done> {
        self.exec_within(command, Duration::from_secs(300))
    }

    /// Runs a shell command as root in the machine. A command that takes longer than `timeout` continues to run, and
    /// its output is discarded.
    ///
    /// # Errors
    /// If the machine does not run, or does not reply within `timeout`.
    pub fn exec_within(&self, command: &str, timeout: Duration) -> Result<Done> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        if let Some(container) = self.container() {
            return container.exec(command, timeout);
        }
        let context = |e: std::io::Error| Error::at(format!("no reply from {}", self.node))(e);
        let until = Instant::now() + timeout;
        let mut port = self.connect("exec.sock", until).map_err(context)?;
        // The port may still return replies to commands whose callers timed out.
        let id = format!("{}.{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        // The leading newline ends a line that an interrupted caller may have left incomplete.
        port.write_all(format!("\n{id} {}\n", BASE64.encode(command)).as_bytes()).map_err(context)?;
        let mut replies = BufReader::new(&port);
        loop {
            let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            port.set_read_timeout(Some(left)).map_err(context)?;
            let mut line = String::new();
            if replies.read_line(&mut line).map_err(context)? == 0 {
                return fail(format!("{} was switched off", self.node));
            }
            if let Some(done) = parse_reply(&line, &id) {
                return Ok(done);
            }
        }
    }
}

/// Parses a command's status and output; `None` if the line replies to another command.
fn parse_reply(line: &str, id: &str) -> Option<Done> {
    let mut fields = line.trim_end_matches('\n').splitn(3, ' ');
    let (of, status, output) = (fields.next()?, fields.next()?, fields.next()?);
    let output = BASE64.decode(output).ok()?;
    let status = status.parse().ok()?;
    (of == id).then(|| Done { status, output: String::from_utf8_lossy(&output).into_owned() })
}
