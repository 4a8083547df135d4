//! The command `firstboot`.

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use firstboot::agent::{Paths, USAGE, run};
use firstboot::error::{Error, Result};
use firstboot::host::capture::Capture;
use firstboot::host::console::{is_taken, log_event};
use firstboot::host::dbus::describe;
use firstboot::host::journal::Event;
use firstboot::host::log::{self, Process};
use firstboot::host::systemd::Systemd;
use firstboot::node::image::Image;
use firstboot::node::rescue::{Folders, Machine, clocks, is_guarded};
use firstboot::update::boot_entries::{Boots, ENTRIES};
use firstboot::update::grub::keep_in_step;
use firstboot::update::health::healthy;
use fleet::grubenv::BLOCK;
use tracing::error;

/// Where the EFI partition is mounted.
const ESP: &str = "/efi";

fn main() -> ExitCode {
    let is_agent = std::env::args().nth(1).as_deref() == Some("run");
    log::start(if is_agent { Process::Lasting } else { Process::Short });
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => {
            tracing::error!("cannot start the runtime: {e}");
            return ExitCode::FAILURE;
        }
    };
    let code = runtime.block_on(command());
    // A name lookup that still waits must not delay the exit.
    runtime.shutdown_background();
    code
}

async fn command() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match args[..] {
        ["run"] => Box::pin(run(&Paths::for_node())).await.inspect_err(|e| log_event(Event::Stopped, &e.chain())),
        ["status"] => status(false).await.inspect_err(tell),
        ["status", "--json"] => status(true).await.inspect_err(tell),
        ["leave"] => leave().await.inspect_err(tell),
        ["healthy"] => {
            health().await.inspect_err(|e| log_event(Event::Unwell, &format!("this image is not well: {}", e.chain())))
        }
        ["load"] => load().await.inspect_err(|e| error!("download of the newer image failed: {}", e.chain())),
        ["signed"] => {
            signed().await.inspect_err(|e| error!("cannot read the update folder's signature time: {}", e.chain()))
        }
        ["grub"] | ["grub", "--good"] => {
            let done = grub(args.len() == 2).await;
            done.inspect_err(|e| error!("cannot synchronize GRUB's count of tries: {}", e.chain()))
        }
        ["rescue", device] => {
            let opened = Box::pin(rescue(Path::new(device))).await;
            opened.inspect_err(|e| log_event(Event::RescueRefused, &format!("no maintenance console: {}", e.chain())))
        }
        ["capture", interface, seconds, bytes, snap] => {
            let Some(capture) = Capture::from_args(interface, seconds, bytes, snap) else {
                print_error(USAGE);
                return ExitCode::from(2);
            };
            capture.run(io::stdout().lock()).inspect_err(|e| print_error(&format!("{}\n", e.chain())))
        }
        ["--help" | "-h"] => {
            print(USAGE);
            return ExitCode::SUCCESS;
        }
        _ => {
            print_error(USAGE);
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => ExitCode::from(e.exit_code()),
    }
}

/// Prints a result on standard output. A reader that has closed it has read enough.
fn print(text: &str) {
    let _ = io::stdout().write_all(text.as_bytes());
}

/// Prints a text for the person who runs the command.
fn print_error(text: &str) {
    let _ = io::stderr().write_all(text.as_bytes());
}

fn tell(e: &Error) {
    print_error(&format!("{}\n  help: see `bakehouse logs NODE -u firstboot`\n", e.chain()));
}

async fn status(json: bool) -> Result<()> {
    print(&format!("{}\n", describe(&zbus::Connection::system().await?, json).await?));
    Ok(())
}

async fn leave() -> Result<()> {
    firstboot::host::dbus::leave(&zbus::Connection::system().await?).await
}

async fn health() -> Result<()> {
    let image = Image::read(&Paths::for_node().image)?;
    let systemd = Systemd::new(&zbus::Connection::system().await?).await?;
    let checked = healthy(&systemd, &image.info.health).await;
    // Without boot counting or another image, a restart could not roll back, and the node would restart in a loop. A
    // node that runs from memory has no boot entries.
    let (id, version) = (&image.info.id, &image.info.version);
    // A person repairs the machine. The boot does not become good, so the next restart rolls back.
    if checked.is_err()
        && !is_taken()
        && let Ok(boots) = Boots::read(&Path::new(ESP).join(ENTRIES), id)
        && !boots.is_blessed(version)
        && boots.has_another(version)
    {
        systemd.reboot().await?;
    }
    checked
}

async fn load() -> Result<()> {
    let scratch = std::env::var_os("RUNTIME_DIRECTORY");
    let scratch = scratch.ok_or_else(|| {
        Error::Failed("only firstboot-install.service runs `firstboot load`; start that unit".to_owned())
    })?;
    let image = Image::read(&Paths::for_node().image)?;
    firstboot::update::download::load(&image.info, Path::new(ESP), Path::new(&scratch)).await
}

async fn signed() -> Result<()> {
    let scratch = std::env::var_os("RUNTIME_DIRECTORY");
    let scratch = scratch.ok_or_else(|| {
        Error::Failed("only firstboot-check.service runs `firstboot signed`; start that unit".to_owned())
    })?;
    firstboot::update::download::date::record(Path::new("/run/bakehouse/metrics"), Path::new(&scratch)).await
}

async fn rescue(device: &Path) -> Result<()> {
    let folders = std::env::var("RUNTIME_DIRECTORY").unwrap_or_default();
    // systemd sorts the folders.
    let folder = |of_metrics: bool| {
        let found = folders.split(':').find(|path| !path.is_empty() && path.contains("-metrics-") == of_metrics);
        found.map(PathBuf::from).ok_or_else(|| {
            Error::Failed("only firstboot-rescue@.service runs `firstboot rescue`; attach a rescue disk".to_owned())
        })
    };
    let (runtime, metrics) = (folder(false)?, folder(true)?);
    let paths = Paths::for_node();
    let image = Image::read(&paths.image)?;
    let machine = Machine {
        state: &paths.state,
        credentials: paths.credentials.as_ref(),
        image: &image,
        clocks: &clocks(&paths.image),
        is_guarded: is_guarded(),
    };
    firstboot::node::rescue::rescue(&machine, device, &Folders { runtime: &runtime, metrics: &metrics }).await
}

async fn grub(good: bool) -> Result<()> {
    let esp = Path::new(ESP);
    // Under UEFI systemd-boot counts tries. A disk of an older version has no GRUB.
    if Path::new("/sys/firmware/efi").exists() || !esp.join(BLOCK).exists() {
        return Ok(());
    }
    let image = Image::read(&Paths::for_node().image)?;
    if keep_in_step(esp, &image.info.id, &image.info.version, good)? {
        // firstboot-good.service waits for the health check, as systemd-bless-boot.service does under UEFI.
        Systemd::new(&zbus::Connection::system().await?).await?.begin("firstboot-good.service").await?;
    }
    Ok(())
}
