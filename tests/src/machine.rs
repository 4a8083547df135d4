//! A virtual machine or container under test. A failing test prints its console or journal, and dropping it cuts its
//! power.

use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use builder::project::Project;
use builder::vm::{Described, Done, Netboot, Vm, VmOptions, start_of};

use crate::TestFleet;

/// Longest wait for a line on the console. A boot under emulation on two busy cores takes about 1 min, and creating
/// Odoo's database about 10 min.
const TIMEOUT: Duration = Duration::from_secs(1500);

/// A node as a virtual machine or a container. Dropping it switches the machine off.
pub struct Machine {
    vm: Vm,
    project: Project,
    image: Option<PathBuf>,
    tpm: Option<PathBuf>,
    /// Gives the machine the processors of a fleet with one machine.
    alone: bool,
    bios: bool,
}

impl Machine {
    /// Creates the machine of a node, switched off and with a blank disk.
    pub fn for_node(lab: &TestFleet, node: &str) -> Self {
        let project = Project::load(&lab.dir).expect("a valid fleet.toml");
        let vm = Vm::for_node(&project, node).expect("a node of the fleet");
        Self { vm, project, image: None, tpm: None, alone: false, bios: false }
    }

    /// Creates the machine of a node for a test that runs few of the fleet's machines at the same time.
    pub fn alone(lab: &TestFleet, node: &str) -> Self {
        let mut machine = Self::for_node(lab, node);
        machine.alone = true;
        machine
    }

    fn described(&self) -> Described {
        let described = start_of(&self.project, &self.vm.node).expect("a node of the fleet");
        if self.alone { described.of_machines(1) } else { described }
    }

    /// Replaces the node's built image by another one.
    #[must_use]
    pub fn with_image(mut self, image: &Path) -> Self {
        self.image = Some(image.to_owned());
        self
    }

    /// Gives the machine a legacy BIOS instead of UEFI.
    #[must_use]
    pub fn with_bios(mut self) -> Self {
        self.bios = true;
        self
    }

    /// Attaches a TPM that keeps its state in this folder, or removes the TPM.
    pub fn has_tpm(&mut self, memory: Option<&Path>) {
        self.tpm = memory.map(Path::to_owned);
    }

    /// Starts the machine as `bakehouse up` does, and returns before it is ready.
    pub fn start(&self) {
        self.start_as(&self.described());
    }

    /// Starts the machine with the given ticket.
    pub fn start_with(&self, ticket: &str) {
        let described = self.described();
        self.start_as(&described.with_ticket(ticket).expect("a ticket"));
    }

