//! Errors of the page.

use std::fmt::Display;

/// Error of the page.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An operation on a file or a socket failed.
    #[error("cannot {action}")]
    Io {
        /// The operation, and its object.
        action: String,
        /// Cause.
        source: std::io::Error,
    },
    /// A text is not the expected JSON.
    #[error("cannot parse {what}")]
    Json {
        /// The text's source.
        what: String,
        /// Cause.
        source: serde_json::Error,
    },
    /// Prometheus or Alertmanager does not answer, or refuses a query.
    #[error("{service} does not answer: {cause}")]
    Service {
        /// Name of the service.
        service: &'static str,
        /// Cause.
        cause: String,
    },
}

/// Result of the page's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Returns a function that adds the failed action and its object to a cause.
    pub fn io(action: &str, object: impl Display) -> impl FnOnce(std::io::Error) -> Self {
        let action = format!("{action} {object}");
        move |source| Self::Io { action, source }
    }

    /// Returns the error and its causes on one line.
    #[must_use]
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(e) = cause {
            text.push_str(&format!(": {e}"));
            cause = e.source();
        }
        text
    }
}
