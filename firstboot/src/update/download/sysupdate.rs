//! Has systemd-sysupdate load a newer image through a server on loopback.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tokio::net::TcpListener;

use super::server::{LocalImage, Server};
use crate::error::{Error, Result};
use crate::node::image::ImageInfo;
use crate::update::boot_entries::{self, Boots, ENTRIES};

const SYSUPDATE: &str = "/usr/lib/systemd/systemd-sysupdate";
/// What systemd-sysupdate is to load, and from where; baked.
pub(super) const TRANSFERS: &str = "/usr/lib/sysupdate.d";
pub(super) const AUTHORITIES: &str = "/etc/ssl/certs/ca-certificates.crt";

/// Has systemd-sysupdate load what is offered. `scratch` is a folder for this alone.
///
/// # Errors
/// It could not, in neither way.
pub async fn load(image: &ImageInfo, esp: &Path, scratch: &Path) -> Result<()> {
    // One that is there was passed over by the boot loader.
    Boots::forget_pending(&esp.join(ENTRIES), &image.id, &image.version)?;
    if let Err(e) = what_differs(image, esp, scratch).await {
        println!("loading everything: {e}");
        return sysupdate(Path::new(TRANSFERS)).await;
    }
    Ok(())
}

async fn what_differs(image: &ImageInfo, esp: &Path, scratch: &Path) -> Result<()> {
    let transfers = transfers(Path::new(TRANSFERS))?;
    let url = transfers.iter().find_map(|(_, text)| source(text));
    let url = url.ok_or_else(|| Error::Failed(format!("{TRANSFERS} names no address")))?;
    let server = Server::of(url, LocalImage::of_node(image, esp)?)?;
    let listener = TcpListener::bind("127.0.0.1:0").await.map_err(Error::io("listen at", "127.0.0.1"))?;
    let here = listener.local_addr().map_err(Error::io("listen at", "127.0.0.1"))?;
    for (name, text) in &transfers {
        let path = scratch.join(name);
        let text = text.replace(&format!("Path={url}"), &format!("Path=http://{here}/"));
        fs::write(&path, text).map_err(Error::io("write", &path))?;
    }
    tokio::select! {
        () = server.serve(listener) => Err(Error::Failed("loopback is gone".to_owned())),
        done = sysupdate(scratch) => done,
    }
}

async fn sysupdate(transfers: &Path) -> Result<()> {
    let mut command = Command::new(SYSUPDATE);
    command.arg(format!("--definitions={}", transfers.display())).arg("update");
    let done = tokio::task::spawn_blocking(move || command.status()).await;
    let status = done.map_err(|e| Error::Failed(e.to_string()))?.map_err(Error::io("run", SYSUPDATE))?;
    if status.success() { Ok(()) } else { Err(Error::Failed(format!("systemd-sysupdate: {status}"))) }
}

/// Names and texts.
pub(super) fn transfers(dir: &Path) -> Result<Vec<(String, String)>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir).map_err(Error::io("read", dir))? {
        let path = entry.map_err(Error::io("read", dir))?.path();
        let Some(name) = path.file_name().and_then(|n| n.to_str()).filter(|n| n.ends_with(".transfer")) else {
            continue;
        };
        all.push((name.to_owned(), fs::read_to_string(&path).map_err(Error::io("read", &path))?));
    }
    Ok(all)
}

/// The update folder's URL.
pub(super) fn source(transfer: &str) -> Option<&str> {
    transfer.lines().filter_map(|line| line.strip_prefix("Path=")).find(|path| path.starts_with("http"))
}

impl LocalImage {
    /// What this machine runs: partitions have the two halves of the root hash for their UUIDs.
    fn of_node(image: &ImageInfo, esp: &Path) -> Result<Self> {
        let path = Path::new("/proc/cmdline");
        let cmdline = fs::read_to_string(path).map_err(Error::io("read", path))?;
        let hash = cmdline.split_whitespace().find_map(|word| word.strip_prefix("roothash="));
        let tree = hash.filter(|h| h.is_ascii()).and_then(|hash| uuid(hash.get(hash.len() / 2..)?));
        let tree = tree.ok_or_else(|| Error::Failed("the kernel's command line has no root hash".to_owned()))?;
        let entries = esp.join(ENTRIES);
        let names = fs::read_dir(&entries).map_err(Error::io("read", &entries))?;
        let runs =
            |name: &str| boot_entries::split(name, &image.id).is_some_and(|(version, _)| version == image.version);
        let uki = names
            .filter_map(|e| Some(e.ok()?.path()))
            .find(|p| p.file_name().and_then(|n| n.to_str()).is_some_and(runs));
        Ok(Self {
            root: PathBuf::from("/dev/mapper/root"),
            tree: Path::new("/dev/disk/by-partuuid").join(tree),
            authorities: AUTHORITIES.into(),
            uki: uki.ok_or_else(|| Error::Failed("what runs has no boot entry".to_owned()))?,
        })
    }
}

/// 32 digits, as a UUID is written.
fn uuid(digits: &str) -> Option<String> {
    let part = |from: usize, to: usize| digits.get(from..to);
    Some([part(0, 8)?, part(8, 12)?, part(12, 16)?, part(16, 20)?, part(20, 32)?].join("-"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_is_what_the_transfer_says() {
        let transfer =
            "[Source]\nType=url-file\nPath=https://updates.example.net/acme/db/\nMatchPattern=x\n[Target]\nPath=auto\n";
        assert_eq!(source(transfer), Some("https://updates.example.net/acme/db/"));
        assert_eq!(source("[Target]\nPath=/EFI/Linux\n"), None);
    }

    #[test]
    fn a_partitions_uuid_is_half_a_root_hash() {
        assert_eq!(uuid(&"0123456789abcdef".repeat(2)).unwrap(), "01234567-89ab-cdef-0123-456789abcdef");
        assert_eq!(uuid("0123"), None);
    }
}
