//! The page for docs: each scenario's last outcome, and when, at which revision and where it was seen. All of
//! them take hours where processors are emulated, so a page is made in as many parts as it takes.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::machines::Machines;
use super::outcome::Outcome;
use super::scenario::SCENARIOS;
use super::table::{HEAD, TableRow, lay_out, row, with_summary};
use crate::error::{Error, Result, fail};
use crate::project::Project;
use crate::util::fs::write_atomic;

const MORE: usize = HEAD.len() + 3;

/// A page that is being made.
pub struct Page<'a> {
    path: &'a Path,
    intro: String,
    /// When, at which revision, and on which machine.
    made: [String; 3],
    /// What other rehearsals of this fleet left there.
    earlier: Vec<[String; MORE]>,
}

impl<'a> Page<'a> {
    /// Of a fleet whose machines are these.
    ///
    /// # Errors
    /// The host can't be described, or the file is not such a page.
    pub fn open(project: &Project, path: &'a Path, machines: Machines, revision: Option<&str>) -> Result<Self> {
        let cpuinfo = Path::new("/proc/cpuinfo");
        let cpus = fs::read_to_string(cpuinfo).map_err(Error::io("read", cpuinfo))?;
        let model = cpus.lines().find_map(|l| l.strip_prefix("model name")?.split_once(": ")).map_or("?", |(_, m)| m);
        let count = cpus.lines().filter(|l| l.starts_with("processor")).count();
        let date = Command::new("date").args(["-u", "+%F"]).output().map_err(Error::io("run", "date"))?.stdout;
        let factor = machines.factor();
        let speed = match machines {
            Machines::Kvm => "virtual machines with KVM; promises as they are".to_owned(),
            Machines::Containers => "the images' own services in containers (`bakehouse up --containers`), as fast as \
                 the host is, on its kernel, with WireGuard and the watchdog as programs; promises as they are"
                .to_owned(),
            Machines::Emulated => format!(
                "processors emulated by QEMU (no KVM): every time-out of failure detection is {factor} times as long \
                 there (`machine.patience`), and so is what is promised"
            ),
        };
        let intro = format!(
            "# Rehearsal of `{}`\n\nMade by `bakehouse rehearse`; {speed}. Seconds are the clients' longest silence after \
             the fault; errors are of all of Odoo's answers; \"lost\" counts acknowledged writes that were not there \
             afterwards; \"alert\" is when people were told, or the monitor's own silence was noticed (90 s without a \
             call of the dead man's switch). Of an upgrade, writers' seconds are all silences of more than {factor} s \
             together, and {:.1} % of answers may be errors (who is cut off is one, however fast answers come).\n\n",
            project.topology.name,
            0.1 * f64::from(factor),
        );
        let there =
            if path.exists() { fs::read_to_string(path).map_err(Error::io("read", path))? } else { String::new() };
        let Some(table) = there.strip_prefix(&intro).or(there.is_empty().then_some("")) else {
            return fail(format!(
                "{} is no page of this fleet at this speed, and would be written over; name another file",
                path.display()
            ));
        };
        Ok(Self {
            path,
            earlier: rows(table),
            intro,
            made: [
                String::from_utf8_lossy(&date).trim().to_owned(),
                revision.unwrap_or("unknown").to_owned(),
                format!("{count} × {model}"),
            ],
        })
    }

    /// Writes what was seen in the place of what was seen of the same scenarios before.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn write(&self, outcomes: &[Outcome]) -> Result<()> {
        write_atomic(self.path, self.text(outcomes).as_bytes())
    }

    fn text(&self, outcomes: &[Outcome]) -> String {
        let now = outcomes.iter().map(|o| {
            let mut cells = row(o).into_iter().chain(self.made.clone());
            std::array::from_fn(|_| cells.next().unwrap_or_default())
        });
        let old = self.earlier.iter().filter(|r| !outcomes.iter().any(|o| o.scenario == r[0])).cloned();
        let mut all: Vec<[String; MORE]> = old.chain(now).collect();
        all.sort_by_key(|r| SCENARIOS.iter().position(|s| s.name == r[0]));
        let mut head = HEAD.iter().copied().chain(["date", "revision", "machine"]);
        let head: [&str; MORE] = std::array::from_fn(|_| head.next().unwrap_or_default());
        let short: Vec<TableRow> = all.iter().map(|r| std::array::from_fn(|i| r[i].clone())).collect();
        with_summary(format!("{}{}", self.intro, lay_out(&head, &all)), &short)
    }
}

/// Scenarios' lines of a page.
fn rows(text: &str) -> Vec<[String; MORE]> {
    let cells = |line: &str| -> Option<[String; MORE]> {
        let inner = line.strip_prefix('|')?.strip_suffix('|')?;
        let cells: Vec<String> = inner.split('|').map(|cell| cell.trim().to_owned()).collect();
        cells.try_into().ok()
    };
    let known = |row: &[String; MORE]| SCENARIOS.iter().any(|s| s.name == row[0]);
    text.lines().filter_map(cells).filter(known).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rehearse::table::tests::outcome;

    fn page(earlier: &str, made: [&str; 3], outcomes: &[Outcome]) -> String {
        let made = made.map(str::to_owned);
        Page { path: Path::new("page.md"), intro: "intro\n\n".into(), made, earlier: rows(earlier) }.text(outcomes)
    }

    #[test]
    fn what_is_played_again_takes_the_place_of_what_was_seen_before() {
        let before = [outcome("power", 9.0, &[]), outcome("hub", 8.0, &[])];
        let one = page("", ["2026-11-26", "aa", "4 × A"], &before);
        let after = [outcome("hub", 1.0, &[]), outcome("hub", 2.0, &["VIP: 2.0 s", "not whole:\n| hub-1 | off |"])];
        let two = page(&one, ["2026-11-27", "bb", "2 × B"], &after);
        let lines: Vec<&str> = two.lines().filter(|l| l.contains("| 2026-11-")).collect();
        let [first, second, power] = lines[..] else { panic!("{two}") };
        assert!(first.starts_with("| hub ") && first.contains("| 1.0 "), "{first}");
        assert!(first.ends_with("| 2026-11-27 | bb       | 2 × B   |"), "{first}");
        assert!(second.contains("BROKEN: VIP: 2.0 s; not whole: / hub-1 / off /"), "{second}");
        assert!(power.contains("| 9.0 ") && power.ends_with("| 2026-11-26 | aa       | 4 × A   |"), "{power}");
        assert!(two.contains("| hub      | 2    | 1.0 / 2.0 / 2.0 |"), "{two}");
        // It is the same however often it is read.
        assert_eq!(page(&two, ["2026-11-27", "bb", "2 × B"], &after), two);
    }

    /// The page that is kept is one that the next rehearsal goes on with; another file is not written over.
    #[test]
    fn a_page_is_gone_on_with_and_nothing_else_is() {
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let kept = sources.join("docs/rehearsal-core.md");
        let dir = tempfile::tempdir().unwrap();
        fs::copy(sources.join("tests/fleets/core.toml"), dir.path().join("fleet.toml")).unwrap();
        let project = Project::load(dir.path()).unwrap();
        let page = Page::open(&project, &kept, Machines::Emulated, None).unwrap();
        assert_eq!(page.text(&[]), fs::read_to_string(&kept).unwrap());
        let e = Page::open(&project, &kept, Machines::Containers, None).map(drop).unwrap_err().to_string();
        assert!(e.contains("rehearsal-core.md is no page of this fleet"), "{e}");
        assert!(Page::open(&project, &dir.path().join("new.md"), Machines::Kvm, None).unwrap().earlier.is_empty());
    }
}
