//! The installer: kernel and initrd of a group's packages, for machines that boot from the network.

use std::fs;

use fleet::netboot::InstallerTrust;

use crate::assemble::{initrd, uki};
use crate::compose;
use crate::compose::tar_index::Tree;
use crate::error::{Error, Result};
use crate::image::{Build, beside, cmdline};
use crate::toolchain::Tools;

/// What the installer says of itself.
const INSTALLER: &str = "NAME=Bakehouse\nID=bakehouse\nPRETTY_NAME=\"Bakehouse installer\"\n";

/// What a machine runs that is to get an image over the network.
pub struct Installer {
    /// For firmware.
    pub program: Vec<u8>,
    /// The kernel's, as it is in the program.
    pub cmdline: String,
}

impl Build<'_> {
    /// Kernel and initrd of a group's packages, as one program for firmware, that install what the
    /// server at this address says. `trust` says which images it may enter from memory.
    ///
    /// # Errors
    /// Whatever keeps it from being whole.
    pub fn installer(&self, group: &str, server: &str, trust: &InstallerTrust) -> Result<Installer> {
        let recipe = self.project.recipe(group);
        let tools = Tools::prepare(self.lock, self.store, self.progress)?;
        let layer = compose::compose(&recipe, self.lock, self.store, self.progress)?;
        let tree = Tree::open(&layer.tar())?;
        let kernel = layer.info()?.kernel;
        let path = beside("firstboot-install")?;
        let program = fs::read(&path).map_err(Error::io("read", &path))?;
        let mut order = self.order(&["profiles/initrd.toml", "profiles/netboot.toml"])?;
        order.programs.push(("usr/bin/firstboot-install", program));
        let trust = serde_json::to_vec(trust).map_err(|e| Error::Failed(e.to_string()))?;
        order.files.push((InstallerTrust::PATH, trust));
        let scratch = tempfile::tempdir().map_err(Error::io("create", "a temporary folder"))?;
        let source = initrd::Source { tree: &tree, layer: &layer, kernel: &kernel, tools: &tools };
        let initrd = order.build(&source, self.store, self.progress, scratch.path())?;
        let server = format!("{}={server}", fleet::netboot::NetbootMachine::SERVER);
        // Of a root that is entered, which is one in memory, no disk is a part.
        let words = ["rd.systemd.unit=netboot.target", "fstab=no", "systemd.mask=systemd-repart.service"];
        let cmdline = [&words.join(" "), server.as_str(), &cmdline(&recipe)].join(" ");
        let text = uki::Text { cmdline: &cmdline, os_release: INSTALLER, uname: &kernel };
        Ok(Installer { program: self.uki(&tools, &layer, &text, &initrd, false)?, cmdline })
    }
}
