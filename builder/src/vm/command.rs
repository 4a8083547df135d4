//! Commands in a machine: the unit that runs them, and their results.

use std::time::Duration;

/// Time within which a running machine replies, even on a busy host. A machine that boots may need longer.
pub(super) const REPLY_TIMEOUT: Duration = Duration::from_secs(30);

/// Unit that runs commands from the virtio serial port `bakehouse.exec`.
///
/// A request is a line with an id and the command in base64. A reply is a line with the id, the exit status and the
/// output in base64. Each command runs in the background, so a command that hangs does not block others. Reads return
/// at once while no client is connected; the unit then pauses 0.3 s.
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

/// Returns the shell command line for these words. A single word is a command line already. Several words are a
/// command and its arguments, which the function quotes.
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

/// Result of a command in a machine.
#[derive(Clone, Debug)]
pub struct Done {
    /// Exit status.
    pub status: i32,
    /// Standard output and standard error.
    pub output: String,
}

/// Returns the last line of a console that is not blank.
pub(super) fn last_line(console: &str) -> &str {
    console.lines().rev().map(str::trim).find(|l| !l.is_empty()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn arguments_reach_the_command_unchanged() {
        let words = ["printf", "%s|", "a b", "it's", "", "$HOME;x", "K=v"].map(str::to_owned);
        let output = Command::new("sh").args(["-c", &command_line(&words)]).output().expect("a shell");
        assert_eq!(String::from_utf8_lossy(&output.stdout), "a b|it's||$HOME;x|K=v|");
        assert_eq!(command_line(&["echo a | cat".to_owned()]), "echo a | cat");
    }
}
