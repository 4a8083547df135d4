//! Commands in a machine, by a port of its own that a unit serves.

use std::io::{BufRead, BufReader, Write};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use super::Vm;
use crate::error::{Error, Result, fail};

/// How long a machine that lives needs for an answer, however busy the host is; one that is busy starting may need
/// longer.
pub(super) const ANSWER: Duration = Duration::from_secs(30);

/// Serves commands on a port of the machine's own: a number and base64 in; the number, status and
/// base64 out. One that hangs holds nobody up. Where nobody is connected, reading ends at once.
pub(super) const EXEC_UNIT: &str = "\
[Unit]
Description=Run the host's commands
After=dbus.service
[Service]
ExecStart=/usr/bin/bash -c 'port=/dev/virtio-ports/bakehouse.exec; exec 5<> <(:); \
until [ -e $$port ]; do read -rt 0.5 -u 5; done; exec 3<>$$port; \
while true; do if read -r id line <&3; then [ -n \"$$line\" ] && { \
out=$$(bash -c \"$$(printf %%s \"$$line\" | base64 -d)\" 2>&1 </dev/null 3>&- 5>&- | base64 -w0; exit $${PIPESTATUS[0]}); \
status=$$?; (flock 4; printf \"%%s %%s %%s\\n\" \"$$id\" \"$$status\" \"$$out\" >&3) 4>/run/bakehouse-exec.lock; } & \
else read -rt 0.3 -u 5; fi; done'
Restart=always
";
pub(super) const EXEC_WANTED: &str = "[Unit]\nWants=bakehouse-exec.service\n";

/// What a shell runs for these words: one alone is a command line, several are a command and its
/// arguments, which reach it as they are.
#[must_use]
pub fn command_line(words: &[String]) -> String {
    let quoted = |word: &String| {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:@%+,".contains(c);
        if !word.is_empty() && word.chars().all(plain) {
            word.clone()
        } else {
            format!("'{}'", word.replace('\'', r"'\''"))
        }
    };
    match words {
        [line] => line.clone(),
        words => words.iter().map(quoted).collect::<Vec<_>>().join(" "),
    }
}

/// What a command in a machine gave.
#[derive(Clone, Debug)]
pub struct Done {
    pub status: i32,
    pub output: String,
}

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

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn words_reach_the_command_as_they_are() {
        let words = ["printf", "%s|", "a b", "it's", "", "$HOME;x", "K=v"].map(str::to_owned);
        let told = Command::new("sh").args(["-c", &command_line(&words)]).output().expect("a shell");
        assert_eq!(String::from_utf8_lossy(&told.stdout), "a b|it's||$HOME;x|K=v|");
        assert_eq!(command_line(&["echo a | cat".to_owned()]), "echo a | cat");
    }
}
