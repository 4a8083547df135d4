//! Maps the ids 0..65535 of a sandbox to a range of the host's ids.
//!
//! Maintainer scripts run as the sandbox's root. The kernel protects many files, such as those in /proc/sys, only by
//! the *global* user id. The sandbox's root must therefore never map to the host's id 0.

use std::fs;

use nix::unistd::{Gid, Uid, User};

use crate::error::{Error, Result, fail};

/// Number of ids in a sandbox, the same as on a Debian system.
pub(super) const IDS: u32 = 65_536;

/// Start of the search for a free range if /etc/subuid has no range for root. systemd's
/// [table of ids](https://systemd.io/UIDS-GIDS) leaves 0x70000000..0x7FFDFFFF unused.
const FIRST: u32 = 0x7000_0000;
const END: u32 = 0x7FFE_0000;

/// The host's ids to which a sandbox's 0..65535 map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum IdMap {
    /// Consecutive ids from these on. The builder is root and writes the maps.
    Range { uid: u32, gid: u32 },
    /// The builder's user for 0, and the user's subordinate range for the others (`newuidmap`).
    Own,
}

impl IdMap {
    /// Selects the ids for sandboxes of this process.
    ///
    /// # Errors
    /// If the builder is root of a container that has too few ids.
    pub(super) fn choose() -> Result<Self> {
        if !Uid::effective().is_root() {
            return Ok(Self::Own);
        }
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        Ok(Self::Range {
            uid: choose_range(&read("/etc/subuid"), &read("/proc/self/uid_map"))?,
            gid: choose_range(&read("/etc/subgid"), &read("/proc/self/gid_map"))?,
        })
    }

    /// Returns the worker's argument for these ids.
    pub(super) fn argument(self) -> String {
        match self {
            Self::Range { uid, gid } => format!("{uid}:{gid}"),
            Self::Own => "own".to_owned(),
        }
    }

    /// Parses the argument that [`IdMap::argument`] returns.
    pub(super) fn from_argument(text: &str) -> Option<Self> {
        if text == "own" {
            return Some(Self::Own);
        }
        let (uid, gid) = text.split_once(':')?;
        Some(Self::Range { uid: uid.parse().ok()?, gid: gid.parse().ok()? })
    }

    /// Checks that the maps can be written, without writing them.
    ///
    /// # Errors
    /// If /etc/subuid or /etc/subgid has no range for the user, or a program that writes a map is missing.
    pub(super) fn check(self) -> Result<()> {
        match self {
            Self::Own => own_ranges().map(drop),
            Self::Range { .. } => Ok(()),
        }
    }

    /// Writes the maps of the worker's user namespace.
    ///
    /// # Errors
    /// If a map cannot be written, `newuidmap` fails, or /etc/subuid has no range for the user.
    pub(super) fn write(self, pid: u32) -> Result<()> {
        let Self::Range { uid, gid } = self else { return write_own(pid) };
        for (map, first) in [("uid_map", uid), ("gid_map", gid)] {
            let path = format!("/proc/{pid}/{map}");
            fs::write(&path, format!("0 {first} {IDS}\n")).map_err(Error::io("write", path))?;
        }
        Ok(())
    }
}

/// A program that writes a map of the user's own ids, and the first of the subordinate ids.
struct OwnRange {
    tool: &'static str,
    own: u32,
    first: u32,
}

/// Returns the ranges of this user for uid_map and gid_map.
fn own_ranges() -> Result<[OwnRange; 2]> {
    let user = User::from_uid(Uid::current()).ok().flatten().map(|u| u.name).unwrap_or_default();
    let range = |tool: &'static str, file: &str, own: u32| {
        let ranges = fs::read_to_string(file).unwrap_or_default();
        let Some(first) = subordinate_range(&ranges, &user, Uid::current().as_raw(), IDS - 1) else {
            return fail(format!(
                "{file} has no range of {IDS} ids for `{user}`\n  help: run as root: usermod --add-subuids 100000-165535 \
                 --add-subgids 100000-165535 {user}"
            ));
        };
        let path = std::env::var_os("PATH").unwrap_or_default();
        if !std::env::split_paths(&path).any(|dir| dir.join(tool).exists()) {
            return fail(format!("cannot find {tool}\n  help: install uidmap (`make deps`)"));
        }
        Ok(OwnRange { tool, own, first })
    };
    Ok([
        range("newuidmap", "/etc/subuid", Uid::current().as_raw())?,
        range("newgidmap", "/etc/subgid", Gid::current().as_raw())?,
    ])
}

