//! Connections of a server: how many there may be, of one address and of all, and how slowly clients may read.

use std::collections::HashMap;
use std::future::Future as _;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Sleep, sleep};

/// What one host, and all of them, may take of the server.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections that are served at the same time; more wait.
    pub connections: usize,
    /// Of one address; more are closed.
    pub per_address: usize,
    /// A request comes within this time, and a machine reads something within this time.
    pub patience: Duration,
    /// Bytes in a second that a machine has to read on average while the server waits for it.
    pub rate: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { connections: 256, per_address: 64, patience: Duration::from_secs(30), rate: 32 << 10 }
    }
}

/// How long the server waits when it can't accept: file descriptors or memory may be free again then.
const PAUSE: Duration = Duration::from_millis(100);

/// Accepts connections within the limits.
pub struct Acceptor {
    listener: TcpListener,
    limits: Limits,
    room: Arc<Semaphore>,
    by_address: Arc<Mutex<HashMap<IpAddr, usize>>>,
}

/// The place that a connection takes, until it is dropped.
pub struct AdmittedConnection {
    address: IpAddr,
    by_address: Arc<Mutex<HashMap<IpAddr, usize>>>,
    _permit: OwnedSemaphorePermit,
}

impl Acceptor {
    pub fn new(listener: TcpListener, limits: Limits) -> Self {
        Self { listener, limits, room: Arc::new(Semaphore::new(limits.connections)), by_address: Arc::default() }
    }

    /// The next connection, and its place. Errors of a single connection, and a lack of file descriptors, don't end
    /// the server.
    pub async fn accept(&self) -> (Stream, AdmittedConnection) {
        loop {
            // It is never closed.
            let Ok(permit) = self.room.clone().acquire_owned().await else { continue };
            match self.listener.accept().await {
                Ok((stream, from)) => {
                    if let Some(place) = self.place(from.ip().to_canonical(), permit) {
                        return (Stream::new(stream, self.limits), place);
                    }
                }
                Err(e) if is_of_one_connection(&e) => {}
                Err(_) => sleep(PAUSE).await,
            }
        }
    }

    /// None where the address has as many as it may have: the connection is closed.
    fn place(&self, address: IpAddr, permit: OwnedSemaphorePermit) -> Option<AdmittedConnection> {
        let mut counts = self.by_address.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(address).or_default();
        if *count >= self.limits.per_address {
            return None;
        }
        *count += 1;
        Some(AdmittedConnection { address, by_address: self.by_address.clone(), _permit: permit })
    }
}

impl Drop for AdmittedConnection {
    fn drop(&mut self) {
        let mut counts = self.by_address.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.address);
            }
        }
    }
}

/// accept(2): these are of the connection that would have been accepted.
fn is_of_one_connection(e: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(e.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}

/// A connection whose other end has to read: it may keep the server waiting for `patience` at a time; and in all for
/// `patience`, and a second more for each `rate` bytes that it has taken.
pub struct Stream {
    stream: TcpStream,
    limits: Limits,
    written: u64,
    /// How long it kept the server waiting, before the wait that `since` began.
    waited: Duration,
    since: Option<Instant>,
    timer: Option<Pin<Box<Sleep>>>,
}

impl Stream {
    fn new(stream: TcpStream, limits: Limits) -> Self {
        Self { stream, limits, written: 0, waited: Duration::ZERO, since: None, timer: None }
    }

    /// Counts what the other end read, and how long it took for that.
    fn watch(&mut self, context: &mut Context, poll: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        match poll {
            Poll::Ready(Ok(bytes)) => {
                self.waited += self.since.take().map_or(Duration::ZERO, |since| since.elapsed());
                self.timer = None;
                self.written += bytes as u64;
                poll
            }
            Poll::Ready(Err(_)) => poll,
            Poll::Pending => {
                self.since.get_or_insert_with(Instant::now);
                // What is in the kernel's buffers counts as read: so this alone would bear megabytes of it.
                let earned = Duration::from_secs_f64(self.written as f64 / self.limits.rate.max(1) as f64);
                let left = (self.limits.patience + earned).saturating_sub(self.waited).min(self.limits.patience);
                let timer = self.timer.get_or_insert_with(|| Box::pin(sleep(left)));
                match timer.as_mut().poll(context) {
                    Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
                    Poll::Pending => Poll::Pending,
                }
            }
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context, buf: &mut ReadBuf) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buf)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context, buf: &[u8]) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.stream).poll_write(context, buf);
        self.watch(context, poll)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context,
        bufs: &[io::IoSlice],
    ) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.stream).poll_write_vectored(context, bufs);
        self.watch(context, poll)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
