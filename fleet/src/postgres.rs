//! Messages of PostgreSQL's [frontend/backend protocol] 3, as far as the agent and an operator's machine use them.
//!
//! [frontend/backend protocol]: https://www.postgresql.org/docs/17/protocol.html

/// Version 3.0 in a start-up message.
pub const PROTOCOL_3: u32 = 3 << 16;
/// Codes in the place of the version.
pub const CANCEL_REQUEST: u32 = 80_877_102;
/// Request for TLS.
pub const SSL_REQUEST: u32 = 80_877_103;
/// Request for GSSAPI encryption.
pub const GSSENC_REQUEST: u32 = 80_877_104;
/// Longest start-up packet, in bytes, as in PostgreSQL.
pub const LONGEST_STARTUP: usize = 10_000;

/// Kinds of the backend's messages.
pub mod kind {
    /// Request for authentication, or its success.
    pub const AUTHENTICATION: u8 = b'R';
    /// Key for a cancel request.
    pub const BACKEND_KEY: u8 = b'K';
    /// The backend waits for the next query.
    pub const READY: u8 = b'Z';
    /// Error.
    pub const ERROR: u8 = b'E';
    /// Notice or warning.
    pub const NOTICE: u8 = b'N';
    /// Columns of the rows that follow.
    pub const COLUMNS: u8 = b'T';
    /// Row.
    pub const ROW: u8 = b'D';
    /// End of a statement, with its tag.
    pub const COMPLETE: u8 = b'C';
    /// `COPY ... FROM STDIN` waits for data.
    pub const COPY_IN: u8 = b'G';
    /// `COPY ... TO STDOUT` begins.
    pub const COPY_OUT: u8 = b'H';
    /// Data of `COPY ... TO STDOUT`.
    pub const COPY_DATA: u8 = b'd';
}

/// Returns a packet with a code in the place of a type: a start-up message or a request.
fn packet(code: u32, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len() + 8).unwrap_or(u32::MAX);
    [&length.to_be_bytes()[..], &code.to_be_bytes(), body].concat()
}

/// Returns a start-up message. No name and no value may have a zero byte.
#[must_use]
pub fn startup(version: u32, parameters: &[(String, String)]) -> Vec<u8> {
    let words = parameters.iter().flat_map(|(name, value)| [name, value]);
    let mut body: Vec<u8> = words.flat_map(|word| word.bytes().chain([0])).collect();
    body.push(0);
    packet(version, &body)
}

/// Returns the parameters in the body of a start-up message, after its version; `None` if the body is malformed.
#[must_use]
pub fn parameters(body: &[u8]) -> Option<Vec<(String, String)>> {
    let mut words = body.strip_suffix(&[0])?.split(|byte| *byte == 0);
    let mut found = Vec::new();
    let mut word = || words.next().map(|word| String::from_utf8(word.to_vec()));
    loop {
        match word() {
            // The last value has a zero byte of its own.
            None => return Some(found),
            Some(name) => {
                let name = name.ok()?;
                match word() {
                    None if name.is_empty() => return Some(found),
                    value => found.push((name, value?.ok()?)),
                }
            }
        }
    }
}

/// Returns a request to cancel what a backend runs. `key` is the body of its message [`kind::BACKEND_KEY`].
#[must_use]
pub fn cancel(key: &[u8]) -> Vec<u8> {
    packet(CANCEL_REQUEST, key)
}

fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len() + 4).unwrap_or(u32::MAX);
    [&[kind][..], &length.to_be_bytes(), body].concat()
}

/// Returns a query of one or more statements. The text may have no zero byte.
#[must_use]
pub fn query(sql: &str) -> Vec<u8> {
    message(b'Q', &[sql.as_bytes(), &[0]].concat())
}

/// Returns the reply to [`kind::COPY_IN`] that ends the statement with an error.
#[must_use]
pub fn copy_fail(why: &str) -> Vec<u8> {
    message(b'f', &[why.as_bytes(), &[0]].concat())
}

/// Returns a backend's message that ends a session before its begin: SQLSTATE 08006, and a text.
#[must_use]
pub fn fatal(text: &str) -> Vec<u8> {
    let text = text.replace('\0', "");
    message(kind::ERROR, format!("SFATAL\0VFATAL\0C08006\0M{text}\0\0").as_bytes())
}

/// A message of the backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Type, one of [`kind`] or another one.
    pub kind: u8,
    /// Content after the length.
    pub body: Vec<u8>,
}

/// Splits the bytes of a backend into messages.
#[derive(Debug)]
pub struct Messages {
    buffer: Vec<u8>,
    longest: usize,
}

impl Messages {
    /// Makes a splitter of messages with up to `longest` bytes.
    #[must_use]
    pub fn new(longest: usize) -> Self {
        Self { buffer: Vec::new(), longest }
    }

