//! The command `bakehouse-page`.

use std::fs;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::ExitCode;

use page::config::Fleet;
use page::error::{Error, Result};

const USAGE: &str = "usage: bakehouse-page [--socket SOCKET | --check] FILE

Serves the fleet's page to the agent of a monitor. FILE describes the fleet, and SOCKET is a path for a Unix socket.
Without --socket, standard input is the socket, which systemd has opened (bakehouse-page.socket). --check reads FILE
and ends.
";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match args[..] {
        [file] if !file.starts_with('-') => run(file, None),
        ["--check", file] => Fleet::read(Path::new(file)).map(drop),
        ["--socket", socket, file] => run(file, Some(Path::new(socket))),
        _ => {
            eprint!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {}", e.chain());
            ExitCode::FAILURE
        }
    }
}

fn run(file: &str, socket: Option<&Path>) -> Result<()> {
    let fleet = Fleet::read(Path::new(file))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(Error::io("start", "the runtime"))?;
    runtime.block_on(async {
        page::serve(fleet, listener(socket)?).await;
        Ok(())
    })
}

/// Opens the socket, or takes that of systemd.
fn listener(socket: Option<&Path>) -> Result<tokio::net::UnixListener> {
    let listener = if let Some(path) = socket {
        // A socket of a process that was killed.
        if let Err(e) = fs::remove_file(path)
            && e.kind() != io::ErrorKind::NotFound
        {
            return Err(Error::io("remove", path.display())(e));
        }
        UnixListener::bind(path).map_err(Error::io("listen on", path.display()))?
    } else {
        let stdin = io::stdin().as_fd().try_clone_to_owned();
        UnixListener::from(stdin.map_err(Error::io("take", "the socket of systemd"))?)
    };
    listener.set_nonblocking(true).map_err(Error::io("prepare", "the socket"))?;
    tokio::net::UnixListener::from_std(listener).map_err(Error::io("serve", "the socket"))
}
