//! `bakehouse publish`: copies built images into a folder from which nodes update themselves. Any HTTP server can serve
//! the folder, because nodes verify its signature.
//!
//! ```text
//! DIR/GROUP/ID_VERSION_UUID.root.raw     root file system: the bytes of its partition
//! DIR/GROUP/ID_VERSION_UUID.verity.raw   hash tree of the root file system
//! DIR/GROUP/ID_VERSION.efi               UKI: kernel, initrd and root hash
//! DIR/GROUP/ID_VERSION.blocks            hashes of the UKI's blocks: nodes download only blocks that they lack
//! DIR/GROUP/ID_VERSION.manifest.json     contents of the image
//! DIR/GROUP/SHA256SUMS, SHA256SUMS.gpg   checksums and signature, which systemd-sysupdate reads first
//! ```

mod addons;
mod diff;
mod schedule;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use fleet::blocks::{Blocks, missing, pieces};
use schemars::JsonSchema;
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use tempfile::NamedTempFile;
use uuid::Uuid;

pub(crate) use diff::Comparison;
use diff::Contents;
pub(crate) use schedule::RolloutSchedule;

use crate::assemble::layout::{PartitionSizes, ROOT_START};
use crate::error::{Error, Result, fail};
use crate::format::verity;
use crate::image::BuiltImage;
use crate::keys::update_key::UpdateKey;
use crate::progress::Progress;
use crate::util::digest::{hex, sha256};
use crate::util::fs::write_atomic;

/// Copy of the newest version's manifest.
const NEWEST: &str = "newest.json";
const SUMS: &str = "SHA256SUMS";

/// Result of the publication of an image.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub(crate) struct Published {
    /// Name of the group.
    pub group: String,
    /// Version of the image.
    pub version: String,
    /// Whether the image was published before.
    pub unchanged: bool,
    /// Bytes that a node of the previous version downloads, or bytes of the whole image for the first version.
    pub bytes: u64,
}

/// Returns whether the folder has a version of one of these images' groups.
#[must_use]
pub(crate) fn has_version(dir: &Path, images: &[BuiltImage]) -> bool {
    images.iter().any(|image| dir.join(&image.group).join(NEWEST).exists())
}

/// Compares an image with the published one of its group.
///
/// # Errors
/// If a manifest or the image's files cannot be read.
pub(crate) fn compare(image: &BuiltImage, dir: &Path) -> Result<Comparison> {
    let new = Contents::read(&image.manifest, "run `bakehouse build`")?;
    let out = dir.join(&image.group);
    let old = newest(&out)?;
    let mut found = Comparison::new(old.as_ref(), &new);
    if let Some(old) = &old {
        let uki = Blocks::from_bytes(&fs::read(&image.uki).map_err(Error::io("read", &image.uki))?);
        found.load = differing(image, &new, &uki, &out, old)?.unwrap_or(found.load);
    }
    Ok(found)
}

