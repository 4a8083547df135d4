//! A byte stream with a limit on the bytes that it delivers.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Fails a read when the stream has delivered more bytes than its budget. TLS and HTTP buffer incomplete input; the
/// budget limits that memory before their own limits apply.
pub(crate) struct Metered<S> {
    inner: S,
    budget: usize,
}

impl<S> Metered<S> {
    pub(crate) fn new(inner: S, budget: usize) -> Self {
        Self { inner, budget }
    }

    pub(crate) fn get_ref(&self) -> &S {
        &self.inner
    }

    /// Sets the remaining budget, bytes.
    pub(crate) fn set_budget(&mut self, budget: usize) {
        self.budget = budget;
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Metered<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.inner).poll_read(cx, buf))?;
        let Some(left) = self.budget.checked_sub(buf.filled().len() - before) else {
            return Poll::Ready(Err(io::Error::other("the client exceeded the byte limit of a connection")));
        };
        self.budget = left;
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Metered<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt as _;

    #[tokio::test]
    async fn fails_reads_beyond_the_budget() {
        let mut stream = Metered::new(&[7_u8; 64][..], 16);
        let mut bytes = [0; 16];
        stream.read_exact(&mut bytes).await.unwrap();
        assert!(stream.read(&mut bytes).await.is_err());
        let mut stream = Metered::new(&[7_u8; 64][..], 16);
        stream.set_budget(64);
        assert_eq!(stream.read_to_end(&mut Vec::new()).await.unwrap(), 64);
    }
}
