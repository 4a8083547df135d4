//! The installer: makes a node of a blank machine that booted from the network. The machine asks the server for its
//! assignment. Then it writes the image to its disk, verifies the disk, adds its ticket, and restarts; or it loads the
//! image into memory, and switches to it.
//!
//! The installer writes the partition table last. After a power loss before that, no firmware starts from the disk, so
//! the machine boots from the network again, and starts over.

mod command;
mod disk;
mod machine;
mod memory;
mod progress;
mod server;
mod trust;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use fleet::netboot::{Assignment, Install, Key, NetbootMachine, Step, code};

use command::run;
use disk::Target;
use progress::ProgressPrinter;
pub use progress::tell;
use server::Server;

use crate::error::{Error, Result};

/// Interval at which the machine asks the server again.
const PAUSE: Duration = Duration::from_secs(15);
/// Number of times that the machine reports that it runs from memory.
const STARTED: u32 = 4;

/// Installs this machine. Returns when systemd restarts the machine, or switches to the image in memory.
///
/// # Errors
/// If the kernel's command line has no server. The installer prints other errors, and tries again.
pub fn install() -> Result<()> {
    let cmdline = std::fs::read_to_string("/proc/cmdline").map_err(Error::io("read", Path::new("/proc/cmdline")))?;
    let mut server = Server::from_cmdline(&cmdline)?;
    // One key for the whole boot, so that the code that the operator confirms does not change.
    let key = Key::generate()?;
    let mut printed = String::new();
    loop {
        match attempt(&mut server, &key) {
            Ok(None) => return Ok(()),
            // Print a reason once, because a machine may wait for days until the operator assigns it.
            Ok(Some(why)) if why != printed => {
                tell(&why);
                printed = why;
            }
            Ok(Some(_)) => {}
            Err(e) => {
                let why = e.chain();
                if why != printed {
                    tell(&why);
                    printed.clone_from(&why);
                }
                server.try_report(Step::Failed { why });
            }
        }
        std::thread::sleep(PAUSE);
    }
}

/// Asks for the assignment, and executes it. Returns the reason if there is none yet, and `None` when it is complete.
fn attempt(server: &mut Server, key: &Key) -> Result<Option<String>> {
    let machine = NetbootMachine { key: key.public().to_owned(), ..machine::look()? };
    match server.ask(&machine)? {
        Assignment::Nothing { why } => return Ok(Some(why)),
        Assignment::Confirm { to } => {
            let code = code(key.public(), &to);
            return Ok(Some(format!(
                "this machine becomes {to}, whose ticket has the fleet's secrets; confirm it at the server: \
                 bakehouse netboot --approve {code}"
            )));
        }
        Assignment::Install(install) => {
            let (ticket, reports) = key.open(&install.ticket)?;
            server.reports = Some(reports);
            write(server, &install, &ticket)?;
            // Without this report, the server would assign the image again. Firmware that boots from the network first
            // would then overwrite the node.
            while let Err(e) = server.report(Step::Installed) {
                let why = e.chain();
                tell(format!("{} is on {}, but the report to the server failed: {why}", install.to, install.disk));
                std::thread::sleep(PAUSE);
            }
            tell(format!("{} is on {}; restarting from there", install.to, install.disk));
            run(Command::new("/usr/bin/systemctl").args(["--no-block", "--force", "reboot"]), "systemctl reboot")?;
        }
        Assignment::Run(assignment) => {
            tell(format!("loading {} into memory", assignment.to));
            let (ticket, reports) = key.open(&assignment.ticket)?;
            server.reports = Some(reports);
            memory::prepare(server, &assignment, &ticket)?;
            // Without this report, the server would issue the same ticket at the next start.
            for _ in 0..STARTED {
                match server.report(Step::Started) {
                    Ok(()) => break,
                    Err(e) => tell(e.chain()),
                }
                std::thread::sleep(PAUSE / STARTED);
            }
            memory::enter()?;
        }
    }
    Ok(None)
}

fn write(server: &Server, install: &Install, ticket: &[u8]) -> Result<()> {
    tell(format!("installing {} on {}", install.to, install.disk));
    let target = Target::open(install)?;
    target.clear()?;
    let mut progress = ProgressPrinter::new(install.extents.iter().map(|e| e.size).sum());
    target.write(server, |bytes| progress.advance(server, bytes))?;
    target.verify()?;
    target.put_ticket(ticket)?;
    target.finish()
}
