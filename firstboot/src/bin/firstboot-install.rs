//! The installer that the initrd of `bakehouse netboot` runs. A separate program keeps the initrd small.

use std::process::ExitCode;

use firstboot::host::log::{self, Process};

fn main() -> ExitCode {
    log::start(Process::Short);
    match firstboot::install::install() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            firstboot::install::tell(e.chain());
            ExitCode::from(e.exit_code())
        }
    }
}
