//! Progress of the installer, on the console and at the server.

use std::fmt::Display;

use fleet::netboot::{Step, printable};

use super::server::Server;

/// Prints and reports the progress of a download, once for each tenth.
pub(super) struct ProgressPrinter {
    bytes: u64,
    of: u64,
}

impl ProgressPrinter {
    pub(super) fn new(of: u64) -> Self {
        Self { bytes: 0, of: of.max(1) }
    }

    pub(super) fn advance(&mut self, server: &Server, bytes: u64) {
        let before = self.bytes * 10 / self.of;
        self.bytes += bytes;
        let now = self.bytes * 10 / self.of;
        if now > before {
            tell(format!("{} % of {} MB", now * 10, self.of / 1_000_000));
            server.try_report(Step::Writing { bytes: self.bytes, of: self.of });
        }
    }
}

/// Prints a line on the console.
#[expect(clippy::print_stdout, reason = "the installer's standard output is the machine's console")]
pub fn tell(what: impl Display) {
    println!("bakehouse: {}", printable(&what.to_string()));
}
