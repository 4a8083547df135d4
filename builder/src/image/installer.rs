//! The installer: kernel and initrd for machines that boot from the network, built from a group's packages.

use std::fs;

use fleet::netboot::InstallerTrust;

use crate::assemble::{initrd, uki};
use crate::compose;
use crate::compose::tar_index::Tree;
use crate::error::{Error, Result};
use crate::image::{Build, cmdline, node_program};
use crate::toolchain::Tools;

/// The installer's os-release.
const INSTALLER: &str = "NAME=Bakehouse\nID=bakehouse\nPRETTY_NAME=\"Bakehouse installer\"\n";

/// The program that a machine runs to install an image over the network.
pub(crate) struct Installer {
    /// A UKI, which UEFI firmware starts.
    pub program: Vec<u8>,
    /// The kernel's command line, the same as in `program`.
    pub cmdline: String,
}

impl Build<'_> {
    /// Builds the installer from a group's packages, as one UKI. It installs what the server at this address assigns.
    /// `trust` lists the images that it may start from memory.
    ///
    /// # Errors
    /// If a package, a tool or the `firstboot-install` binary is missing, or a step fails.
    pub(crate) fn installer(&self, group: &str, server: &str, trust: &InstallerTrust) -> Result<Installer> {
        let recipe = self.project.recipe(group);
        let tools = Tools::prepare(self.lock, self.store, self.progress)?;
        let layer = compose::compose(&recipe, self.lock, self.store, self.progress)?;
        let tree = Tree::open(&layer.tar())?;
        let kernel = layer.info()?.kernel;
        let path = node_program("firstboot-install")?;
        let program = fs::read(&path).map_err(Error::io("read", &path))?;
        let mut spec = self.initrd_spec(&["profiles/initrd.toml", "profiles/netboot.toml"])?;
        spec.programs.push(("usr/bin/firstboot-install", program));
        let trust = serde_json::to_vec(trust).map_err(Error::Json)?;
        spec.files.push((InstallerTrust::PATH, trust));
        let scratch = tempfile::tempdir().map_err(Error::io("create", "a temporary folder"))?;
        let source = initrd::Source { tree: &tree, layer: &layer, kernel: &kernel, tools: &tools };
        let initrd = spec.build(&source, self.store, self.progress, scratch.path())?;
        let server = format!("{}={server}", fleet::netboot::NetbootMachine::SERVER);
        // A root that the installer starts from memory must not use the machine's disks.
        let fixed = ["rd.systemd.unit=netboot.target", "fstab=no", "systemd.mask=systemd-repart.service"];
        let cmdline = [&fixed.join(" "), server.as_str(), &cmdline(&recipe)].join(" ");
        let text = uki::Text { cmdline: &cmdline, os_release: INSTALLER, uname: &kernel };
        Ok(Installer { program: self.uki(&tools, &layer, &text, &initrd, false)?, cmdline })
    }
}
