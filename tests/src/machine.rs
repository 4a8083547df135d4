//! A virtual machine under test: what it said is shown when a test fails, and it is switched
//! off when the test ends.

use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use builder::project::Project;
use builder::vm::{Described, Done, Netboot, Start, Vm, start_of};

use crate::Lab;

/// A boot under emulation on two busy cores takes about a minute, and making Odoo's database
/// ten; more is a hang.
const PATIENCE: Duration = Duration::from_secs(1500);

pub struct Machine {
    vm: Vm,
    project: Project,
    image: Option<PathBuf>,
    tpm: Option<PathBuf>,
    /// It has as many processors as if it ran alone, whatever the fleet.
    alone: bool,
    bios: bool,
}

impl Machine {
    /// A node of the lab's fleet, off, with a blank disk.
    pub fn of(lab: &Lab, node: &str) -> Self {
        let project = Project::load(&lab.dir).expect("a valid fleet.toml");
        let vm = Vm::of(&project, node).expect("the node is there");
        Self { vm, project, image: None, tpm: None, alone: false, bios: false }
    }

    /// The same where few of the fleet's machines run at once.
    pub fn alone(lab: &Lab, node: &str) -> Self {
        let mut machine = Self::of(lab, node);
        machine.alone = true;
        machine
    }

    fn described(&self) -> Described {
        let described = start_of(&self.project, &self.vm.node).expect("the node is there");
        if self.alone { described.of_machines(1) } else { described }
    }

    /// Boots from another image than the one that was built.
    #[must_use]
    pub fn with_image(mut self, image: &Path) -> Self {
        self.image = Some(image.to_owned());
        self
    }

    /// Has a legacy BIOS.
    #[must_use]
    pub fn with_bios(mut self) -> Self {
        self.bios = true;
        self
    }

    /// Has the TPM that remembers in this folder; none without a folder.
    pub fn has_tpm(&mut self, memory: Option<&Path>) {
        self.tpm = memory.map(Path::to_owned);
    }

    pub fn start(&self) {
        self.start_as(&self.described());
    }

    /// Starts it with a ticket that was made elsewhere.
    pub fn start_with(&self, ticket: &str) {
        let described = self.described();
        self.start_as(&described.with_ticket(ticket).expect("a ticket"));
    }

    /// Starts it with a ticket; it loses its power as soon as there is this file, and whatever was not
    /// on the disk by then.
    pub fn start_cut_at(&self, ticket: &str, file: &str) {
        let described = self.described().with_ticket(ticket).expect("a ticket");
        let mut start = described.as_start();
        let unit = format!(
            "[Unit]\nRequiresMountsFor=/var\n[Service]\nExecStart=/usr/bin/bash -c 'exec 5<> <(:); \
             until [ -e {file} ]; do read -rt 0.01 -u 5; done; echo o >/proc/sysrq-trigger'\n"
        );
        let wanted = "[Unit]\nWants=cut.service\nAfter=cut.service\n";
        start.credentials.push(("systemd.extra-unit.cut.service".to_owned(), unit.into_bytes()));
        start.credentials.push(("systemd.unit-dropin.firstboot.service~cut".to_owned(), wanted.into()));
        self.vm.start(&start).unwrap_or_else(|e| panic!("{e}"));
        let until = Instant::now() + PATIENCE;
        while self.vm.is_running() {
            assert!(Instant::now() < until, "{file} never was there:\n{}", self.console());
            sleep(Duration::from_millis(200));
        }
    }

    /// Starts it with a drop-in for one of its units.
    pub fn start_changed(&self, unit: &str, text: &str) {
        let described = self.described();
        let mut start = described.as_start();
        start.credentials.push((format!("systemd.unit-dropin.{unit}~test"), text.into()));
        self.vm.start(&start).unwrap_or_else(|e| panic!("{e}"));
    }

    /// Starts it from a disk that was flashed, with what is on it and nothing else.
    pub fn start_flashed(&mut self, disk: &Path) {
        self.image = Some(disk.to_owned());
        self.start_as(&self.described().without_ticket());
    }

