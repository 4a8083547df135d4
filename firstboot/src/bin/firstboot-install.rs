//! The installer that the initrd of `bakehouse netboot` runs. A separate program keeps the initrd small.

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
