//! `bakehouse netboot`, as a machine asks it.

use std::io::Read;
use std::time::Duration;

use fleet::netboot::{Assignment, Extent, Mac, NetbootMachine, ProgressReport, ReportKey, Step};
use ureq::Agent;

use crate::error::{Error, Result};

/// Without a byte for so long, a connection is dead.
const PATIENCE: Duration = Duration::from_secs(30);

pub(super) struct Server {
    base: String,
    agent: Agent,
    mac: Option<Mac>,
    /// The machine's key, base64.
    key: String,
    /// Proves that reports are this machine's; there is none before a ticket came.
    pub(super) reports: Option<ReportKey>,
}

impl Server {
    /// By the word on the kernel's command line.
    pub(super) fn of(cmdline: &str) -> Result<Self> {
        let word = cmdline.split_whitespace().find_map(|w| w.strip_prefix(NetbootMachine::SERVER)?.strip_prefix('='));
        let base = word.ok_or_else(|| {
            Error::Configuration(format!("the kernel's command line has no {}=http://…", NetbootMachine::SERVER))
        })?;
        let config = Agent::config_builder()
            .timeout_connect(Some(PATIENCE))
            .timeout_recv_response(Some(PATIENCE))
            .http_status_as_error(false)
            .build();
        let base = base.trim_end_matches('/').to_owned();
        Ok(Self { base, agent: config.into(), mac: None, key: String::new(), reports: None })
    }

    /// What this machine is to be. News are this machine's, from now on: its cards come up in their
    /// own time.
    pub(super) fn ask(&mut self, machine: &NetbootMachine) -> Result<Assignment> {
        self.mac = machine.macs.first().copied();
        self.key.clone_from(&machine.key);
        let body = serde_json::to_vec(machine).map_err(|e| Error::Failed(e.to_string()))?;
        let mut answer = self.agent.post(self.url("/v1/machine")).send(&body[..]).map_err(|e| self.failed(e))?;
        let text = answer.body_mut().with_config().limit(1 << 22).read_to_string().map_err(|e| self.failed(e))?;
        if !answer.status().is_success() {
            return Err(self.failed(format!("{} {text}", answer.status())));
        }
        serde_json::from_str(&text).map_err(|e| self.failed(e))
    }

    /// Nobody waits for it.
    pub(super) fn news(&self, step: Step) {
        let _ = self.report(step);
    }

    /// News that the server has written down.
    ///
    /// # Errors
    /// The server does not answer, or does not accept them: it ignores news of a machine that has no ticket.
    pub(super) fn report(&self, step: Step) -> Result<()> {
        let (Some(mac), Some(reports)) = (self.mac, &self.reports) else {
            return Err(Error::Failed("this machine has no ticket: it can't prove its news".to_owned()));
        };
        let news =
            ProgressReport { version: NetbootMachine::VERSION, mac, step, key: self.key.clone(), proof: String::new() };
        let news = reports.prove(news);
        let body = serde_json::to_vec(&news).map_err(|e| Error::Failed(e.to_string()))?;
        let answer = self.agent.post(self.url("/v1/news")).send(&body[..]).map_err(|e| self.failed(e))?;
        if answer.status().is_success() { Ok(()) } else { Err(self.failed(answer.status())) }
    }

    /// A part of a file.
    pub(super) fn read(&self, path: &str, extent: Extent) -> Result<impl Read + use<>> {
        let range = format!("bytes={}-{}", extent.start, extent.start + extent.size - 1);
        let answer = self.agent.get(self.url(path)).header("range", range).call().map_err(|e| self.failed(e))?;
        if answer.status() != 206 {
            return Err(self.failed(format!("{path}: {}", answer.status())));
        }
        Ok(answer.into_body().into_with_config().limit(extent.size).reader())
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    pub(super) fn failed(&self, why: impl std::fmt::Display) -> Error {
        Error::Network { to: self.base.clone(), why: why.to_string() }
    }
}
