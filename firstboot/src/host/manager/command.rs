//! Commands that systemd runs in services of their own, outside the sandbox of the agent.

use std::os::fd::OwnedFd;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::timeout;
use zbus::proxy::CacheProperties;
use zbus::zvariant::{Fd, OwnedObjectPath, Value};

use super::{ManagerProxy, Property, state_of, unit_proxy};
use crate::error::{Error, Result};

/// The agent's own unit. A command ends with it.
const AGENT: &str = "firstboot.service";
/// Variables of a command. systemd sets none of them for a service without `User=`.
const ENVIRONMENT: [&str; 4] = ["HOME=/root", "USER=root", "LOGNAME=root", "SHELL=/bin/sh"];
/// Folder in which a command starts; `/` if it does not exist.
const FOLDER: &str = "-/root";
/// Time limit for systemd to accept that a service stops.
const STOP: Duration = Duration::from_secs(5);

#[zbus::proxy(interface = "org.freedesktop.systemd1.Service", default_service = "org.freedesktop.systemd1")]
trait Service {
    #[zbus(property)]
    fn exec_main_code(&self) -> zbus::Result<i32>;
    #[zbus(property)]
    fn exec_main_status(&self) -> zbus::Result<i32>;
    #[zbus(property)]
    fn exec_main_handoff_timestamp_monotonic(&self) -> zbus::Result<u64>;
    #[zbus(property)]
    fn result(&self) -> zbus::Result<String>;
}

/// A command to run.
pub(crate) struct CommandLine<'a> {
    /// Name of the service.
    pub(crate) service: &'a str,
    /// Description of the service. Every program on the machine can read it.
    pub(crate) description: &'a str,
    /// Program and arguments.
    pub(crate) words: &'a [String],
    /// Seconds after which systemd stops the service.
    pub(crate) seconds: u32,
    /// Further properties of the service. They follow the others, so `User` makes a command of another user.
    pub(crate) properties: Vec<Property<'static>>,
}

/// A command that runs. If it is dropped before [`Command::ended`] returns its end, systemd stops the service.
pub(crate) struct Command {
    bus: zbus::Connection,
    service: String,
    seconds: u32,
    path: Option<OwnedObjectPath>,
    has_ended: bool,
}

impl Command {
    /// Starts a program as root, or as the user of the properties, with these ends of pipes as its standard input and its
    /// outputs. Without `stdin`, its standard input is empty. systemd stops all its processes after the time limit. The
    /// connection to the bus belongs to the command.
    ///
    /// # Errors
    /// If the connection to the bus is closed, or systemd refuses the service.
    pub(crate) async fn start(
        bus: zbus::Connection,
        line: CommandLine<'_>,
        stdin: Option<OwnedFd>,
        (stdout, stderr): (OwnedFd, OwnedFd),
    ) -> Result<Self> {
        let program = line.words.first().map_or("", String::as_str);
        let words: Vec<&str> = line.words.iter().map(String::as_str).collect();
        let mut properties: Vec<Property> = vec![
            ("Description", line.description.into()),
            // The references of this connection keep the service and its exit code until the connection is closed.
            ("AddRef", true.into()),
            ("CollectMode", "inactive-or-failed".into()),
            // In `ExecStart`, systemd replaces `${NAME}` and `$NAME`, and only this property has a flag against it.
            ("ExecStartEx", Value::from(vec![(program, words, vec!["no-env-expand"])])),
            ("StandardOutputFileDescriptor", Value::from(Fd::from(stdout))),
            ("StandardErrorFileDescriptor", Value::from(Fd::from(stderr))),
            ("RuntimeMaxUSec", (u64::from(line.seconds) * 1_000_000).into()),
            ("TimeoutStopUSec", 5_000_000_u64.into()),
            ("KillMode", "control-group".into()),
            // Without the agent, no program would read the output, or stop the command of a revoked operator.
            ("BindsTo", Value::from(vec![AGENT])),
            ("After", Value::from(vec![AGENT])),
            match stdin {
                Some(stdin) => ("StandardInputFileDescriptor", Value::from(Fd::from(stdin))),
                None => ("StandardInput", "null".into()),
            },
        ];
        if !line.properties.iter().any(|(name, _)| *name == "User") {
            properties.push(("Environment", Value::from(ENVIRONMENT.to_vec())));
            properties.push(("WorkingDirectory", FOLDER.into()));
        }
        properties.extend(line.properties);
        // From here on, dropping this future stops the service, too: systemd handles the calls in their order.
        let mut command = Self {
            bus: bus.clone(),
            service: line.service.to_owned(),
            seconds: line.seconds,
            path: None,
            has_ended: false,
        };
        let manager = ManagerProxy::new(&bus).await?;
        manager.start_transient_unit(line.service, "fail", &properties, &[]).await?;
        command.path = Some(manager.load_unit(line.service).await?);
        Ok(command)
    }