    /// Starts it from a disk and a second one with user data, and nothing else.
    pub fn start_seeded(&mut self, disk: &Path, seed: &Path) {
        self.image = Some(disk.to_owned());
        let described = self.described().without_ticket();
        let start = described.as_start();
        self.vm
            .start(&Start { image: disk, seed: Some(seed), bios: self.bios, ..start })
            .unwrap_or_else(|e| panic!("{e}"));
    }

    /// Starts it bare, with nothing of its own, but for a hub's address, which is where others look
    /// for it: what it is to be comes from the wire.
    pub fn start_bare(&mut self, lab: &Lab) {
        self.start_bare_by(lab, Netboot::Pxe);
    }

    /// As `start_bare`, by what its firmware shall ask.
    pub fn start_bare_by(&mut self, lab: &Lab, netboot: Netboot) {
        let blank = lab.dir.join("blank");
        std::fs::File::create(&blank).and_then(|f| f.set_len(1 << 20)).expect("the lab is writable");
        self.image = Some(blank.clone());
        let described = self.described().without_ticket();
        // The disk is what was made of it, whatever the blank's time. There is memory for an image.
        let start = described.as_start();
        let memory = start.memory + (1 << 30);
        let mut start = Start { image: &blank, netboot: Some(netboot), keep: true, memory, ..start };
        if self.project.topology.node(&self.vm.node).is_none_or(|node| node.hub == 0) {
            start.credentials.clear();
        }
        self.vm.start(&start).unwrap_or_else(|e| panic!("{e}"));
    }

    /// Multicast group and port of the wire that it is on.
    #[must_use]
    pub fn wire(&self) -> String {
        self.described().as_start().wire.group
    }

    fn start_as(&self, described: &Described) {
        let start = described.as_start();
        let image = self.image.as_deref().unwrap_or(start.image);
        self.vm
            .start(&Start { image, tpm: self.tpm.as_deref(), bios: self.bios, ..start })
            .unwrap_or_else(|e| panic!("{e}"));
    }

    /// Gives it a blank disk.
    pub fn wipe(&self) {
        self.vm.wipe().expect("it had a disk");
    }

    /// Waits until one of the texts is on the console; returns which.
    pub fn wait_for<'a>(&self, texts: &[&'a str]) -> &'a str {
        let found = self.vm.wait_console(PATIENCE, |console| texts.iter().copied().find(|t| console.contains(t)));
        found.unwrap_or_else(|e| panic!("{e}"))
    }

    /// Waits until what is on the console is what is waited for.
    pub fn wait_until(&self, what: &str, is: impl Fn(&str) -> bool) {
        let found = self.vm.wait_console(PATIENCE, |console| is(console).then_some(()));
        found.unwrap_or_else(|e| panic!("{what}: {e}"));
    }

    pub fn console(&self) -> String {
        self.vm.console()
    }

    /// Runs a command inside, whatever its status.
    pub fn exec(&self, command: &str) -> Done {
        self.vm.exec(command).unwrap_or_else(|e| panic!("{e}\nconsole:\n{}", self.console()))
    }

    /// Runs a command that must succeed; its output without the last line's end.
    #[track_caller]
    pub fn ok(&self, command: &str) -> String {
        let done = self.exec(command);
        if done.status != 0 {
            let journal = self.exec("journalctl -b --no-pager -n 150").output;
            panic!("`{command}` ended with {}:\n{}\njournal:\n{journal}", done.status, done.output);
        }
        done.output.trim_end().to_owned()
    }

    /// How much a unit has to lose, by systemd's own measure: 0 is nothing, 10 is everything.
    #[track_caller]
    pub fn exposure(&self, unit: &str) -> f64 {
        let said = self.ok(&format!("systemd-analyze security --no-pager {unit} | tail -1"));
        let level = said.split("service:").nth(1).and_then(|s| s.split_whitespace().next()?.parse().ok());
        level.unwrap_or_else(|| panic!("systemd-analyze says of {unit}: {said}"))
    }

    pub fn shut_down(&self) {
        self.vm.power_down().unwrap_or_else(|e| panic!("{e}"));
    }

    pub fn cut_power(&self) {
        self.vm.cut_power().unwrap_or_else(|e| panic!("{e}"));
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.vm.cut_power();
    }
}
