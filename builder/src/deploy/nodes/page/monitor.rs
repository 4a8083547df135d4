//! Requests to the page of a monitor. A hub on the way may die at any time, so each step has a short limit, and the next
//! attempt takes another hub.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::{Instant, Sleep, sleep, timeout};

use super::PAGE_PATH;
use crate::deploy::nodes::client::Client;
use crate::deploy::nodes::forward::Body;
use crate::error::{Error, Result};

/// Head start of an attempt to connect over the next one, which takes another hub.
const HEAD_START: Duration = Duration::from_millis(400);
/// Number of attempts at the same time.
const ATTEMPTS: usize = 3;
/// Time limit of all attempts.
const CONNECT: Duration = Duration::from_secs(8);
/// Time until the monitor replies over an open connection, and over a new one.
const REPLY: Duration = Duration::from_secs(2);
const FIRST_REPLY: Duration = Duration::from_secs(8);
/// Longest time between two bytes of the events. The page sends one each second.
const SILENCE: Duration = Duration::from_millis(2500);

/// Connection to the page, of one connection of a browser.
pub(super) type Upstream = SendRequest<Empty<Bytes>>;

/// The page of a monitor.
pub(super) struct Monitor {
    client: Client,
    node: String,
}

impl Monitor {
    pub(super) fn new(client: &Client, node: &str) -> Self {
        Self { client: client.clone(), node: node.to_owned() }
    }

    /// Sends a request over the connection in `upstream`, or over a new one. Requests change nothing, so they may arrive
    /// twice.
    ///
    /// # Errors
    /// If no hub reaches the monitor, or the page does not answer.
    pub(super) async fn ask(
        &self,
        upstream: &Mutex<Option<Upstream>>,
        request: &Request<()>,
    ) -> Result<Response<Body>> {
        let mut kept = upstream.lock().await;
        if let Some(mut open) = kept.take()
            && let Ok(Ok(reply)) = timeout(REPLY, send(&mut open, request)).await
        {
            *kept = Some(open);
            return Ok(reply.map(BodyExt::boxed));
        }
        let mut open = timeout(CONNECT, self.connect()).await.map_err(|_| self.silent())??;
        let reply = timeout(FIRST_REPLY, send(&mut open, request)).await.map_err(|_| self.silent())?;
        let reply = reply.map_err(Error::cannot(format!("reach the page of {}", self.node)))?;
        *kept = Some(open);
        Ok(reply.map(BodyExt::boxed))
    }

    fn silent(&self) -> Error {
        Error::Failed(format!("the page of {} does not answer", self.node))
    }

    /// Connects through a hub. While it does not answer, connects through the next ones, too.
    async fn connect(&self) -> Result<Upstream> {
        let mut attempts = JoinSet::new();
        let mut started = 0;
        let mut failure = None;
        loop {
            if started < ATTEMPTS {
                let (client, node) = (self.client.clone(), self.node.clone());
                attempts.spawn(async move {
                    let stream = client.stream(&node, PAGE_PATH).await?;
                    let opened = handshake(TokioIo::new(stream)).await;
                    opened.map_err(Error::cannot(format!("reach the page of {node}")))
                });
                started += 1;
            }
            let pause = if started < ATTEMPTS { HEAD_START } else { CONNECT };
            tokio::select! {
                Some(done) = attempts.join_next() => match done {
                    Ok(Ok((sender, connection))) => {
                        // The next request reports the end of the connection.
                        tokio::spawn(async move { drop(connection.await) });
                        return Ok(sender);
                    }
                    Ok(Err(e)) => {
                        if attempts.is_empty() && started == ATTEMPTS {
                            return Err(e);
                        }
                        failure = Some(e);
                    }
                    Err(_) => {}
                },
                () = sleep(pause) => {}
            }
            if attempts.is_empty() && started == ATTEMPTS {
                return Err(failure.unwrap_or_else(|| self.silent()));
            }
        }
    }
}

async fn send(open: &mut Upstream, request: &Request<()>) -> hyper::Result<Response<Incoming>> {
    open.ready().await?;
    let mut own = Request::new(Empty::new());
    *own.uri_mut() = request.uri().clone();
    *own.headers_mut() = request.headers().clone();
    open.send_request(own).await
}

/// Returns a body that ends when no byte arrives for 2.5 s. The browser then connects again.
pub(super) fn with_silence_limit(body: Body) -> Body {
    UntilSilent { body, limit: Box::pin(sleep(SILENCE)) }.boxed()
}

struct UntilSilent {
    body: Body,
    limit: Pin<Box<Sleep>>,
}

impl HttpBody for UntilSilent {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match Pin::new(&mut self.body).poll_frame(cx) {
            Poll::Ready(frame) => {
                self.limit.as_mut().reset(Instant::now() + SILENCE);
                Poll::Ready(frame)
            }
            Poll::Pending => self.limit.as_mut().poll(cx).map(|()| None),
        }
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}
