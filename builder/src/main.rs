//! The command `bakehouse`.

use std::process::ExitCode;

use builder::{cli, sandbox, worker};

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    // The sandbox runs this binary again, with one of these arguments.
    match args.next().as_deref().and_then(std::ffi::OsStr::to_str) {
        Some(sandbox::WORKER) => sandbox::worker(args.next().as_deref()).into(),
        Some(sandbox::INNER) => worker::inner().into(),
        Some(sandbox::IN_ROOT) => sandbox::enter().into(),
        _ => cli::main(),
    }
}
