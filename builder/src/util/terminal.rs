//! The terminal of standard output.

/// Returns the number of columns of the terminal; `None` if standard output is not a terminal.
pub(crate) fn columns() -> Option<usize> {
    let size = rustix::termios::tcgetwinsize(std::io::stdout()).ok()?;
    // A terminal of unknown size reports 0.
    Some(usize::from(size.ws_col)).filter(|columns| *columns > 0)
}