/// Publishes an image, with a signature of `time` (seconds since 1970).
///
/// # Errors
/// If nodes of the published version cannot change to this image, or a file cannot be read or written.
pub(crate) fn publish(
    image: &BuiltImage,
    dir: &Path,
    key: &UpdateKey,
    time: u64,
    progress: &Progress,
) -> Result<Published> {
    let new = Contents::read(&image.manifest, "run `bakehouse build`")?;
    let out = dir.join(&image.group);
    let old = newest(&out)?;
    let mut published =
        Published { group: image.group.clone(), version: new.version.clone(), unchanged: true, bytes: 0 };
    if let Some(old) = &old {
        if old.version == new.version && old.roothash == new.roothash {
            // Nodes raise an alert if the signature is old, so an unchanged folder gets a new one.
            let sums = out.join(SUMS);
            let text = fs::read(&sums).map_err(Error::io("read", &sums))?;
            write_atomic(&out.join(format!("{SUMS}.gpg")), &key.sign(&text, time))?;
            let message = format!("{}: version {} is published already; signed it again", image.group, new.version);
            progress.say("publish", &message);
            return Ok(published);
        }
        let obstacles = Comparison::new(Some(old), &new).obstacles;
        if !obstacles.is_empty() {
            return fail(format!(
                "{}: nodes of version {} cannot change to {}: {}",
                image.group,
                old.version,
                new.version,
                obstacles.join("; ")
            ));
        }
    }
    published.unchanged = false;
    fs::create_dir_all(&out).map_err(Error::io("create", &out))?;
    let slots = PartitionSizes::for_root(new.sizes.root_slot);
    let name = stem(&new);
    let size = new.sizes.root;
    let [root, tree] = partitions(&new)?;
    let partitions = [(root, ROOT_START, size), (tree, slots.verity_start(), verity::tree_size(size))];
    let read = |path: &Path| fs::read(path).map_err(Error::io("read", path));
    let (uki, manifest) = (read(&image.uki)?, read(&image.manifest)?);
    let blocks = Blocks::from_bytes(&uki);
    let differing = old.as_ref().map(|old| differing(image, &new, &blocks, &out, old)).transpose()?.flatten();
    let step = progress.bytes("publish", partitions.iter().map(|p| p.2).sum());
    let mut sums = Vec::new();
    let mut whole = 0;
    for (name, start, size) in &partitions {
        sums.push((part(&image.disk, *start, *size, &out.join(name), |n| step.advance(n))?, name.clone()));
        whole += size;
    }
    whole += uki.len() as u64;
    // Not `.efi.blocks`, because a pattern of systemd-sysupdate 257 also matches names that continue after it.
    let files = [(".efi", &uki), (".blocks", &blocks.list()), (".manifest.json", &manifest)];
    for (suffix, bytes) in files {
        let name = format!("{name}{suffix}");
        write_atomic(&out.join(&name), bytes)?;
        sums.push((sha256(bytes), name));
    }
    published.bytes = differing.unwrap_or(whole);
    // The previous version stays, because nodes may be downloading it.
    let kept = old.as_ref().map(stem);
    let before = fs::read_to_string(out.join(SUMS)).unwrap_or_default();
    let of_kept = |name: &str| {
        let of = |kept: &String| name.strip_prefix(kept.as_str()).is_some_and(|rest| rest.starts_with(['.', '_']));
        kept.as_ref().is_some_and(of)
    };
    let kept_sums = before.lines().filter_map(|l| l.split_once("  ")).filter(|(_, name)| of_kept(name));
    sums.extend(kept_sums.map(|(sum, name)| (sum.to_owned(), name.to_owned())));
    sums.sort_by(|a, b| a.1.cmp(&b.1));
    let text: String = sums.iter().map(|(sum, name)| format!("{sum}  {name}\n")).collect();
    // A node that reads between these two writes finds an invalid signature, and retries later.
    write_atomic(&out.join(SUMS), text.as_bytes())?;
    write_atomic(&out.join(format!("{SUMS}.gpg")), &key.sign(text.as_bytes(), time))?;
    write_atomic(&out.join(NEWEST), &manifest)?;
    let listed: BTreeSet<&str> = sums.iter().map(|(_, name)| name.as_str()).collect();
    remove_unlisted(&out, &listed)?;
    let mb = |bytes| format!("{:.1} MB", bytes as f64 / 1e6);
    let download = old.map(|old| format!("; nodes of version {} download {}", old.version, mb(published.bytes)));
    step.done(&format!("{}: version {} ({}{})", image.group, new.version, mb(whole), download.unwrap_or_default()));
    Ok(published)
}

