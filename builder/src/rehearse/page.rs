//! Pages of outcomes for docs: the last outcome of each scenario, with its date, revision and machine. A full rehearsal
//! of emulated machines takes hours, so a later rehearsal replaces only the rows of its scenarios.

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

/// Number of columns: those of an outcome, and date, revision and machine.
const COLUMNS: usize = HEAD.len() + 3;

/// Row of a page.
type PageRow = [String; COLUMNS];

/// A page of outcomes.
pub(crate) struct Page<'a> {
    path: &'a Path,
    intro: String,
    /// Date, revision and machine of this rehearsal.
    origin: [String; 3],
    /// Rows of earlier rehearsals.
    earlier: Vec<PageRow>,
}

impl<'a> Page<'a> {
    /// Opens the page at `path`, or starts a new one.
    ///
    /// # Errors
    /// If the host's processors cannot be read, or the file is not a page of this fleet on this kind of machines.
    pub(crate) fn open(project: &Project, path: &'a Path, machines: Machines, revision: Option<&str>) -> Result<Self> {
        let cpuinfo = Path::new("/proc/cpuinfo");
        let cpus = fs::read_to_string(cpuinfo).map_err(Error::io("read", cpuinfo))?;
        let model = cpus.lines().find_map(|l| l.strip_prefix("model name")?.split_once(": ")).map_or("?", |(_, m)| m);
        let count = cpus.lines().filter(|l| l.starts_with("processor")).count();
        let date = Command::new("date").args(["-u", "+%F"]).output().map_err(Error::io("run", "date"))?.stdout;
        let title = title(&project.topology.name, machines);
        let text =
            if path.exists() { fs::read_to_string(path).map_err(Error::io("read", path))? } else { String::new() };
        if !text.is_empty() && !is_page(&text, &title) {
            return fail(format!(
                "cannot write {}: the file is not a page with the title `{title}`\n  help: name another file",
                path.display()
            ));
        }
        Ok(Self {
            path,
            earlier: rows(&text),
            intro: format!("{title}\n\n{}", intro(machines)),
            origin: [
                String::from_utf8_lossy(&date).trim().to_owned(),
                revision.unwrap_or("unknown").to_owned(),
                format!("{count} × {model}"),
            ],
        })
    }

    /// Writes the page. The outcomes replace the rows of the same scenarios.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub(crate) fn write(&self, outcomes: &[Outcome]) -> Result<()> {
        write_atomic(self.path, self.text(outcomes).as_bytes())
    }

    fn text(&self, outcomes: &[Outcome]) -> String {
        let now = outcomes.iter().map(|o| {
            let mut cells = row(o).into_iter().chain(self.origin.clone());
            std::array::from_fn(|_| cells.next().unwrap_or_default())
        });
        let old = self.earlier.iter().filter(|r| !outcomes.iter().any(|o| o.scenario == r[0])).cloned();
        let mut all: Vec<PageRow> = old.chain(now).collect();
        all.sort_by_key(|r| SCENARIOS.iter().position(|s| s.name == r[0]));
        let short: Vec<TableRow> = all.iter().map(|r| std::array::from_fn(|i| r[i].clone())).collect();
        with_summary(format!("{}{}", self.intro, lay_out(&head(), &all)), &short)
    }
}

/// Returns the page's title. It names the fleet and the kind of machines, because their outcomes must not mix.
fn title(fleet: &str, machines: Machines) -> String {
    let kind = match machines {
        Machines::Kvm => "virtual machines",
        Machines::Containers => "containers",
        Machines::Emulated => "emulated machines",
    };
    format!("# Rehearsal of `{fleet}` in {kind}")
}

/// Returns the page's text between the title and the table.
fn intro(machines: Machines) -> String {
    let factor = machines.factor();
    let speed = match machines {
        Machines::Kvm => "The machines use KVM. The promises apply unchanged.".to_owned(),
        Machines::Containers => {
            "The images' services run in containers (`bakehouse up --containers`) at the host's speed and on its \
             kernel. WireGuard\nand the watchdog are programs. The promises apply unchanged."
                .to_owned()
        }
        Machines::Emulated => format!(
            "QEMU emulates the processors (no KVM), so every timeout of failure detection is {factor} times as long\n\
             (`machine.patience`), and so are the promises."
        ),
    };
    let errors = 0.1 * f64::from(factor);
    format!(
        "`bakehouse rehearse` wrote this page. A later rehearsal replaces the rows of its scenarios.\n\
         {speed}\n\n\
         - **VIP, writes, HTTP**: the longest time without a success after the fault, in seconds. For `upgrade`, \
         *writes* is\n  the sum of all pauses of more than {factor} s.\n\
         - **errors**: failed requests to Odoo, of all requests. For `upgrade`, at most {errors:.1} % may fail. Each \
         dropped\n  connection counts as one error, whatever the response rate.\n\
         - **lost**: acknowledged writes that were missing afterwards, of all acknowledged writes.\n\
         - **alert**: seconds until people got an alert. If the fault hit the only monitor, the time until the dead \
         man's\n  switch had not called for 90 s.\n\n"
    )
}

