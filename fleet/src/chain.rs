//! Text of an error with its causes.

use std::error::Error;
use std::fmt;

/// Begins the line of a message that gives the fix.
const HELP: &str = "\n  help: ";

/// An error, its causes and their fixes, as texts.
///
/// A type's own message names the operation only, and [`Error::source`] is the cause. Messages of other crates may
/// contain the message of their cause. Such a cause is left out, so each cause appears once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ErrorChain {
    /// The error's message, and the messages of its causes, the direct cause first.
    pub messages: Vec<String>,
    /// Fixes, which the messages have in lines that begin with `help:`.
    pub fixes: Vec<String>,
}

impl ErrorChain {
    /// Reads an error and its causes.
    ///
    /// ```
    /// let cause = "port 70000".parse::<u16>().unwrap_err();
    /// assert_eq!(fleet::ErrorChain::new(&cause).to_string(), "invalid digit found in string");
    /// ```
    #[must_use]
    pub fn new(error: &(dyn Error + 'static)) -> Self {
        let mut chain = Self { messages: Vec::new(), fixes: Vec::new() };
        let mut next = Some(error);
        while let Some(error) = next {
            let text = error.to_string();
            let mut parts = text.split(HELP);
            let message = parts.next().unwrap_or_default();
            if !chain.messages.last().is_some_and(|before| before.contains(message)) {
                chain.messages.push(message.to_owned());
            }
            for fix in parts {
                if !chain.fixes.iter().any(|known| known == fix) {
                    chain.fixes.push(fix.to_owned());
                }
            }
            next = error.source();
        }
        chain
    }

    /// Returns the chain on one line, for logs and the console: `error: cause; fix`.
    #[must_use]
    pub fn one_line(&self) -> String {
        let mut text = self.joined();
        for fix in &self.fixes {
            text.push_str("; ");
            text.push_str(fix);
        }
        text
    }

    /// Returns the chain with a line for each cause, and then the fixes.
    #[must_use]
    pub fn lines(&self) -> String {
        self.with_fixes(&self.messages.join("\n  caused by: "))
    }

    /// Returns the messages with colons between them. A cause with several lines, such as a program's output, begins on
    /// a new line.
    fn joined(&self) -> String {
        let mut text = String::new();
        for message in &self.messages {
            if !text.is_empty() {
                text.push_str(if message.contains('\n') { ":\n" } else { ": " });
            }
            text.push_str(message);
        }
        text
    }

    fn with_fixes(&self, text: &str) -> String {
        self.fixes.iter().fold(text.to_owned(), |text, fix| text + HELP + fix)
    }
}

/// Writes `error: cause: cause`, and each fix on a line of its own.
impl fmt::Display for ErrorChain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.with_fixes(&self.joined()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot start the node\n  help: free some space")]
    struct Outer(#[source] Middle);

    #[derive(Debug, thiserror::Error)]
    #[error("cannot write /var/state.json")]
    struct Middle(#[source] io::Error);

    fn outer() -> Outer {
        Outer(Middle(io::Error::from_raw_os_error(28)))
    }

    #[test]
    fn prints_causes_before_fixes() {
        let chain = ErrorChain::new(&outer());
        let cause = "No space left on device (os error 28)";
        assert_eq!(
            chain.to_string(),
            format!("cannot start the node: cannot write /var/state.json: {cause}\n  help: free some space")
        );
        assert_eq!(
            chain.lines(),
            format!(
                "cannot start the node\n  caused by: cannot write /var/state.json\n  caused by: {cause}\n  \
                 help: free some space"
            )
        );
        assert_eq!(
            chain.one_line(),
            format!("cannot start the node: cannot write /var/state.json: {cause}; free some space")
        );
    }

    #[test]
    fn prints_each_cause_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("the bus failed: {0}")]
        struct Repeats(#[source] io::Error);

        let chain = ErrorChain::new(&Repeats(io::Error::other("closed")));
        assert_eq!(chain.messages, ["the bus failed: closed"]);
    }
}
