//! The ids of a sandbox: which range of the host's ids stands behind 0..65535 inside.
//!
//! Inside the sandbox maintainer scripts are root. Many files of the kernel (/proc/sys, for
//! example) are guarded by the *global* user id alone, so the id behind the sandbox's root must
//! never be the host's 0.

use std::fs;

use nix::unistd::{Gid, Uid, User};

use crate::error::{Error, Result, fail};

/// Ids of a sandbox, as of a Debian system.
pub(super) const IDS: u32 = 65_536;

/// Where the search for a free range begins when /etc/subuid gives root none: systemd's table of
/// ids (<https://systemd.io/UIDS-GIDS>) leaves 0x70000000..0x7FFDFFFF to no one.
const FIRST: u32 = 0x7000_0000;
const END: u32 = 0x7FFE_0000;

/// Ids of the host behind a sandbox's 0..65535.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum IdMap {
    /// Consecutive ids from these on; the builder is root and writes the maps.
    Range { uid: u32, gid: u32 },
    /// The builder's own user for 0, and its subordinate range for the others (`newuidmap`).
    Own,
}

impl IdMap {
    /// Chooses the ids for sandboxes of this process.
    ///
    /// # Errors
    /// The builder is root of a container that has too few ids.
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

    /// The argument that tells the worker which ids it is to take.
    pub(super) fn argument(self) -> String {
        match self {
            Self::Range { uid, gid } => format!("{uid}:{gid}"),
            Self::Own => "own".to_owned(),
        }
    }

    /// Reads what [`IdMap::argument`] wrote.
    pub(super) fn from_argument(text: &str) -> Option<Self> {
        if text == "own" {
            return Some(Self::Own);
        }
        let (uid, gid) = text.split_once(':')?;
        Some(Self::Range { uid: uid.parse().ok()?, gid: gid.parse().ok()? })
    }

    /// Writes the maps of the worker's user namespace.
    ///
    /// # Errors
    /// The kernel or `newuidmap` refuses, or /etc/subuid has no range for the user.
    pub(super) fn write(self, pid: u32) -> Result<()> {
        let Self::Range { uid, gid } = self else { return write_own(pid) };
        for (map, first) in [("uid_map", uid), ("gid_map", gid)] {
            let path = format!("/proc/{pid}/{map}");
            fs::write(&path, format!("0 {first} {IDS}\n")).map_err(Error::io("write", path))?;
        }
        Ok(())
    }
}

fn write_own(pid: u32) -> Result<()> {
    let user = User::from_uid(Uid::current()).ok().flatten().map(|u| u.name).unwrap_or_default();
    let tools =
        [("newuidmap", "/etc/subuid", Uid::current().as_raw()), ("newgidmap", "/etc/subgid", Gid::current().as_raw())];
    for (tool, file, own) in tools {
        let ranges = fs::read_to_string(file).unwrap_or_default();
        let Some(first) = subordinate_range(&ranges, &user, Uid::current().as_raw(), IDS - 1) else {
            return fail(format!(
                "{file} gives `{user}` no range of {IDS} ids; as root: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}"
            ));
        };
        let args = [pid, 0, own, 1, 1, first, IDS - 1].map(|n| n.to_string());
        let done = std::process::Command::new(tool).args(args).output();
        match done {
            Ok(o) if o.status.success() => {}
            Ok(o) => return fail(format!("{tool}: {}", String::from_utf8_lossy(&o.stderr).trim_end())),
            Err(e) => return fail(format!("cannot run {tool}: {e}; install uidmap (`make deps`)")),
        }
    }
    Ok(())
}

/// The first id of root's sandbox: root's own range in /etc/subuid, else the first range from
/// [`FIRST`] on that no line of the file overlaps. Where the builder is root of a container that
/// has no such ids, the container's own 0..65535, whose 0 is not the host's.
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
        "cannot give the sandbox {IDS} ids that are not the host's own: this container's root has too few; run \
         bakehouse on the host, or as an ordinary user with a range in /etc/subuid"
    ))
}

/// The id outside for an id of a user namespace, by its uid_map.
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

/// Lines of /etc/subuid: name or id, first, count.
fn ranges(text: &str) -> impl Iterator<Item = (&str, u32, u32)> {
    text.lines().filter_map(|line| {
        let [name, first, count] = line.split(':').collect::<Vec<_>>()[..] else { return None };
        Some((name, first.trim().parse().ok()?, count.trim().parse().ok()?))
    })
}

/// First id of a range in /etc/subuid that has `least` ids.
fn subordinate_range(text: &str, user: &str, uid: u32, least: u32) -> Option<u32> {
    let id = uid.to_string();
    ranges(text).find(|(name, _, count)| (*name == user || *name == id) && *count >= least).map(|(_, first, _)| first)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: &str = "         0          0 4294967295\n";

    #[test]
    fn subordinate_ranges() {
        let text = "a:100000:65536\nb:200000:10\n1003:300000:65536\n";
        let range = |user, uid| subordinate_range(text, user, uid, IDS - 1);
        assert_eq!(range("a", 1001), Some(100_000));
        assert_eq!(range("b", 1002), None);
        assert_eq!(range("c", 1003), Some(300_000));
    }

    #[test]
    fn root_gets_a_range_that_is_its_own() {
        assert_eq!(choose_range("", WHOLE).unwrap(), FIRST);
        assert_eq!(choose_range("a:100000:65536\nroot:200000:65536\n", WHOLE).unwrap(), 200_000);
        // Too small, or another user's: the next one that is free.
        assert_eq!(choose_range("root:200000:1000\n", WHOLE).unwrap(), FIRST);
        let overlapping = format!("a:{}:70000\n", FIRST + 65_000);
        assert_eq!(choose_range(&overlapping, WHOLE).unwrap(), FIRST + 3 * IDS);
    }

    #[test]
    fn root_of_a_container_uses_the_ids_it_has() {
        assert_eq!(choose_range("", "0 100000 65536\n").unwrap(), 0);
        assert_eq!(choose_range("root:1000:65536\n", "0 100000 200000\n").unwrap(), 1000);
        // Identity of the host's ids, and too few of them.
        assert!(choose_range("", "0 0 65536\n").is_err());
        assert!(choose_range("", "0 1000 1\n").is_err());
    }

    #[test]
    fn the_worker_reads_what_the_builder_writes() {
        for map in [IdMap::Own, IdMap::Range { uid: 1, gid: 2 }] {
            assert_eq!(IdMap::from_argument(&map.argument()), Some(map));
        }
        assert_eq!(IdMap::from_argument("root"), None);
    }
}