    /// Adds bytes.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.buffer.extend(bytes);
    }

    /// Returns the next complete messages.
    ///
    /// # Errors
    /// If a message is longer than permitted, or its length is invalid.
    pub fn take(&mut self) -> Result<Vec<Message>, String> {
        let (mut found, mut at) = (Vec::new(), 0);
        while let Some((head, rest)) = self.buffer[at..].split_at_checked(5) {
            let length = body_length(head)?;
            if length > self.longest {
                return Err(format!("a message of {length} bytes is longer than {} bytes", self.longest));
            }
            let Some(body) = rest.get(..length) else { break };
            found.push(Message { kind: head[0], body: body.to_vec() });
            at += 5 + length;
        }
        self.buffer.drain(..at);
        Ok(found)
    }
}

/// Returns the length of the content of a message with this head: type and length.
fn body_length(head: &[u8]) -> Result<usize, String> {
    let length = head[1..].iter().fold(0_u32, |sum, byte| (sum << 8) | u32::from(*byte));
    let length = length.checked_sub(4).and_then(|length| usize::try_from(length).ok());
    length.filter(|length| i32::try_from(*length).is_ok()).ok_or_else(|| "a message has an invalid length".to_owned())
}

/// Finds the types of a backend's messages, without keeping their content.
#[derive(Debug, Default)]
pub struct Frames {
    head: Vec<u8>,
    /// Bytes that the current message lacks.
    missing: usize,
}

impl Frames {
    /// Returns the types of the messages that end in these bytes.
    ///
    /// # Errors
    /// If the length of a message is invalid.
    pub fn ended(&mut self, mut bytes: &[u8]) -> Result<Vec<u8>, String> {
        let mut kinds = Vec::new();
        while !bytes.is_empty() {
            let is_head = self.head.len() < 5;
            let wanted = if is_head { 5 - self.head.len() } else { self.missing };
            let (part, rest) = bytes.split_at(wanted.min(bytes.len()));
            bytes = rest;
            if is_head {
                self.head.extend(part);
                if self.head.len() < 5 {
                    break;
                }
                self.missing = body_length(&self.head)?;
            } else {
                self.missing -= part.len();
            }
            if self.missing == 0 {
                kinds.push(self.head[0]);
                self.head.clear();
            }
        }
        Ok(kinds)
    }
}

/// A column of a result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column {
    /// Name.
    pub name: String,
    /// Number of its type in `pg_type`.
    pub type_id: u32,
}

/// Reads the values of a message.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (part, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(part)
    }

    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes(self.bytes(2)?.try_into().ok()?))
    }

    fn i32(&mut self) -> Option<i32> {
        Some(i32::from_be_bytes(self.bytes(4)?.try_into().ok()?))
    }

    /// Reads a text that ends with a zero byte.
    fn text(&mut self) -> Option<String> {
        let end = self.0.iter().position(|byte| *byte == 0)?;
        let text = String::from_utf8_lossy(self.bytes(end)?).into_owned();
        self.bytes(1)?;
        Some(text)
    }
}

/// Returns the columns of a message [`kind::COLUMNS`]; `None` if it is malformed.
#[must_use]
pub fn columns(body: &[u8]) -> Option<Vec<Column>> {
    let mut reader = Reader(body);
    let count = reader.u16()?;
    let mut column = || {
        let name = reader.text()?;
        // The table's number, and the column's in it.
        reader.bytes(6)?;
        let type_id = reader.i32()?.cast_unsigned();
        // The type's size and modifier, and the format.
        reader.bytes(8)?;
        Some(Column { name, type_id })
    };
    (0..count).map(|_| column()).collect()
}

/// Returns the values of a message [`kind::ROW`], `None` for NULL; `None` if the message is malformed.
#[must_use]
pub fn row(body: &[u8]) -> Option<Vec<Option<String>>> {
    let mut reader = Reader(body);
    let count = reader.u16()?;
    let mut value = || match usize::try_from(reader.i32()?) {
        Ok(length) => Some(Some(String::from_utf8_lossy(reader.bytes(length)?).into_owned())),
        Err(_) => Some(None),
    };
    (0..count).map(|_| value()).collect()
}

/// Returns the text at the begin of a message, such as the tag of [`kind::COMPLETE`].
#[must_use]
pub fn text(body: &[u8]) -> String {
    Reader(body).text().unwrap_or_default()
}

/// An error or a notice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// `ERROR`, `FATAL`, `WARNING`, `NOTICE` and others, in English.
    pub severity: String,
    /// Code of five characters, such as `42P01`.
    pub code: String,
    /// What happened.
    pub message: String,
    /// More about it.
    pub detail: Option<String>,
    /// The fix.
    pub hint: Option<String>,
    /// Number of the character in the query, from 1.
    pub position: Option<usize>,
}

