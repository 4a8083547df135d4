//! Parts of the agent's HTTPS servers: their threads, sockets, byte limits, and streams of bytes to other servers.

pub(crate) mod copy;
pub(crate) mod metered;

use std::net::SocketAddr;
use std::thread::JoinHandle;

use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::oneshot;
use tracing::warn;

use crate::error::{Error, Result};

/// Runs a server on a thread with a runtime of its own, until the process ends or the returned future is dropped.
/// `nice`: increment of the thread's nice value.
///
/// # Errors
/// If the thread cannot be started, or the server fails.
pub(crate) async fn on_thread<F>(
    name: &'static str,
    nice: i32,
    serve: impl FnOnce() -> F + Send + 'static,
) -> Result<()>
where
    F: Future<Output = Result<()>>,
{
    let (stop, stopped) = oneshot::channel::<()>();
    let (done, ended) = oneshot::channel();
    let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        // Without the lower priority the server still works.
        if let Err(e) = rustix::process::nice(nice) {
            warn!("cannot lower the priority of the thread {name}: {e}");
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let served = match runtime.map_err(Error::io("start", format!("the runtime of {name}"))) {
            Ok(runtime) => runtime.block_on(async {
                tokio::select! {
                    served = serve() => served,
                    _ = stopped => Ok(()),
                }
            }),
            Err(e) => Err(e),
        };
        // There is no receiver if the process is ending.
        let _ = done.send(served);
    });
    let thread = thread.map_err(Error::io("start", format!("the thread {name}")))?;
    let _server = Server { stop: Some(stop), thread: Some(thread) };
    ended.await.unwrap_or_else(|_| Err(Error::Failed(format!("the thread {name} has panicked"))))
}

/// A server's thread. Dropping it ends the thread and frees the port.
struct Server {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // The panic handler has printed a panic of the thread.
            let _ = thread.join();
        }
    }
}

/// Opens a listening socket. The kernel queues up to `backlog` connections until the server accepts them.
pub(crate) fn listen(at: SocketAddr, backlog: u32) -> std::io::Result<TcpListener> {
    let socket = if at.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // A server that restarts can bind to its port while old connections are in TIME_WAIT.
    socket.set_reuseaddr(true)?;
    socket.bind(at)?;
    socket.listen(backlog)
}
