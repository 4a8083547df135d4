//! What the initrd of `bakehouse netboot` runs: it has no more than that needs.

use std::process::ExitCode;

fn main() -> ExitCode {
    match firstboot::install::install() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            println!("bakehouse: {e}");
            ExitCode::from(e.exit_code())
        }
    }
}