/// Returns the bytes that a node of the published version downloads: the blocks that it lacks. `None` if the published
/// files do not list their blocks.
fn differing(image: &BuiltImage, new: &Contents, uki: &Blocks, out: &Path, old: &Contents) -> Result<Option<u64>> {
    use std::os::unix::fs::FileExt as _;
    let [_, tree] = partitions(old)?;
    let old_root = fs::read(out.join(tree)).ok().and_then(|tree| Blocks::from_tree(&tree));
    let old_uki = fs::read(out.join(format!("{}.blocks", stem(old)))).ok().and_then(|list| Blocks::from_list(&list));
    let mut tree = vec![0; verity::tree_size(new.sizes.root) as usize];
    let disk = File::open(&image.disk).map_err(Error::io("open", &image.disk))?;
    let at = PartitionSizes::for_root(new.sizes.root_slot).verity_start();
    disk.read_exact_at(&mut tree, at).map_err(Error::io("read", &image.disk))?;
    let (Some(old_root), Some(old_uki), Some(root)) = (old_root, old_uki, Blocks::from_tree(&tree)) else {
        return Ok(None);
    };
    let beside = tree.len() + uki.list().len();
    Ok(Some(beside as u64 + missing(&pieces(&old_root, &root)) + missing(&pieces(&old_uki, uki))))
}

/// Returns the common prefix of the names of a version's files.
fn stem(contents: &Contents) -> String {
    format!("{}_{}", contents.id, contents.version)
}

/// Returns the names of the root file system and its hash tree. The UUIDs of their partitions are the halves of the
/// root hash.
fn partitions(contents: &Contents) -> Result<[String; 2]> {
    let stem = stem(contents);
    let hash = &contents.roothash;
    let half = |range: std::ops::Range<usize>| hash.get(range).and_then(|half| Uuid::parse_str(half).ok());
    let (Some(data), Some(tree)) = (half(0..32), half(32..64)) else {
        return fail(format!("the manifest of {stem} has no root hash\n  help: bakehouse build"));
    };
    Ok([format!("{stem}_{data}.root.raw"), format!("{stem}_{tree}.verity.raw")])
}

fn newest(out: &Path) -> Result<Option<Contents>> {
    let path = out.join(NEWEST);
    if path.exists() {
        Contents::read(&path, "restore the file from a backup, or publish into an empty folder").map(Some)
    } else {
        Ok(None)
    }
}

/// Copies a range of the disk image to a file. Returns the SHA-256 sum.
fn part(disk: &Path, start: u64, size: u64, to: &Path, mut advance: impl FnMut(u64)) -> Result<String> {
    let read = Error::io("read", disk);
    let mut from = File::open(disk).map_err(Error::io("open", disk))?;
    from.seek(SeekFrom::Start(start)).map_err(read)?;
    let mut from = from.take(size);
    let dir = to.parent().unwrap_or(Path::new("."));
    let mut file = NamedTempFile::new_in(dir).map_err(Error::io("write in", dir))?;
    let mut hash = Sha256::new();
    let mut chunk = vec![0; 1 << 20];
    let mut copied = 0;
    while copied < size {
        let n = from.read(&mut chunk).map_err(Error::io("read", disk))?;
        if n == 0 {
            return fail(format!("{} is shorter than its manifest states\n  help: bakehouse build", disk.display()));
        }
        hash.update(&chunk[..n]);
        file.write_all(&chunk[..n]).map_err(Error::io("write", to))?;
        copied += n as u64;
        advance(n as u64);
    }
    readable_by_all(&file).and_then(|()| file.as_file().sync_all()).map_err(Error::io("write", to))?;
    file.persist(to).map_err(|e| Error::io("write", to)(e.error))?;
    Ok(hex(&hash.finalize()))
}

/// Sets mode 0644, because the HTTP server may run as another user.
fn readable_by_all(file: &NamedTempFile) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    file.as_file().set_permissions(fs::Permissions::from_mode(0o644))
}

