//! Parser of the [Journal Export Format], as systemd-journal-gatewayd sends it. Its JSON leaves out long fields.
//!
//! [Journal Export Format]: https://systemd.io/JOURNAL_EXPORT_FORMATS/

use bytes::{Buf as _, BytesMut};
use fleet::node_api::JournalLine;

/// Longest text of a line, in bytes. The parser cuts a longer one.
const LONGEST: usize = 16 << 10;
/// End of a text that was cut.
const CUT: &str = "… [cut]";
/// Longest name of a field, in bytes, as journald permits it.
const LONGEST_NAME: usize = 64;

/// Parses a stream of entries. It keeps only the fields of a [`JournalLine`], so its memory is limited, however long
/// other fields are.
#[derive(Default)]
pub(super) struct Parser {
    buffer: BytesMut,
    entry: Entry,
    state: State,
}

#[derive(Default)]
enum State {
    /// At the begin of a line.
    #[default]
    Name,
    /// In the value of a field of text, up to the line break.
    Text(Value),
    /// Before the length of a binary value.
    Length(Value),
    /// In a binary value. The number of bytes to come.
    Binary(Value, u64),
    /// Before the line break after a binary value.
    End,
}

/// A field whose value arrives.
struct Value {
    field: Option<Field>,
    bytes: Vec<u8>,
    is_cut: bool,
}

#[derive(Clone, Copy)]
enum Field {
    Cursor,
    At,
    Unit,
    Identifier,
    Priority,
    Message,
}

#[derive(Default)]
struct Entry {
    line: JournalLine,
    identifier: String,
    has_fields: bool,
}

impl Value {
    fn of(name: &[u8]) -> Self {
        let field = match name {
            b"__CURSOR" => Some(Field::Cursor),
            b"__REALTIME_TIMESTAMP" => Some(Field::At),
            b"_SYSTEMD_UNIT" => Some(Field::Unit),
            b"SYSLOG_IDENTIFIER" => Some(Field::Identifier),
            b"PRIORITY" => Some(Field::Priority),
            b"MESSAGE" => Some(Field::Message),
            _ => None,
        };
        Self { field, bytes: Vec::new(), is_cut: false }
    }

    fn push(&mut self, bytes: &[u8]) {
        if self.field.is_none() {
            return;
        }
        let free = LONGEST - self.bytes.len();
        self.is_cut |= bytes.len() > free;
        self.bytes.extend_from_slice(&bytes[..bytes.len().min(free)]);
    }
}

impl Entry {
    fn set(&mut self, value: &Value) {
        self.has_fields = true;
        let Some(field) = value.field else { return };
        let mut text = String::from_utf8_lossy(&value.bytes).into_owned();
        match field {
            Field::Cursor => self.line.cursor = text,
            Field::At => self.line.at = text.parse().unwrap_or_default(),
            Field::Unit => self.line.unit = text,
            Field::Identifier => self.identifier = text,
            Field::Priority => self.line.priority = text.parse().unwrap_or_default(),
            Field::Message => {
                if value.is_cut {
                    text.push_str(CUT);
                }
                self.line.message = text;
            }
        }
    }

    fn take(&mut self) -> Option<JournalLine> {
        let entry = std::mem::take(self);
        let mut line = entry.line;
        if line.unit.is_empty() {
            line.unit = entry.identifier;
        }
        entry.has_fields.then_some(line)
    }
}