    /// Returns the exit code, if the service has ended: 128 plus the signal's number after a signal.
    ///
    /// # Errors
    /// If the connection to the bus is closed, the program did not start, or systemd stopped it.
    pub(crate) async fn ended(&mut self) -> Result<Option<i32>> {
        /// Value of `si_code` in waitid(2).
        const EXITED: i32 = 1;
        let Some(path) = self.path.clone() else { return Ok(None) };
        let unit = unit_proxy(&self.bus, path.clone()).await?;
        let (state, has_job) = state_of(&unit).await?;
        if has_job || (state != "inactive" && state != "failed") {
            return Ok(None);
        }
        let service = ServiceProxy::builder(&self.bus).path(path)?;
        let service = service.cache_properties(CacheProperties::No).build().await?;
        let (code, status, result) =
            (service.exec_main_code().await?, service.exec_main_status().await?, service.result().await?);
        self.has_ended = true;
        let failed = |text: String| Err(Error::Failed(text));
        match (code, result.as_str()) {
            (_, "timeout") => {
                failed(format!("the command did not end within its time limit of {} s, and was stopped", self.seconds))
            }
            (_, "oom-kill") => failed("the command was stopped, because the node has too little memory".to_owned()),
            (0, _) => failed(format!("the command did not start ({result})")),
            // Before the program runs, systemd's own process exits with one of these.
            (EXITED, _) if (200..=245).contains(&status) => {
                match service.exec_main_handoff_timestamp_monotonic().await {
                    Ok(0) => failed(format!("the command did not start: {}", why_not_started(status))),
                    _ => Ok(Some(status)),
                }
            }
            (EXITED, _) => Ok(Some(status)),
            _ => Ok(Some(128 + status)),
        }
    }

    /// Stops all processes of the service, if it has not ended: SIGTERM, and SIGKILL after 5 s.
    ///
    /// # Errors
    /// If the connection to the bus is closed.
    pub(crate) async fn stop(mut self) -> Result<()> {
        if !std::mem::replace(&mut self.has_ended, true) {
            stop(&self.bus, &self.service).await?;
        }
        Ok(())
    }
}

impl Drop for Command {
    fn drop(&mut self) {
        if self.has_ended {
            return;
        }
        let Ok(runtime) = Handle::try_current() else { return };
        let (bus, service) = (self.bus.clone(), self.service.clone());
        runtime.spawn(async move {
            // The service may have ended, or may not have started.
            let _ = timeout(STOP, stop(&bus, &service)).await;
        });
    }
}

async fn stop(bus: &zbus::Connection, service: &str) -> Result<()> {
    ManagerProxy::new(bus).await?.stop_unit(service, "replace").await?;
    Ok(())
}

