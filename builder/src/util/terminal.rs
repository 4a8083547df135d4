//! The terminal of standard output.

/// Returns the number of columns and of lines of the terminal; `None` if standard output is not a terminal.
pub(crate) fn size() -> Option<(usize, usize)> {
    let size = rustix::termios::tcgetwinsize(std::io::stdout()).ok()?;
    // A terminal of unknown size reports 0.
    Some((usize::from(size.ws_col), usize::from(size.ws_row))).filter(|(columns, lines)| *columns > 0 && *lines > 0)
}

/// Returns the number of columns of the terminal; `None` if standard output is not a terminal.
pub(crate) fn columns() -> Option<usize> {
    size().map(|(columns, _)| columns)
}

/// Returns a text of a node without characters that control the terminal. Further lines are indented, so that they do not
/// look like lines of another node.
pub(crate) fn visible(text: &str) -> String {
    fleet::printable(text.trim_end_matches('\n')).replace('\n', "\n    ")
}
