//! Commands in a machine: the unit that serves them, and what they give.

use std::time::Duration;

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

/// The last line on a console that says something.
pub(super) fn last_word(console: &str) -> &str {
    console.lines().rev().map(str::trim).find(|l| !l.is_empty()).unwrap_or_default()
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