/// Returns the content of a message [`kind::ERROR`] or [`kind::NOTICE`]. Unknown fields are ignored.
#[must_use]
pub fn report(body: &[u8]) -> Report {
    let (mut report, mut reader) = (Report::default(), Reader(body));
    while let Some(field) = reader.bytes(1).map(|byte| byte[0]).filter(|byte| *byte != 0) {
        let Some(text) = reader.text() else { break };
        match field {
            // `V` is the severity without a translation.
            b'V' => report.severity = text,
            b'S' if report.severity.is_empty() => report.severity = text,
            b'C' => report.code = text,
            b'M' => report.message = text,
            b'D' => report.detail = Some(text),
            b'H' => report.hint = Some(text),
            b'P' => report.position = text.parse().ok(),
            _ => {}
        }
    }
    report
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pairs(all: &[(&str, &str)]) -> Vec<(String, String)> {
        all.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn parameters_of_a_start_up_message_are_read_back() {
        for all in [&[][..], &[("user", "a")], &[("user", "a"), ("database", ""), ("options", "-c x=1")]] {
            let packet = startup(PROTOCOL_3, &pairs(all));
            assert_eq!(packet[..8], [0, 0, 0, u8::try_from(packet.len()).unwrap(), 0, 3, 0, 0]);
            assert_eq!(parameters(&packet[8..]), Some(pairs(all)));
        }
        for malformed in [&b""[..], b"user", b"user\0", b"\xff\0x\0\0"] {
            assert_eq!(parameters(malformed), None, "{malformed:?}");
        }
    }

    #[test]
    fn columns_rows_and_errors_are_read() {
        let column = [&b"a\0"[..], &[0; 6], &23_u32.to_be_bytes(), &[0; 8]].concat();
        let body = [&[0, 1][..], &column].concat();
        assert_eq!(columns(&body), Some(vec![Column { name: "a".to_owned(), type_id: 23 }]));
        assert_eq!(columns(&body[..body.len() - 1]), None);
        let body = [&[0, 3][..], &[0, 0, 0, 1], b"7", &[255; 4], &[0; 4]].concat();
        assert_eq!(row(&body), Some(vec![Some("7".to_owned()), None, Some(String::new())]));
        assert_eq!(row(&[0, 1, 0, 0, 0, 9, b'7']), None);
        let error = report(b"SFEHLER\0VERROR\0C42P01\0Mno such table\0P15\0Fx.c\0\0");
        assert_eq!((error.severity.as_str(), error.code.as_str(), error.position), ("ERROR", "42P01", Some(15)));
        assert_eq!(report(b"Mcut"), Report::default());
        assert_eq!(text(b"SELECT 1\0"), "SELECT 1");
    }

    #[test]
    fn lengths_of_messages_are_checked() {
        assert!(Frames::default().ended(&[b'Z', 0, 0, 0, 3]).is_err());
        let mut messages = Messages::new(10);
        messages.feed(&[b'D', 0, 0, 0, 15]);
        assert!(messages.take().unwrap_err().contains("11 bytes"));
    }

    proptest! {
        /// A hostile server or client sends any bytes. A count or a length in them must not become an allocation.
        #[test]
        fn any_bytes_are_read_or_refused(bytes: Vec<u8>, longest in 0_usize..64, part in 1_usize..9) {
            let (mut frames, mut messages) = (Frames::default(), Messages::new(longest));
            for chunk in bytes.chunks(part) {
                let Ok(kinds) = frames.ended(chunk) else { break };
                prop_assert!(kinds.len() <= chunk.len());
            }
            for chunk in bytes.chunks(part) {
                messages.feed(chunk);
                let Ok(found) = messages.take() else { break };
                prop_assert!(found.iter().all(|message| message.body.len() <= longest));
            }
            if let Some(all) = parameters(&bytes) {
                prop_assert_eq!(parameters(&startup(PROTOCOL_3, &all)[8..]), Some(all));
            }
            prop_assert!(columns(&bytes).is_none_or(|all| all.len() <= bytes.len()));
            prop_assert!(row(&bytes).is_none_or(|all| all.len() <= bytes.len()));
            // A byte that is not UTF-8 becomes three.
            prop_assert!(text(&bytes).len() <= 3 * bytes.len() && report(&bytes).message.len() <= 3 * bytes.len());
        }

        #[test]
        fn messages_are_found_however_their_bytes_arrive(
            bodies in prop::collection::vec((any::<u8>(), prop::collection::vec(any::<u8>(), 0..20)), 0..8),
            part in 1_usize..9,
        ) {
            let all: Vec<u8> = bodies.iter().flat_map(|(kind, body)| message(*kind, body)).collect();
            let (mut frames, mut kinds) = (Frames::default(), Vec::new());
            let (mut messages, mut found) = (Messages::new(100), Vec::new());
            for bytes in all.chunks(part) {
                kinds.extend(frames.ended(bytes).unwrap());
                messages.feed(bytes);
                found.extend(messages.take().unwrap());
            }
            let expected: Vec<Message> = bodies.into_iter().map(|(kind, body)| Message { kind, body }).collect();
            prop_assert_eq!(kinds, expected.iter().map(|message| message.kind).collect::<Vec<_>>());
            prop_assert_eq!(found, expected);
        }
    }
}