/// Returns the names of the columns.
fn head() -> [&'static str; COLUMNS] {
    let mut head = HEAD.iter().copied().chain(["date", "revision", "machine"]);
    std::array::from_fn(|_| head.next().unwrap_or_default())
}

/// Returns whether a text is a page with this title and the columns of [`head`].
fn is_page(text: &str, title: &str) -> bool {
    text.lines().next() == Some(title) && text.lines().filter_map(cells).any(|row| row == head())
}

/// Returns the scenarios' rows of a page.
fn rows(text: &str) -> Vec<PageRow> {
    let is_scenario = |row: &PageRow| SCENARIOS.iter().any(|s| s.name == row[0]);
    text.lines().filter_map(cells).filter(is_scenario).collect()
}

/// Returns the cells of a Markdown table's row, if it has as many columns as a page.
fn cells(line: &str) -> Option<PageRow> {
    let inner = line.strip_prefix('|')?.strip_suffix('|')?;
    let cells: Vec<String> = inner.split('|').map(|cell| cell.trim().to_owned()).collect();
    cells.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rehearse::table::tests::outcome;

    fn page(earlier: &str, origin: [&str; 3], outcomes: &[Outcome]) -> String {
        let origin = origin.map(str::to_owned);
        Page { path: Path::new("page.md"), intro: "intro\n\n".into(), origin, earlier: rows(earlier) }.text(outcomes)
    }

    #[test]
    fn a_repeated_scenario_replaces_its_rows() {
        let before = [outcome("power", 9.0, &[]), outcome("hub", 8.0, &[])];
        let one = page("", ["2026-11-26", "aa", "4 × A"], &before);
        let after = [outcome("hub", 1.0, &[]), outcome("hub", 2.0, &["VIP: 2.0 s", "not healthy:\n| hub-1 | off |"])];
        let two = page(&one, ["2026-11-27", "bb", "2 × B"], &after);
        let lines: Vec<&str> = two.lines().filter(|l| l.contains("| 2026-11-")).collect();
        let [first, second, power] = lines[..] else { panic!("{two}") };
        assert!(first.starts_with("| hub ") && first.contains("| 1.0 "), "{first}");
        assert!(first.ends_with("| 2026-11-27 | bb       | 2 × B   |"), "{first}");
        assert!(second.contains("BROKEN: VIP: 2.0 s; not healthy: / hub-1 / off /"), "{second}");
        assert!(power.contains("| 9.0 ") && power.ends_with("| 2026-11-26 | aa       | 4 × A   |"), "{power}");
        assert!(two.contains("| hub      | 2    | 1.0 / 2.0 / 2.0 |"), "{two}");
        // A page that is read and written again does not change.
        assert_eq!(page(&two, ["2026-11-27", "bb", "2 × B"], &after), two);
    }

    #[test]
    fn continues_its_own_page_and_rejects_other_files() {
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let published = sources.join("docs/rehearsal-core.md");
        let dir = tempfile::tempdir().unwrap();
        fs::copy(sources.join("tests/fleets/core.toml"), dir.path().join("fleet.toml")).unwrap();
        let project = Project::load(dir.path()).unwrap();
        let page = Page::open(&project, &published, Machines::Emulated, None).unwrap();
        assert_eq!(page.text(&[]), fs::read_to_string(&published).unwrap());
        let rejects = |path: &Path, machines: Machines| {
            let e = Page::open(&project, path, machines, None).map(drop).unwrap_err().to_string();
            assert!(e.contains("the file is not a page"), "{e}");
        };
        rejects(&published, Machines::Containers);
        let notes = dir.path().join("notes.md");
        fs::write(&notes, format!("{}\n\nmy notes\n", title("core", Machines::Kvm))).unwrap();
        rejects(&notes, Machines::Kvm);
        assert!(Page::open(&project, &dir.path().join("new.md"), Machines::Kvm, None).unwrap().earlier.is_empty());
    }
}
