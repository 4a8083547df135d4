//! Replies of the node API.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use fleet::node_api::NodeApiError;
use fleet::one_line;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Body as HttpBody, Frame};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};
use serde::Serialize;
use tokio::sync::mpsc;

/// Body of a reply: JSON, or lines that arrive over time.
pub(super) type Body = UnsyncBoxBody<Bytes, io::Error>;

/// Result of a request.
pub(super) type Answer = Result<Response<Body>, Refusal>;

/// A refused or failed request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) status: StatusCode,
    pub(super) error: NodeApiError,
}

impl Refusal {
    /// Makes a refusal. Other machines and programs may have written parts of its text, so the text has no characters
    /// that control a terminal.
    pub(super) fn new(status: StatusCode, message: impl AsRef<str>) -> Self {
        Self { status, error: NodeApiError { message: one_line(message.as_ref()), help: None } }
    }

    /// Adds the fix.
    pub(super) fn help(mut self, help: impl AsRef<str>) -> Self {
        self.error.help = Some(one_line(help.as_ref()));
        self
    }

    /// Returns the reason.
    pub(super) fn text(&self) -> &str {
        &self.error.message
    }

    pub(super) fn response(&self) -> Response<Body> {
        json(self.status, &self.error)
    }
}

/// Returns a reply with a value.
pub(super) fn json(status: StatusCode, value: &impl Serialize) -> Response<Body> {
    let text = serde_json::to_vec(value).unwrap_or_default();
    with_body(status, "application/json", Full::new(Bytes::from(text)).map_err(|never| match never {}).boxed_unsync())
}

/// Returns a reply without a body, which opens a stream of bytes.
pub(super) fn upgrade() -> Response<Body> {
    Response::new(Full::default().map_err(|never| match never {}).boxed_unsync())
}

/// Sender of the lines of a reply. Sending waits while the client does not read. An error breaks the reply off, so that
/// the client does not take it for complete. The sender is closed when the client disconnects.
pub(super) type LineSender = mpsc::Sender<io::Result<Bytes>>;

/// Returns a reply with lines, and the sender of its lines.
pub(super) fn lines() -> (LineSender, Response<Body>) {
    let (sender, receiver) = mpsc::channel(16);
    let body = LineBody(receiver).boxed_unsync();
    (sender, with_body(StatusCode::OK, "application/x-ndjson", body))
}

/// Returns a value as one line of a reply.
pub(super) fn line(value: &impl Serialize) -> Bytes {
    let mut text = serde_json::to_vec(value).unwrap_or_default();
    text.push(b'\n');
    text.into()
}

fn with_body(status: StatusCode, kind: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

struct LineBody(mpsc::Receiver<io::Result<Bytes>>);

impl HttpBody for LineBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        self.0.poll_recv(cx).map(|part| part.map(|bytes| bytes.map(Frame::data)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_a_refusal_do_not_control_a_terminal() {
        let refusal = Refusal::new(StatusCode::CONFLICT, "a\u{1b}]52;c;x\u{7}\nb").help("c\r\u{9b}2J");
        assert_eq!(refusal.text(), "a\u{fffd}]52;c;x\u{fffd} b");
        assert_eq!(refusal.error.help.as_deref(), Some("c\u{fffd}\u{fffd}2J"));
    }
}