/// Removes files of versions that `SHA256SUMS` no longer lists.
fn remove_unlisted(out: &Path, listed: &BTreeSet<&str>) -> Result<()> {
    let entries = fs::read_dir(out).map_err(Error::io("read", out))?;
    let paths: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
    for path in paths {
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let ours = [".root.raw", ".verity.raw", ".efi", ".blocks", ".manifest.json"]
            .iter()
            .any(|suffix| name.ends_with(suffix));
        if ours && !listed.contains(name.as_str()) {
            fs::remove_file(&path).map_err(Error::io("remove", &path))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::os::unix::fs::FileExt;

    struct UpdateFolder(tempfile::TempDir);

    impl UpdateFolder {
        fn image(&self, version: &str, more: &serde_json::Value) -> BuiltImage {
            let path = |name: &str| self.0.path().join(name);
            let slots = PartitionSizes::for_root(1 << 20);
            let mut manifest = json!({
                "id": "acme-db", "version": version, "group": "db", "kernel": "6.12",
                "roothash": version.repeat(64)[..64],
                "sizes": { "root_slot": slots.root, "root": 8192, "uki": 4096 },
                "packages": [], "files": {}, "nodes": {}, "state": 2, "mesh": "10.10.0.0/24",
            });
            for (key, value) in more.as_object().unwrap() {
                manifest[key] = value.clone();
            }
            fs::write(path("manifest"), manifest.to_string()).unwrap();
            fs::write(path("uki"), format!("kernel {version}")).unwrap();
            let disk = File::create(path("disk")).unwrap();
            disk.set_len(slots.disk()).unwrap();
            disk.write_all_at(&[7; 8192], ROOT_START).unwrap();
            disk.write_all_at(&[8; 4096], slots.verity_start()).unwrap();
            BuiltImage {
                group: "db".into(),
                disk: path("disk"),
                uki: path("uki"),
                manifest: path("manifest"),
                unchanged: false,
            }
        }

        fn publish(&self, image: &BuiltImage) -> Result<Published> {
            self.publish_at(image, 1_760_000_000)
        }

        fn publish_at(&self, image: &BuiltImage, time: u64) -> Result<Published> {
            let key = UpdateKey::derive("acme", "root").unwrap();
            publish(image, &self.0.path().join("out"), &key, time, &Progress::new(true, false))
        }

        /// Returns the signature's date from gpgv, which verifies it with a fleet's keyring.
        fn date(&self, keyring: &[u8]) -> Result<u64> {
            let scratch = tempfile::tempdir().unwrap();
            let (out, ring) = (self.0.path().join("out/db"), scratch.path().join("ring.gpg"));
            fs::write(&ring, keyring).unwrap();
            let mut gpgv = std::process::Command::new("gpgv");
            gpgv.env("GNUPGHOME", scratch.path()).arg("--status-fd=1").arg("--keyring").arg(ring);
            let output = gpgv.arg(out.join("SHA256SUMS.gpg")).arg(out.join(SUMS)).output().unwrap();
            let status = String::from_utf8(output.stdout).unwrap();
            let valid = status.lines().find_map(|line| line.strip_prefix("[GNUPG:] VALIDSIG "));
            let time = valid.and_then(|fields| fields.split(' ').nth(2)?.parse().ok());
            time.filter(|_| output.status.success()).ok_or_else(|| Error::Failed("no valid signature".to_owned()))
        }

        fn files(&self) -> Vec<String> {
            let dir = fs::read_dir(self.0.path().join("out/db")).unwrap();
            let mut names: Vec<String> = dir.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        }
    }

    #[test]
    fn keeps_two_complete_versions() {
        let lab = UpdateFolder(tempfile::tempdir().unwrap());
        for version in ["1", "2", "3"] {
            assert!(!lab.publish(&lab.image(version, &json!({}))).unwrap().unchanged);
        }
        assert!(lab.publish(&lab.image("3", &json!({}))).unwrap().unchanged);
        let out = lab.0.path().join("out/db");
        let sums = fs::read_to_string(out.join(SUMS)).unwrap();
        assert_eq!(sums.lines().count(), 10);
        for line in sums.lines() {
            let (sum, name) = line.split_once("  ").unwrap();
            assert_eq!(sha256(&fs::read(out.join(name)).unwrap()), sum, "{name}");
        }
        let root = "acme-db_3_33333333-3333-3333-3333-333333333333.root.raw";
        assert_eq!(fs::read(out.join(root)).unwrap(), [7; 8192]);
        let names = lab.files();
        assert!(names.iter().all(|n| !n.contains("_1_") && !n.contains("_1.")), "{names:?}");
        assert_eq!(names.len(), 10 + 3);
    }

    /// A server that withholds updates serves an old signature, because it cannot create a newer one.
    #[test]
    fn every_publication_signs_its_date() {
        let lab = UpdateFolder(tempfile::tempdir().unwrap());
        let image = lab.image("1", &json!({}));
        let own = UpdateKey::derive("acme", "root").unwrap().keyring();
        lab.publish_at(&image, 1_760_000_000).unwrap();
        assert_eq!(lab.date(&own).unwrap(), 1_760_000_000);
        assert!(lab.publish_at(&image, 1_770_000_000).unwrap().unchanged);
        assert_eq!(lab.date(&own).unwrap(), 1_770_000_000);
        let other = lab.date(&UpdateKey::derive("acme", "another root").unwrap().keyring()).unwrap_err().to_string();
        assert!(other.contains("no valid signature"), "{other}");
        // The signature does not match a changed list.
        let sums = lab.0.path().join("out/db").join(SUMS);
        fs::write(&sums, fs::read_to_string(&sums).unwrap() + "0  more\n").unwrap();
        assert!(lab.date(&own).is_err());
    }

    #[test]
    fn rejects_images_that_nodes_cannot_change_to() {
        let lab = UpdateFolder(tempfile::tempdir().unwrap());
        let postgres = |major: u8| json!({ "packages": [{ "name": format!("postgresql-{major}"), "version": "1" }] });
        lab.publish(&lab.image("2", &postgres(17))).unwrap();
        let refused = |image: &BuiltImage, message: &str| {
            let e = lab.publish(image).unwrap_err().to_string();
            assert!(e.contains(message), "{e}");
        };
        refused(&lab.image("1", &postgres(17)), "raise `version`");
        refused(&lab.image("2", &json!({ "roothash": "f".repeat(64) })), "raise `version`");
        // `bakehouse plan` names the same obstacle.
        let obstacles = compare(&lab.image("1", &postgres(17)), &lab.0.path().join("out")).unwrap().obstacles;
        assert!(obstacles.iter().any(|o| o.contains("version 2 is published already")), "{obstacles:?}");
        refused(&lab.image("3", &postgres(18)), "PostgreSQL 17 to 18");
        let mut restored = postgres(17);
        restored["restore"] = json!("latest");
        refused(&lab.image("3", &restored), "[backup] restore");
        let mut larger = postgres(17);
        larger["sizes"] = json!({ "root_slot": 2 << 20, "root": 8192, "uki": 4096 });
        refused(&lab.image("3", &larger), "root partitions");
        assert_eq!(lab.files().len(), 5 + 3, "a refused image left files");

        // Manifests of earlier versions do not list hubs and voters.
        let with = |field: &str, names: &[&str]| {
            let mut manifest = postgres(17);
            manifest[field] = json!(names);
            manifest
        };
        for (field, message) in [("hubs", "the hubs would change"), ("voters", "the etcd voters would change")] {
            let folder = UpdateFolder(tempfile::tempdir().unwrap());
            folder.publish(&folder.image("1", &with(field, &["hub-1", "hub-2", "hub-3"]))).unwrap();
            let e = folder.publish(&folder.image("2", &with(field, &["hub-1"]))).unwrap_err().to_string();
            assert!(e.contains(message), "{e}");
            assert!(!folder.publish(&folder.image("2", &postgres(17))).unwrap().unchanged);
        }

        // A migration permits the change.
        let mut converted = postgres(18);
        converted["migrations"] = json!(["postgresql-16-to-18"]);
        refused(&lab.image("3", &converted), "write the migration `postgresql-17-to-18`");
        converted["migrations"] = json!(["postgresql-17-to-18"]);
        let image = lab.image("3", &converted);
        let comparison = compare(&image, &lab.0.path().join("out")).unwrap();
        assert_eq!(comparison.one_way, ["the migration `postgresql-17-to-18` converts the nodes' data"]);
        assert!(!lab.publish(&image).unwrap().unchanged);
    }
}
