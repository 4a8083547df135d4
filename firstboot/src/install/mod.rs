//! A bare machine that booted from the network becomes a node: it asks what it is to be, writes the
//! image to its disk, checks what it wrote, puts its ticket in, and restarts from there; or it
//! takes the image into its memory, and goes on from there.
//!
//! The partition table comes last: a machine whose power fails before has a disk that no firmware
//! starts from, boots from the network again, and starts over.

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
use progress::{ProgressPrinter, tell};
use server::Server;

use crate::error::{Error, Result};

/// How often a server that says "nothing" is asked again.
const PAUSE: Duration = Duration::from_secs(15);
/// How often the server is told that the machine goes on from its memory.
const STARTED: u32 = 4;

/// Ends when the machine is to restart from its disk, or to go on from its memory.
///
/// # Errors
/// The kernel's command line names no server. Whatever else goes wrong is said, and tried again.
pub fn install() -> Result<()> {
    let cmdline = std::fs::read_to_string("/proc/cmdline").map_err(Error::io("read", Path::new("/proc/cmdline")))?;
    let mut server = Server::of(&cmdline)?;
    // One for the whole boot: the code that the operator confirms stays the same.
    let key = Key::generate()?;
    let mut said = String::new();
    loop {
        match attempt(&mut server, &key) {
            Ok(None) => return Ok(()),
            // Once: a machine may wait for days until somebody says what it is to be.
            Ok(Some(why)) if why != said => {
                tell(&why);
                said = why;
            }
            Ok(Some(_)) => {}
            Err(e) => {
                let why = e.to_string();
                if why != said {
                    tell(&why);
                    said.clone_from(&why);
                }
                server.news(Step::Failed { why });
            }
        }
        std::thread::sleep(PAUSE);
    }
}

/// Why there is nothing to do; none when it was done.
fn attempt(server: &mut Server, key: &Key) -> Result<Option<String>> {
    let machine = NetbootMachine { key: key.public().to_owned(), ..machine::look()? };
    match server.ask(&machine)? {
        Assignment::Nothing { why } => return Ok(Some(why)),
        Assignment::Confirm { to } => {
            let code = code(key.public(), &to);
            return Ok(Some(format!(
                "this machine is to be {to}, whose ticket holds the fleet's secrets; confirm it at the server: \
                 bakehouse netboot --approve {code}"
            )));
        }
        Assignment::Install(install) => {
            let (ticket, reports) = key.open(&install.ticket)?;
            server.reports = Some(reports);
            write(server, &install, &ticket)?;
            // A server that does not know it would have the node overwritten, where firmware asks the network
            // first.
            while let Err(e) = server.report(Step::Installed) {
                tell(format!("{} is on {}, and the server has to hear it: {e}", install.to, install.disk));
                std::thread::sleep(PAUSE);
            }
            tell(format!("{} is on {}; restarting from there", install.to, install.disk));
            run(Command::new("/usr/bin/systemctl").args(["--no-block", "--force", "reboot"]), "systemctl reboot")?;
        }
        Assignment::Run(errand) => {
            tell(format!("{} comes to this machine's memory", errand.to));
            let (ticket, reports) = key.open(&errand.ticket)?;
            server.reports = Some(reports);
            memory::prepare(server, &errand, &ticket)?;
            // A server that does not know that this ticket is used would hand it out at the next start, too.
            for _ in 0..STARTED {
                match server.report(Step::Started) {
                    Ok(()) => break,
                    Err(e) => tell(e),
                }
                std::thread::sleep(PAUSE / STARTED);
            }
            memory::enter()?;
        }
    }
    Ok(None)
}

fn write(server: &Server, install: &Install, ticket: &[u8]) -> Result<()> {
    tell(format!("{} comes to {}", install.to, install.disk));
    let target = Target::open(install)?;
    target.clear()?;
    let mut tenths = ProgressPrinter::of(install.extents.iter().map(|e| e.size).sum());
    target.write(server, |bytes| tenths.advance(server, bytes))?;
    target.verify()?;
    target.put_ticket(ticket)?;
    target.finish()
}
