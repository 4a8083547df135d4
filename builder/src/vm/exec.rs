//! Commands in a machine, by a port of its own that a unit serves.

use std::io::{BufRead, BufReader, Write};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use super::command::Done;
use super::machine::Vm;
use crate::error::{Error, Result, fail};

impl Vm {
    /// Runs a shell command as root inside.
    ///
    /// # Errors
    /// The machine does not run, or does not answer for five minutes.
    pub fn exec(&self, command: &str) -> Result<Done> {
        self.exec_within(command, Duration::from_secs(300))
    }

    /// Runs a shell command as root inside. One that takes longer than `patience` goes on, and
    /// its answer is lost.
    ///
    /// # Errors
    /// The machine does not run, or does not answer in time.
    pub fn exec_within(&self, command: &str, patience: Duration) -> Result<Done> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        if let Some(container) = self.container() {
            return container.exec(command, patience);
        }
        let told = |e: std::io::Error| Error::Failed(format!("{} does not answer: {e}", self.node));
        let until = Instant::now() + patience;
        let mut port = self.knock("exec.sock", until).map_err(told)?;
        // Answers to questions that others gave up are on the same line.
        let id = format!("{}.{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        // The first line's end ends what somebody who was cut off may have begun.
        port.write_all(format!("\n{id} {}\n", BASE64.encode(command)).as_bytes()).map_err(told)?;
        let mut answers = BufReader::new(&port);
        loop {
            let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            port.set_read_timeout(Some(left)).map_err(told)?;
            let mut line = String::new();
            if answers.read_line(&mut line).map_err(told)? == 0 {
                return fail(format!("{} was switched off", self.node));
            }
            if let Some(done) = answer(&line, &id) {
                return Ok(done);
            }
        }
    }
}

/// A command's status and output, if the line is the answer to this one.
fn answer(line: &str, id: &str) -> Option<Done> {
    let mut words = line.trim_end_matches('\n').splitn(3, ' ');
    let (of, status, output) = (words.next()?, words.next()?, words.next()?);
    let output = BASE64.decode(output).ok()?;
    let status = status.parse().ok()?;
    (of == id).then(|| Done { status, output: String::from_utf8_lossy(&output).into_owned() })
}
