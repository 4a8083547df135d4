//! Copies bytes between two streams.

use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, split};
use tokio::time::{Instant, sleep_until};

/// Bytes that each direction buffers.
const BUFFER: usize = 16 << 10;

/// Time at which a byte last moved in either direction.
struct LastByte(Mutex<Instant>);

impl LastByte {
    fn at(&self) -> Instant {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn moved(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }
}

/// Copies bytes in both directions until both streams have ended, or neither direction has moved a byte for `idle`.
///
/// # Errors
/// If a stream fails.
pub(crate) async fn copy_both(
    one: impl AsyncRead + AsyncWrite,
    other: impl AsyncRead + AsyncWrite,
    idle: Duration,
) -> io::Result<()> {
    let (mut one_reader, mut one_writer) = split(one);
    let (mut other_reader, mut other_writer) = split(other);
    let last = LastByte(Mutex::new(Instant::now()));
    let idled = async {
        loop {
            let ends = last.at() + idle;
            if ends <= Instant::now() {
                return;
            }
            sleep_until(ends).await;
        }
    };
    tokio::select! {
        copied = async {
            tokio::try_join!(
                copy(&mut one_reader, &mut other_writer, &last),
                copy(&mut other_reader, &mut one_writer, &last),
            )
        } => copied.map(drop),
        () = idled => Err(io::ErrorKind::TimedOut.into()),
    }
}

async fn copy(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    last: &LastByte,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let count = from.read(&mut buffer).await?;
        last.moved();
        if count == 0 {
            return to.shutdown().await;
        }
        to.write_all(&buffer[..count]).await?;
        to.flush().await?;
        last.moved();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::duplex;

    #[tokio::test]
    async fn copies_both_ways_until_both_have_ended() {
        let (mut client, near) = duplex(4);
        let (far, mut server) = duplex(4);
        let copying = tokio::spawn(copy_both(near, far, Duration::from_secs(60)));
        client.write_all(b"ping").await.unwrap();
        let mut bytes = [0; 4];
        server.read_exact(&mut bytes).await.unwrap();
        assert_eq!(&bytes, b"ping");
        // The client has sent all, and still receives.
        client.shutdown().await.unwrap();
        assert_eq!(server.read(&mut bytes).await.unwrap(), 0);
        server.write_all(b"pong").await.unwrap();
        client.read_exact(&mut bytes).await.unwrap();
        assert_eq!(&bytes, b"pong");
        drop(server);
        copying.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn silent_streams_end() {
        let (mut client, near) = duplex(4);
        let (far, _server) = duplex(4);
        let begun = Instant::now();
        let sent = async {
            tokio::time::sleep(Duration::from_millis(200)).await;
            client.write_all(b"x").await.unwrap();
            std::future::pending::<()>().await;
        };
        let copied = tokio::select! {
            copied = copy_both(near, far, Duration::from_millis(300)) => copied,
            () = sent => unreachable!(),
        };
        assert_eq!(copied.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(begun.elapsed() >= Duration::from_millis(500), "{:?}", begun.elapsed());
    }
}