fn write_own(pid: u32) -> Result<()> {
    for OwnRange { tool, own, first } in own_ranges()? {
        let args = [pid, 0, own, 1, 1, first, IDS - 1].map(|n| n.to_string());
        let output = std::process::Command::new(tool).args(args).output();
        match output {
            Ok(o) if o.status.success() => {}
            Ok(o) => return fail(format!("{tool}: {}", String::from_utf8_lossy(&o.stderr).trim_end())),
            Err(e) => return Err(Error::cannot(format!("run {tool}"))(e)),
        }
    }
    Ok(())
}

/// Returns the first id for a builder that runs as root: root's range in /etc/subuid, else the first range from
/// [`FIRST`] on that no line of the file overlaps. In a container without these ids, it is the container's own range
/// 0..65535 if its 0 is not the host's 0.
fn choose_range(subordinate: &str, own_map: &str) -> Result<u32> {
    let has = |first: u32| outer_id(own_map, first).is_some() && outer_id(own_map, first + IDS - 1).is_some();
    if let Some(first) = subordinate_range(subordinate, "root", 0, IDS).filter(|first| has(*first)) {
        return Ok(first);
    }
    let taken: Vec<(u64, u64)> = ranges(subordinate).map(|(_, first, count)| (first.into(), count.into())).collect();
    let is_free = |first: u32| {
        let (first, end) = (u64::from(first), u64::from(first) + u64::from(IDS));
        taken.iter().all(|(other, count)| end <= *other || other + count <= first)
    };
    let free = (FIRST..END).step_by(IDS as usize).find(|first| is_free(*first));
    if let Some(first) = free.filter(|first| has(*first)) {
        return Ok(first);
    }
    if has(0) && outer_id(own_map, 0) != Some(0) {
        return Ok(0);
    }
    fail(format!(
        "cannot give the sandbox {IDS} ids that are not the host's own, because this container's root has too few; run \
         bakehouse on the host, or as an ordinary user with a range in /etc/subuid"
    ))
}

/// Returns the outer id of an id of a user namespace, by the namespace's uid_map.
fn outer_id(map: &str, id: u32) -> Option<u32> {
    map.lines().find_map(|line| {
        let [inside, outside, count] =
            line.split_whitespace().map(str::parse::<u32>).collect::<Result<Vec<_>, _>>().ok()?[..]
        else {
            return None;
        };
        let offset = id.checked_sub(inside).filter(|offset| *offset < count)?;
        outside.checked_add(offset)
    })
}

/// Parses /etc/subuid. Returns the name or id, the first id and the count of each line.
fn ranges(text: &str) -> impl Iterator<Item = (&str, u32, u32)> {
    text.lines().filter_map(|line| {
        let [name, first, count] = line.split(':').collect::<Vec<_>>()[..] else { return None };
        Some((name, first.trim().parse().ok()?, count.trim().parse().ok()?))
    })
}

/// Returns the first id of the user's range in /etc/subuid with at least `least` ids.
fn subordinate_range(text: &str, user: &str, uid: u32, least: u32) -> Option<u32> {
    let id = uid.to_string();
    ranges(text).find(|(name, _, count)| (*name == user || *name == id) && *count >= least).map(|(_, first, _)| first)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: &str = "         0          0 4294967295\n";

    #[test]
    fn finds_subordinate_ranges() {
        let text = "a:100000:65536\nb:200000:10\n1003:300000:65536\n";
        let range = |user, uid| subordinate_range(text, user, uid, IDS - 1);
        assert_eq!(range("a", 1001), Some(100_000));
        assert_eq!(range("b", 1002), None);
        assert_eq!(range("c", 1003), Some(300_000));
    }

    #[test]
    fn root_gets_its_own_range_of_subordinate_ids() {
        assert_eq!(choose_range("", WHOLE).unwrap(), FIRST);
        assert_eq!(choose_range("a:100000:65536\nroot:200000:65536\n", WHOLE).unwrap(), 200_000);
        // A range that is too small, or overlaps another user's, is skipped.
        assert_eq!(choose_range("root:200000:1000\n", WHOLE).unwrap(), FIRST);
        let overlapping = format!("a:{}:70000\n", FIRST + 65_000);
        assert_eq!(choose_range(&overlapping, WHOLE).unwrap(), FIRST + 3 * IDS);
    }

    #[test]
    fn root_of_a_container_uses_the_containers_ids() {
        assert_eq!(choose_range("", "0 100000 65536\n").unwrap(), 0);
        assert_eq!(choose_range("root:1000:65536\n", "0 100000 200000\n").unwrap(), 1000);
        // The host's own ids, and too few ids.
        assert!(choose_range("", "0 0 65536\n").is_err());
        assert!(choose_range("", "0 1000 1\n").is_err());
    }

    #[test]
    fn worker_parses_the_builders_argument() {
        for map in [IdMap::Own, IdMap::Range { uid: 1, gid: 2 }] {
            assert_eq!(IdMap::from_argument(&map.argument()), Some(map));
        }
        assert_eq!(IdMap::from_argument("root"), None);
    }
}