impl Parser {
    /// Adds bytes of the stream.
    pub(super) fn feed(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Returns the next complete entry; `None` if more bytes are needed.
    ///
    /// # Errors
    /// If the stream does not have the format.
    pub(super) fn next(&mut self) -> Result<Option<JournalLine>, &'static str> {
        loop {
            match std::mem::take(&mut self.state) {
                State::Name => match self.buffer.iter().position(|b| matches!(b, b'\n' | b'=')) {
                    Some(0) if self.buffer[0] == b'\n' => {
                        self.buffer.advance(1);
                        if let Some(line) = self.entry.take() {
                            return Ok(Some(line));
                        }
                    }
                    Some(end) if end <= LONGEST_NAME => {
                        let is_text = self.buffer[end] == b'=';
                        let value = Value::of(&self.buffer[..end]);
                        self.buffer.advance(end + 1);
                        self.state = if is_text { State::Text(value) } else { State::Length(value) };
                    }
                    None if self.buffer.len() <= LONGEST_NAME => return Ok(None),
                    _ => return Err("the name of a field is too long"),
                },
                State::Text(mut value) => {
                    let end = self.buffer.iter().position(|b| *b == b'\n');
                    value.push(&self.buffer[..end.unwrap_or(self.buffer.len())]);
                    let Some(end) = end else {
                        self.buffer.clear();
                        self.state = State::Text(value);
                        return Ok(None);
                    };
                    self.buffer.advance(end + 1);
                    self.entry.set(&value);
                }
                State::Length(value) if self.buffer.len() < 8 => {
                    self.state = State::Length(value);
                    return Ok(None);
                }
                State::Length(value) => self.state = State::Binary(value, self.buffer.get_u64_le()),
                State::Binary(mut value, left) => {
                    let count = usize::try_from(left).unwrap_or(usize::MAX).min(self.buffer.len());
                    value.push(&self.buffer[..count]);
                    self.buffer.advance(count);
                    let left = left - count as u64;
                    if left > 0 {
                        self.state = State::Binary(value, left);
                        return Ok(None);
                    }
                    self.entry.set(&value);
                    self.state = State::End;
                }
                State::End => match self.buffer.first() {
                    None => {
                        self.state = State::End;
                        return Ok(None);
                    }
                    Some(b'\n') => self.buffer.advance(1),
                    Some(_) => return Err("a binary value has another length"),
                },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(stream: &[u8], step: usize) -> Result<Vec<JournalLine>, &'static str> {
        let (mut parser, mut lines) = (Parser::default(), Vec::new());
        for part in stream.chunks(step.max(1)) {
            parser.feed(part);
            while let Some(line) = parser.next()? {
                lines.push(line);
            }
        }
        Ok(lines)
    }

    fn binary(name: &str, value: &[u8]) -> Vec<u8> {
        [name.as_bytes(), b"\n", &(value.len() as u64).to_le_bytes(), value, b"\n"].concat()
    }

    /// Two entries as systemd-journal-gatewayd sends them: a message of text, and one with a line break and a byte that
    /// is not UTF-8.
    fn two_entries() -> Vec<u8> {
        let first = b"__CURSOR=s=d8cf12ba;i=4;b=abab;m=f4df8;t=62810391c2ec0;x=e21d\n\
                      __REALTIME_TIMESTAMP=1732900003000000\n__MONOTONIC_TIMESTAMP=1003000\nPRIORITY=3\n\
                      SYSLOG_IDENTIFIER=patroni\n_SYSTEMD_UNIT=patroni.service\nMESSAGE=a=b\n\n";
        let second = [b"__CURSOR=s=d8cf12ba;i=5\nSYSLOG_IDENTIFIER=kernel\nPRIORITY=6\n".to_vec()];
        let core = binary("COREDUMP", &vec![b'\n'; 100_000]);
        let message = binary("MESSAGE", b"two\nlines \xff");
        [first.to_vec(), second.concat(), core, message, b"\n".to_vec()].concat()
    }

    #[test]
    fn reads_text_and_binary_fields_in_any_pieces() {
        let stream = two_entries();
        let lines = parse(&stream, stream.len()).unwrap();
        let first = &lines[0];
        assert_eq!(first.cursor, "s=d8cf12ba;i=4;b=abab;m=f4df8;t=62810391c2ec0;x=e21d");
        assert_eq!((first.at, first.unit.as_str()), (1_732_900_003_000_000, "patroni.service"));
        assert_eq!((first.priority, first.message.as_str()), (3, "a=b"));
        let second = &lines[1];
        assert_eq!((second.unit.as_str(), second.message.as_str()), ("kernel", "two\nlines \u{fffd}"));
        for step in [1, 2, 7, 4096] {
            assert_eq!(parse(&stream, step).unwrap(), lines, "{step}");
        }
    }

    #[test]
    fn long_messages_are_cut() {
        for message in
            [binary("MESSAGE", &vec![b'x'; 1 << 20]), [b"MESSAGE=", &vec![b'x'; 1 << 20][..], b"\n"].concat()]
        {
            let lines = parse(&[message, b"\n".to_vec()].concat(), 4096).unwrap();
            assert_eq!(lines[0].message.len(), LONGEST + CUT.len());
            assert!(lines[0].message.ends_with("x… [cut]"));
        }
    }

    #[test]
    fn rejects_other_formats() {
        assert!(parse(&[b'x'; 100], 100).is_err());
        assert!(parse(&[b"MESSAGE\n", &1_u64.to_le_bytes()[..], b"xx"].concat(), 100).is_err());
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_streams_do_not_panic(stream: Vec<u8>, step in 1..64usize) {
            let _ = parse(&stream, step);
        }

        #[test]
        fn values_round_trip(message: Vec<u8>, step in 1..64usize) {
            let stream = [binary("MESSAGE", &message), b"\n".to_vec()].concat();
            let lines = parse(&stream, step).unwrap();
            proptest::prop_assert_eq!(&lines[0].message, &String::from_utf8_lossy(&message));
        }
    }
}