/// Returns the meaning of an [exit status] of systemd.
///
/// [exit status]: https://www.freedesktop.org/software/systemd/man/latest/systemd.exec.html#Process%20Exit%20Codes
fn why_not_started(status: i32) -> String {
    match status {
        200 => "its working directory cannot be used".to_owned(),
        203 => "the node has no such program, or it is not executable".to_owned(),
        _ => format!("systemd's exit status {status}; its journal has the reason"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::fake::FakeSystemd;
    use super::*;
    use std::io::Read as _;

    async fn start(bus: zbus::Connection, words: &[&str]) -> (Command, std::io::PipeReader, std::io::PipeReader) {
        let (stdout, stdout_end) = std::io::pipe().unwrap();
        let (stderr, stderr_end) = std::io::pipe().unwrap();
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        let (service, description) = ("x.service", "ls of anna");
        let line = CommandLine { service, description, words: &words, seconds: 7, properties: Vec::new() };
        let command = Command::start(bus, line, None, (stdout_end.into(), stderr_end.into())).await.unwrap();
        (command, stdout, stderr)
    }

    #[tokio::test]
    async fn command_has_the_properties_of_a_transient_service() {
        let (bus, _server, systemd) = FakeSystemd::connected().await;
        let (mut command, mut stdout, mut stderr) = start(bus, &["ls", "${HOME}", "$$", "%n"]).await;
        let read = tokio::task::spawn_blocking(move || {
            let mut out = String::new();
            stdout.read_to_string(&mut out).unwrap();
            stderr.read_to_string(&mut out).unwrap();
            out
        });
        // No copy of the pipes' ends stays in this process.
        assert_eq!(tokio::time::timeout(Duration::from_secs(5), read).await.unwrap().unwrap(), "out");
        let types = systemd.calls()[0].clone();
        for expected in [
            "Description s",
            "AddRef b",
            "ExecStartEx a(sasas)",
            "Environment as",
            "WorkingDirectory s",
            "StandardOutputFileDescriptor h",
            "RuntimeMaxUSec t",
            "KillMode s",
            "BindsTo as",
        ] {
            assert!(types.contains(expected), "{expected}: {types}");
        }
        assert!(!types.contains("ExecStart "), "systemd would replace variables: {types}");
        assert_eq!(systemd.command(), [["ls", "${HOME}", "$$", "%n"].as_slice(), &["no-env-expand"]].concat());
        // At the first question, the service starts between two replies.
        for _ in 0..3 {
            assert_eq!(command.ended().await.unwrap(), None);
        }
        systemd.end_command(2, 15, "signal");
        assert_eq!(command.ended().await.unwrap(), Some(128 + 15));
    }

    #[tokio::test]
    async fn an_end_without_the_programs_exit_code_has_a_reason() {
        for (code, status, result, handoff, expected) in [
            (1, 3, "exit-code", 0, Ok(3)),
            (1, 203, "exit-code", 7, Ok(203)),
            (1, 203, "exit-code", 0, Err("no such program")),
            (0, 0, "resources", 0, Err("did not start (resources)")),
            (2, 15, "timeout", 7, Err("time limit of 7 s")),
            (2, 9, "oom-kill", 7, Err("too little memory")),
        ] {
            let (bus, _server, systemd) = FakeSystemd::connected().await;
            let (mut command, ..) = start(bus, &["x"]).await;
            systemd.set_handoff(handoff);
            systemd.end_command(code, status, result);
            match (command.ended().await, expected) {
                (Ok(found), Ok(code)) => assert_eq!(found, Some(code)),
                (Err(e), Err(text)) => assert!(e.chain().contains(text), "{}", e.chain()),
                (found, _) => panic!("{status} {result}: {:?}", found.map_err(|e| e.chain())),
            }
        }
    }

    #[tokio::test]
    async fn a_dropped_command_is_stopped() {
        let (bus, _server, systemd) = FakeSystemd::connected().await;
        drop(start(bus, &["sleep", "60"]).await);
        systemd.until_called("stop x.service replace").await;
        // The client disconnects while systemd starts the service.
        let (bus, _server, systemd) = FakeSystemd::connected().await;
        systemd.hold_starts();
        tokio::select! {
            _ = start(bus, &["sleep", "60"]) => panic!("systemd has not replied"),
            () = systemd.until_starting() => {}
        }
        systemd.until_called("stop x.service replace").await;
    }

    /// Runs commands with a real systemd, such as a user's, that has a unit `firstboot.service`.
    #[tokio::test]
    #[ignore = "needs the address of the bus of a systemd in BAKEHOUSE_SYSTEMD"]
    async fn a_real_systemd_runs_what_was_typed() {
        let address = std::env::var("BAKEHOUSE_SYSTEMD").unwrap();
        for (i, (words, expected)) in [
            (&["bash", "-c", "x=1; echo \"${x}\" $((2 + 1)) '$$'; echo err >&2; exit 3"][..], Ok(("1 3 $$\nerr\n", 3))),
            (&["echo", "$HOME", "${HOME}", "%n", "$$", "a b", "*"], Ok(("$HOME ${HOME} %n $$ a b *\n", 0))),
            (&["sh", "-c", "echo $HOME $USER; pwd"], Ok(("/root root\n/root\n", 0))),
            (&["sh", "-c", "sleep 300 & kill -9 $$"], Ok(("", 128 + 9))),
            (&["sh", "-c", "exec >&- 2>&-; exit 7"], Ok(("", 7))),
            (&["sleep", "100"], Err("time limit")),
            (&["/nonexistent"], Err("did not start")),
            (&["nonexistent-name"], Err("did not start")),
        ]
        .into_iter()
        .enumerate()
        {
            let bus = zbus::connection::Builder::address(address.as_str()).unwrap().build().await.unwrap();
            let (stdout, stdout_end) = std::io::pipe().unwrap();
            let (stderr, stderr_end) = std::io::pipe().unwrap();
            let owned: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
            let service = format!("bakehouse-exec-{}-{i}.service", std::process::id());
            let (service, properties) = (&service, Vec::new());
            let line = CommandLine { service, description: "a test", words: &owned, seconds: 2, properties };
            let outputs = (stdout_end.into(), stderr_end.into());
            let mut command = Command::start(bus, line, None, outputs).await.unwrap();
            let read = tokio::task::spawn_blocking(move || {
                let mut out = String::new();
                { stdout }.read_to_string(&mut out).unwrap();
                { stderr }.read_to_string(&mut out).unwrap();
                out
            });
            let ended = loop {
                match command.ended().await {
                    Ok(None) => tokio::time::sleep(Duration::from_millis(20)).await,
                    Ok(Some(code)) => break Ok(code),
                    Err(e) => break Err(e.chain()),
                }
            };
            let found = (read.await.unwrap(), ended);
            match (&found, expected) {
                ((out, Ok(code)), Ok(expected)) => assert_eq!((out.as_str(), *code), expected, "{words:?}"),
                ((_, Err(e)), Err(part)) => assert!(e.contains(part), "{words:?}: {e}"),
                // Before version 257, systemd does not report whether the program began.
                ((_, Ok(203)), Err("did not start")) => {}
                _ => panic!("{words:?}: {found:?}"),
            }
        }
    }
}
