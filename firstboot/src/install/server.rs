//! Client of `bakehouse netboot`.

use std::io::Read;
use std::time::Duration;

use fleet::netboot::{Assignment, Extent, Mac, NetbootMachine, ProgressReport, ReportKey, Step};
use fleet_https::Cause;
use ureq::Agent;

use crate::error::{Error, Result};

/// Time limit for a connection, and for the headers of a reply.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Client of the netboot server.
pub(super) struct Server {
    base: String,
    agent: Agent,
    mac: Option<Mac>,
    /// The machine's key, base64.
    key: String,
    /// Authenticates this machine's reports; `None` before the machine has a ticket.
    pub(super) reports: Option<ReportKey>,
}

impl Server {
    /// Makes a client of the server on the kernel's command line.
    pub(super) fn from_cmdline(cmdline: &str) -> Result<Self> {
        let word = cmdline.split_whitespace().find_map(|w| w.strip_prefix(NetbootMachine::SERVER)?.strip_prefix('='));
        let base = word.ok_or_else(|| {
            Error::Configuration(format!("the kernel's command line has no {}=http://…", NetbootMachine::SERVER))
        })?;
        let config = Agent::config_builder()
            .timeout_connect(Some(TIMEOUT))
            .timeout_recv_response(Some(TIMEOUT))
            .http_status_as_error(false)
            .build();
        let base = base.trim_end_matches('/').to_owned();
        Ok(Self { base, agent: config.into(), mac: None, key: String::new(), reports: None })
    }

    /// Asks for the machine's assignment. Later reports have the first MAC address of this request, because other
    /// network cards may come up later.
    pub(super) fn ask(&mut self, machine: &NetbootMachine) -> Result<Assignment> {
        self.mac = machine.macs.first().copied();
        self.key.clone_from(&machine.key);
        let body = serde_json::to_vec(machine).map_err(Error::json("the machine"))?;
        let mut answer = self.agent.post(self.url("/v1/machine")).send(&body[..]).map_err(|e| self.failed(e))?;
        let text = answer.body_mut().with_config().limit(1 << 22).read_to_string().map_err(|e| self.failed(e))?;
        if !answer.status().is_success() {
            return Err(self.failed(format!("{} {text}", answer.status())));
        }
        serde_json::from_str(&text).map_err(|e| self.failed(e))
    }

    /// Sends a report, and ignores errors.
    pub(super) fn try_report(&self, step: Step) {
        let _ = self.report(step);
    }

    /// Sends a report, and waits until the server has stored it.
    ///
    /// # Errors
    /// If the machine has no ticket, or the server does not answer or refuses the report.
    pub(super) fn report(&self, step: Step) -> Result<()> {
        let (Some(mac), Some(reports)) = (self.mac, &self.reports) else {
            return Err(Error::Failed("cannot send a report: this machine has no ticket".to_owned()));
        };
        let report =
            ProgressReport { version: NetbootMachine::VERSION, mac, step, key: self.key.clone(), proof: String::new() };
        let report = reports.prove(report);
        let body = serde_json::to_vec(&report).map_err(Error::json("the report"))?;
        let answer = self.agent.post(self.url("/v1/news")).send(&body[..]).map_err(|e| self.failed(e))?;
        if answer.status().is_success() { Ok(()) } else { Err(self.failed(answer.status().to_string())) }
    }

    /// Reads a part of a file.
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

    pub(super) fn failed(&self, cause: impl Into<Cause>) -> Error {
        Error::network(&self.base, cause)
    }
}
