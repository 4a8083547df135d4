//! Runs systemd-sysupdate with a server on loopback as its source.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tokio::net::TcpListener;
use tracing::warn;

use super::server::{LocalImage, Server};
use crate::error::{Error, Result};
use crate::node::image::ImageInfo;
use crate::update::boot_entries::{self, Boots, ENTRIES};

const SYSUPDATE: &str = "/usr/lib/systemd/systemd-sysupdate";
/// Folder of the image's transfer definitions (sysupdate.d(5)).
pub(super) const TRANSFERS: &str = "/usr/lib/sysupdate.d";
pub(super) const AUTHORITIES: &str = "/etc/ssl/certs/ca-certificates.crt";

/// Downloads the available image with systemd-sysupdate: only the changed blocks, or all blocks if that fails.
/// `scratch`: an empty folder for temporary files.
///
/// # Errors
/// If both attempts fail.
pub async fn load(image: &ImageInfo, esp: &Path, scratch: &Path) -> Result<()> {
    // The boot loader has not started an entry that exists already, so the download must replace it.
    Boots::forget_pending(&esp.join(ENTRIES), &image.id, &image.version)?;
    if let Err(e) = load_changed_blocks(image, esp, scratch).await {
        warn!("downloading only changed blocks failed, downloading everything: {}", e.chain());
        return sysupdate(Path::new(TRANSFERS)).await;
    }
    Ok(())
}

async fn load_changed_blocks(image: &ImageInfo, esp: &Path, scratch: &Path) -> Result<()> {
    let transfers = transfers(Path::new(TRANSFERS))?;
    let url = transfers.iter().find_map(|(_, text)| source(text));
    let url = url.ok_or_else(|| Error::Failed(format!("{TRANSFERS} has no URL; build the image again")))?;
    let server = Server::new(url, LocalImage::for_node(image, esp)?)?;
    let listener = TcpListener::bind("127.0.0.1:0").await.map_err(Error::io("listen at", "127.0.0.1"))?;
    let address = listener.local_addr().map_err(Error::io("listen at", "127.0.0.1"))?;
    for (name, text) in &transfers {
        let path = scratch.join(name);
        let text = text.replace(&format!("Path={url}"), &format!("Path=http://{address}/"));
        fs::write(&path, text).map_err(Error::io("write", &path))?;
    }
    tokio::select! {
        () = server.serve(listener) => Err(Error::Failed("the server on loopback has ended".to_owned())),
        done = sysupdate(scratch) => done,
    }
}

async fn sysupdate(transfers: &Path) -> Result<()> {
    let mut command = Command::new(SYSUPDATE);
    command.arg(format!("--definitions={}", transfers.display())).arg("update");
    let done = tokio::task::spawn_blocking(move || command.status()).await;
    let status = done.map_err(Error::cannot("wait for systemd-sysupdate"))?.map_err(Error::io("run", SYSUPDATE))?;
    if status.success() {
        Ok(())
    } else {
        Err(Error::Tool { program: "systemd-sysupdate".to_owned(), status, output: String::new() })
    }
}

/// Reads the transfer definitions; returns their names and texts.
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

/// Returns the update folder's URL of a transfer definition.
pub(super) fn source(transfer: &str) -> Option<&str> {
    transfer.lines().filter_map(|line| line.strip_prefix("Path=")).find(|path| path.starts_with("http"))
}

impl LocalImage {
    /// Finds the running image's files. The root hash's halves are the UUIDs of the root and verity partitions.
    fn for_node(image: &ImageInfo, esp: &Path) -> Result<Self> {
        let path = Path::new("/proc/cmdline");
        let cmdline = fs::read_to_string(path).map_err(Error::io("read", path))?;
        let hash = cmdline.split_whitespace().find_map(|word| word.strip_prefix("roothash="));
        let tree = hash.filter(|h| h.is_ascii()).and_then(|hash| uuid(hash.get(hash.len() / 2..)?));
        let tree = tree.ok_or_else(|| Error::Failed("the kernel's command line has no root hash".to_owned()))?;
        let entries = esp.join(ENTRIES);
        let names = fs::read_dir(&entries).map_err(Error::io("read", &entries))?;
        let is_running =
            |name: &str| boot_entries::split(name, &image.id).is_some_and(|(version, _)| version == image.version);
        let uki = names
            .filter_map(|e| Some(e.ok()?.path()))
            .find(|p| p.file_name().and_then(|n| n.to_str()).is_some_and(is_running));
        Ok(Self {
            root: PathBuf::from("/dev/mapper/root"),
            tree: Path::new("/dev/disk/by-partuuid").join(tree),
            authorities: AUTHORITIES.into(),
            uki: uki.ok_or_else(|| Error::Failed("the running image has no boot entry".to_owned()))?,
        })
    }
}

/// Formats 32 hexadecimal digits as a UUID.
fn uuid(digits: &str) -> Option<String> {
    let part = |from: usize, to: usize| digits.get(from..to);
    Some([part(0, 8)?, part(8, 12)?, part(12, 16)?, part(16, 20)?, part(20, 32)?].join("-"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_url_of_a_transfer() {
        let transfer =
            "[Source]\nType=url-file\nPath=https://updates.example.net/acme/db/\nMatchPattern=x\n[Target]\nPath=auto\n";
        assert_eq!(source(transfer), Some("https://updates.example.net/acme/db/"));
        assert_eq!(source("[Target]\nPath=/EFI/Linux\n"), None);
    }

    #[test]
    fn formats_half_a_root_hash_as_uuid() {
        assert_eq!(uuid(&"0123456789abcdef".repeat(2)).unwrap(), "01234567-89ab-cdef-0123-456789abcdef");
        assert_eq!(uuid("0123"), None);
    }
}
