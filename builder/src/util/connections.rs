//! Limits the connections of a server: their number, in total and for each address, and the time of slow clients.

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

/// Limits of a server.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Maximum number of connections. Further connections wait.
    pub connections: usize,
    /// Maximum number of connections from one address. The server closes further ones.
    pub per_address: usize,
    /// Maximum time for receiving a request, and for one pause of a client that receives a response.
    pub timeout: Duration,
    /// Minimum average rate at which a client must receive a response, in bytes per second.
    pub rate: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { connections: 256, per_address: 64, timeout: Duration::from_secs(30), rate: 32 << 10 }
    }
}

/// Pause after a failed accept, for example without free file descriptors or memory.
const PAUSE: Duration = Duration::from_millis(100);

/// Accepts connections within the limits.
pub(super) struct Acceptor {
    listener: TcpListener,
    limits: Limits,
    room: Arc<Semaphore>,
    by_address: Arc<Mutex<HashMap<IpAddr, usize>>>,
}

/// A connection that counts towards the limits until it is dropped.
pub(super) struct AdmittedConnection {
    address: IpAddr,
    by_address: Arc<Mutex<HashMap<IpAddr, usize>>>,
    _permit: OwnedSemaphorePermit,
}

impl Acceptor {
    /// Accepts connections of `listener`.
    pub(super) fn new(listener: TcpListener, limits: Limits) -> Self {
        Self { listener, limits, room: Arc::new(Semaphore::new(limits.connections)), by_address: Arc::default() }
    }

    /// Accepts the next connection. Errors of a single connection, and a lack of file descriptors, do not end the
    /// server.
    pub(super) async fn accept(&self) -> (Stream, AdmittedConnection) {
        loop {
            // `acquire_owned` fails only for a closed semaphore, and this one is never closed.
            let Ok(permit) = self.room.clone().acquire_owned().await else { continue };
            match self.listener.accept().await {
                Ok((stream, from)) => {
                    if let Some(admitted) = self.admit(from.ip().to_canonical(), permit) {
                        return (Stream::new(stream, self.limits), admitted);
                    }
                }
                Err(e) if is_of_one_connection(&e) => {}
                Err(_) => sleep(PAUSE).await,
            }
        }
    }

    /// Counts a connection; returns `None` if its address has too many.
    fn admit(&self, address: IpAddr, permit: OwnedSemaphorePermit) -> Option<AdmittedConnection> {
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

/// Whether an error concerns only the connection to accept, by
/// [accept(2)](https://man7.org/linux/man-pages/man2/accept.2.html).
fn is_of_one_connection(e: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(e.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}

/// A connection that fails if the client receives too slowly. The client may make the server wait for `timeout` at a
/// time. In total, it may make the server wait for `timeout` plus 1 s for each `rate` bytes that it has received.
pub(super) struct Stream {
    stream: TcpStream,
    limits: Limits,
    written: u64,
    /// Total time that the server has waited, without the current wait, which began at `since`.
    waited: Duration,
    since: Option<Instant>,
    timer: Option<Pin<Box<Sleep>>>,
}

impl Stream {
    fn new(stream: TcpStream, limits: Limits) -> Self {
        Self { stream, limits, written: 0, waited: Duration::ZERO, since: None, timer: None }
    }

    /// Counts the bytes that the client has received, and the time that the server has waited.
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
                // Bytes in the kernel's buffers count as received, and may be megabytes. One pause is therefore
                // limited, too.
                let earned = Duration::from_secs_f64(self.written as f64 / self.limits.rate.max(1) as f64);
                let left = (self.limits.timeout + earned).saturating_sub(self.waited).min(self.limits.timeout);
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