    /// Starts the machine with a ticket and cuts its power as soon as `file` exists. Writes that the kernel has not
    /// flushed to the disk by then are lost.
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
        self.vm.start(&start).unwrap_or_else(|e| panic!("{}", e.chain()));
        let until = Instant::now() + TIMEOUT;
        while self.vm.is_running() {
            assert!(Instant::now() < until, "{file} was not created:\n{}", self.console());
            sleep(Duration::from_millis(200));
        }
    }

    /// Starts the machine with a drop-in for one of its units.
    pub fn start_changed(&self, unit: &str, text: &str) {
        let described = self.described();
        let mut start = described.as_start();
        start.credentials.push((format!("systemd.unit-dropin.{unit}~test"), text.into()));
        self.vm.start(&start).unwrap_or_else(|e| panic!("{}", e.chain()));
    }

    /// Starts the machine from a flashed disk. The ticket comes from that disk only.
    pub fn start_flashed(&mut self, disk: &Path) {
        self.image = Some(disk.to_owned());
        self.start_as(&self.described().without_ticket());
    }

    /// Starts the machine from a disk and a second disk with user data. The ticket comes from the user data only.
    pub fn start_seeded(&mut self, disk: &Path, seed: &Path) {
        self.image = Some(disk.to_owned());
        let described = self.described().without_ticket();
        let start = described.as_start();
        self.vm
            .start(&VmOptions { image: disk, seed: Some(seed), bios: self.bios, ..start })
            .unwrap_or_else(|e| panic!("{}", e.chain()));
    }

    /// Starts the machine from the network by PXE, with a blank disk and without a ticket. A hub keeps its public
    /// address, which other nodes connect to.
    pub fn start_bare(&mut self, lab: &TestFleet) {
        self.start_bare_by(lab, Netboot::Pxe);
    }

    /// Like [`Self::start_bare`], with this network boot protocol.
    pub fn start_bare_by(&mut self, lab: &TestFleet, netboot: Netboot) {
        let blank = lab.dir.join("blank");
        std::fs::File::create(&blank).and_then(|f| f.set_len(1 << 20)).expect("the lab is writable");
        self.image = Some(blank.clone());
        let described = self.described().without_ticket();
        // `keep` preserves an installed disk although the blank image is newer. The installer holds an image in memory.
        let start = described.as_start();
        let memory = start.memory + (1 << 30);
        let mut start = VmOptions { image: &blank, netboot: Some(netboot), keep: true, memory, ..start };
        if self.project.topology.node(&self.vm.node).is_none_or(|node| node.hub == 0) {
            start.credentials.clear();
        }
        self.vm.start(&start).unwrap_or_else(|e| panic!("{}", e.chain()));
    }

    /// Returns multicast group and port of the machine's network.
    #[must_use]
    pub fn lan(&self) -> String {
        self.described().as_start().nic.group
    }

    fn start_as(&self, described: &Described) {
        let start = described.as_start();
        let image = self.image.as_deref().unwrap_or(start.image);
        self.vm
            .start(&VmOptions { image, tpm: self.tpm.as_deref(), bios: self.bios, ..start })
            .unwrap_or_else(|e| panic!("{}", e.chain()));
    }

    /// Replaces the disk by a blank one.
    pub fn wipe(&self) {
        self.vm.wipe().expect("the machine has a disk");
    }

    /// Waits until one of the texts is on the console. Returns that text.
    pub fn wait_for<'a>(&self, texts: &[&'a str]) -> &'a str {
        let found = self.vm.wait_console(TIMEOUT, |console| texts.iter().copied().find(|t| console.contains(t)));
        found.unwrap_or_else(|e| panic!("{}", e.chain()))
    }

    /// Waits until the console's text fulfils a condition.
    pub fn wait_until(&self, what: &str, is: impl Fn(&str) -> bool) {
        let found = self.vm.wait_console(TIMEOUT, |console| is(console).then_some(()));
        found.unwrap_or_else(|e| panic!("{what}: {}", e.chain()));
    }

    /// Returns the text on the serial console since the last start.
    pub fn console(&self) -> String {
        self.vm.console()
    }

    /// Runs a command in the machine. Its status may be any.
    pub fn exec(&self, command: &str) -> Done {
        self.vm.exec(command).unwrap_or_else(|e| panic!("{}\nconsole:\n{}", e.chain(), self.console()))
    }

    /// Runs a command that must succeed. Returns its output without trailing white space.
    #[track_caller]
    pub fn ok(&self, command: &str) -> String {
        let done = self.exec(command);
        if done.status != 0 {
            let journal = self.exec("journalctl -b --no-pager -n 150").output;
            panic!("`{command}` ended with {}:\n{}\njournal:\n{journal}", done.status, done.output);
        }
        done.output.trim_end().to_owned()
    }

    /// Returns the exposure level of a unit from `systemd-analyze security`: 0 is the best, 10 the worst.
    #[track_caller]
    pub fn exposure(&self, unit: &str) -> f64 {
        let said = self.ok(&format!("systemd-analyze security --no-pager {unit} | tail -1"));
        let level = said.split("service:").nth(1).and_then(|s| s.split_whitespace().next()?.parse().ok());
        level.unwrap_or_else(|| panic!("unexpected output of systemd-analyze for {unit}: {said}"))
    }

    /// Presses the power button, and waits until the machine is off.
    pub fn shut_down(&self) {
        self.vm.power_down().unwrap_or_else(|e| panic!("{}", e.chain()));
    }

    /// Switches the machine off without a shutdown.
    pub fn cut_power(&self) {
        self.vm.cut_power().unwrap_or_else(|e| panic!("{}", e.chain()));
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.vm.cut_power();
    }
}
