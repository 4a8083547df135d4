//! Files of the host for a job in a sandbox. The builder opens them and sends the file descriptors.
//!
//! The sandbox's root has another id than the builder, so it cannot open the builder's files by path. With descriptors,
//! the sandbox also needs no access to the host's file systems.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};

/// A file of the host that the builder opens for a job.
#[derive(Debug)]
pub enum HostFile {
    /// Opened for reading.
    Read(PathBuf),
    /// Created or truncated, and opened for writing.
    Create(PathBuf),
}

impl HostFile {
    fn open(&self) -> Result<File> {
        match self {
            Self::Read(path) => File::open(path).map_err(Error::io("read", path)),
            Self::Create(path) => File::create(path).map_err(Error::io("create", path)),
        }
    }
}

/// Sends the job, then each file in order. Stops without an error if the job has ended; the job's own error has the
/// cause.
///
/// # Errors
/// If a file cannot be opened.
pub(super) fn send(mut socket: &UnixStream, job: &[u8], files: &[HostFile]) -> Result<()> {
    let length = (job.len() as u64).to_le_bytes();
    if socket.write_all(&length).and_then(|()| socket.write_all(job)).is_err() {
        return Ok(());
    }
    for file in files {
        let open = file.open()?;
        let fds = [open.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let pushed = control.push(SendAncillaryMessage::ScmRights(&fds));
        let sent = rustix::net::sendmsg(socket, &[IoSlice::new(b"f")], &mut control, SendFlags::NOSIGNAL);
        if !pushed || sent.is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// Receives a job's files, in the order in which the builder lists them.
#[derive(Debug)]
pub struct Files(Mutex<UnixStream>);

impl Files {
    /// Reads the job from standard input, which is a socket. The files follow on the same socket.
    ///
    /// # Errors
    /// If the builder has ended, or the job cannot be parsed.
    pub fn receive<J: DeserializeOwned>() -> io::Result<(J, Self)> {
        let mut socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
        let mut length = [0; 8];
        socket.read_exact(&mut length)?;
        let mut job = Vec::new();
        (&socket).take(u64::from_le_bytes(length)).read_to_end(&mut job)?;
        Ok((serde_json::from_slice(&job)?, Self(Mutex::new(socket))))
    }

    /// Receives the next file. A lock orders the threads of a job.
    ///
    /// # Errors
    /// If the builder could not open the file. The builder's own error has the cause.
    pub fn next(&self) -> io::Result<File> {
        let socket = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        receive_file(&socket)
    }

    /// Receives the next file for the value that `take` returns; `None` if `take` returns `None`. No other thread
    /// receives a file in between.
    ///
    /// # Errors
    /// If the builder could not open the file. The builder's own error has the cause.
    pub fn next_for<T>(&self, take: impl FnOnce() -> Option<T>) -> io::Result<Option<(T, File)>> {
        let socket = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        take().map(|value| Ok((value, receive_file(&socket)?))).transpose()
    }
}

fn receive_file(socket: &UnixStream) -> io::Result<File> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let fd: Option<OwnedFd> = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .next();
    fd.map(File::from).ok_or_else(|| io::Error::other("the builder sent no file"))
}
