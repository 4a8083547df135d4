use std::process::ExitCode;

use firstboot::agent::{Paths, run};
use firstboot::console::say;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() != Some("run") {
        eprintln!("usage: firstboot run\n\nMakes this machine its node. systemd starts it as firstboot.service.");
        return ExitCode::from(2);
    }
    match run(&Paths::of_node()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            say(&format!("{e}"));
            ExitCode::from(e.exit_code())
        }
    }
}
