use std::path::Path;
use std::process::ExitCode;

use firstboot::agent::{Paths, run};
use firstboot::error::{Error, Result};
use firstboot::host::console::say;
use firstboot::host::dbus::describe;
use firstboot::host::journal::Event;
use firstboot::host::systemd::Systemd;
use firstboot::node::image::Image;
use firstboot::update::boot_entries::{Boots, ENTRIES};
use firstboot::update::grub::keep_in_step;
use firstboot::update::health::healthy;
use fleet::grubenv::BLOCK;

/// Where the EFI partition is mounted.
const ESP: &str = "/efi";

const USAGE: &str = "\
usage: firstboot run              make this machine its node, and keep it one (firstboot.service)
       firstboot status [--json]  who this node is, and what it waits for
       firstboot leave            hand over, stop, and give this node's slot back
       firstboot healthy          wait until this boot is a good one (firstboot-healthy.service)
       firstboot load             load a newer image into the other slot (firstboot-install.service)
       firstboot signed           write when the update folder was signed as a metric (firstboot-check.service)
       firstboot grub [--good]    where a legacy BIOS starts this machine: bring boot entries and GRUB's
                                  count of tries in step; this boot is a good one (firstboot-grub.service)
";

fn main() -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => {
            eprintln!("cannot start the runtime: {e}");
            return ExitCode::FAILURE;
        }
    };
    let code = runtime.block_on(command());
    // A look-up that waits for a name server must not keep the process.
    runtime.shutdown_background();
    code
}

async fn command() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match args[..] {
        ["run"] => Box::pin(run(&Paths::of_node())).await.inspect_err(|e| say(Event::Stopped, &e.to_string())),
        ["status"] => status(false).await.inspect_err(|e| eprintln!("{e}; see: systemctl status firstboot")),
        ["status", "--json"] => status(true).await.inspect_err(|e| eprintln!("{e}; see: systemctl status firstboot")),
        ["leave"] => leave().await.inspect_err(|e| eprintln!("{e}; see: systemctl status firstboot")),
        ["healthy"] => health().await.inspect_err(|e| say(Event::Unwell, &format!("this image is not well: {e}"))),
        ["load"] => load().await.inspect_err(|e| eprintln!("{e}")),
        ["signed"] => signed().await.inspect_err(|e| eprintln!("{e}")),
        ["grub"] => in_step(false).await.inspect_err(|e| eprintln!("{e}")),
        ["grub", "--good"] => in_step(true).await.inspect_err(|e| eprintln!("{e}")),
        ["--help" | "-h"] => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        _ => {
            eprint!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => ExitCode::from(e.exit_code()),
    }
}

async fn status(json: bool) -> Result<()> {
    println!("{}", describe(&zbus::Connection::system().await?, json).await?);
    Ok(())
}

async fn leave() -> Result<()> {
    firstboot::host::dbus::leave(&zbus::Connection::system().await?).await
}

async fn health() -> Result<()> {
    let image = Image::read(&Paths::of_node().image)?;
    let systemd = Systemd::new(&zbus::Connection::system().await?).await?;
    let well = healthy(&systemd, &image.info.health).await;
    // Without a count, or another image, there is nothing to go back to: better half a node than
    // one that restarts for ever. One that runs from memory has no entries.
    let (id, version) = (&image.info.id, &image.info.version);
    if well.is_err()
        && let Ok(boots) = Boots::read(&Path::new(ESP).join(ENTRIES), id)
        && !boots.is_blessed(version)
        && boots.has_another(version)
    {
        systemd.reboot().await?;
    }
    well
}

async fn load() -> Result<()> {
    let scratch = std::env::var_os("RUNTIME_DIRECTORY");
    let scratch = scratch.ok_or_else(|| Error::Failed("it is firstboot-install.service that loads".to_owned()))?;
    let image = Image::read(&Paths::of_node().image)?;
    firstboot::update::download::load(&image.info, Path::new(ESP), Path::new(&scratch)).await
}

async fn signed() -> Result<()> {
    let scratch = std::env::var_os("RUNTIME_DIRECTORY");
    let scratch = scratch.ok_or_else(|| Error::Failed("only firstboot-check.service runs this".to_owned()))?;
    firstboot::update::download::date::record(Path::new("/run/bakehouse/metrics"), Path::new(&scratch)).await
}

async fn in_step(good: bool) -> Result<()> {
    let esp = Path::new(ESP);
    // Under UEFI systemd-boot counts; a disk of an older version has no GRUB.
    if Path::new("/sys/firmware/efi").exists() || !esp.join(BLOCK).exists() {
        return Ok(());
    }
    let image = Image::read(&Paths::of_node().image)?;
    if keep_in_step(esp, &image.info.id, &image.info.version, good)? {
        // As systemd-bless-boot does under UEFI, when this boot is complete.
        Systemd::new(&zbus::Connection::system().await?).await?.begin("firstboot-good.service").await?;
    }
    Ok(())
}
