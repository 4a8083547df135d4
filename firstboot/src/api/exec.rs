//! Commands of operators. systemd runs each one as root in a service of its own, because the agent's sandbox has no
//! rights to pass on. The service ends with its time limit, or when the operator disconnects.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use fleet::encoding;
use fleet::node_api::{ExecEvent, ExecRequest, LONGEST_COMMAND, LONGEST_RUN};
use hyper::StatusCode;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::unix::pipe;
use tokio::time::{interval, sleep, timeout};

use super::journal::BEAT;
use super::listener::Client;
use super::reply::{Answer, LineSender, Refusal, line, lines};
use super::{audit, random_id};
use crate::error::{Error, Result};
use crate::host::manager::Property;
use crate::host::manager::command::{Command, CommandLine};

/// Time limit for systemd to start the command.
const START: Duration = Duration::from_secs(5);
/// Time between two reads of the service's state.
const POLL: Duration = Duration::from_millis(200);
/// Time beyond a command's limit within which systemd has stopped it.
const STOP: Duration = Duration::from_secs(15);
/// Time limit for output that remains when the command has ended.
const LAST_OUTPUT: Duration = Duration::from_secs(10);
/// Time limit for the client to read the end.
const LAST_EVENT: Duration = Duration::from_secs(60);
/// Bytes of output in one event.
const PART: usize = 32 << 10;
/// Number of characters of the program's name in the service's description.
const DESCRIPTION: usize = 40;

/// A command that was checked.
pub(super) struct Job {
    /// Program and arguments.
    pub(super) words: Vec<String>,
    /// Seconds after which systemd stops it.
    pub(super) seconds: u32,
    /// The command in the log: complete before it runs, and short with its result.
    pub(super) begins: String,
    pub(super) ends: String,
    /// Name of the service.
    pub(super) service: String,
    /// Standard input.
    pub(super) input: Vec<u8>,
    /// Further properties of the service.
    pub(super) properties: Vec<Property<'static>>,
}

/// Runs a command, and returns its output while it runs.
pub(super) async fn run(client: &Arc<Client>, asked: &ExecRequest) -> Answer {
    let command = checked(client, asked)?;
    stream(client, Job::new(asked.command.clone(), asked.seconds, command)?).await
}

impl Job {
    /// Returns a command of root without standard input. `what`: the command for the log.
    pub(super) fn new(words: Vec<String>, seconds: u32, what: String) -> Result<Self, Refusal> {
        let service = service_name("exec")?;
        Ok(Self {
            words,
            seconds,
            begins: what.clone(),
            ends: what,
            service,
            input: Vec::new(),
            properties: Vec::new(),
        })
    }
}

/// Returns a new name of a service.
pub(super) fn service_name(kind: &str) -> Result<String, Refusal> {
    let id = random_id().map_err(|e| Refusal::new(StatusCode::SERVICE_UNAVAILABLE, e.chain()))?;
    Ok(format!("bakehouse-{kind}-{id}.service"))
}

/// Runs a command, and returns its output while it runs.
pub(super) async fn stream(client: &Arc<Client>, job: Job) -> Answer {
    // The log has the complete command before it runs.
    audit::begins(client, &job.begins);
    audit::recorded(client).await;
    let command = job.ends.clone();
    let failed = |why: String| {
        audit::ended(client, &command, &format!("failed: {why}"));
        Ok(Refusal::new(StatusCode::SERVICE_UNAVAILABLE, format!("cannot run the command: {why}")).response())
    };
    let limit = Duration::from_secs(job.seconds.into()) + STOP;
    let (mut running, outputs) = match timeout(START, begin(client, job)).await {
        Ok(Ok(begun)) => begun,
        Ok(Err(e)) => return failed(e.chain()),
        Err(_) => return failed("systemd does not answer".to_owned()),
    };
    let (to_client, response) = lines();
    let client = client.clone();
    tokio::spawn(async move {
        let ended = tokio::select! {
            ended = timeout(limit, follow(&mut running, outputs, &to_client)) => ended.unwrap_or_else(|_| {
                Err(Error::Failed("systemd has not stopped the command".to_owned()))
            }),
            reason = client.until_gone(&to_client) => Err(reason),
        };
        let (event, result) = match ended {
            Ok(code) => (ExecEvent::Exit(code), format!("exit code {code}")),
            Err(e) => (ExecEvent::Failed(fleet::one_line(&e.chain())), format!("stopped: {}", e.chain())),
        };
        // The service may have ended in the same moment.
        let stopped = timeout(START, running.stop()).await;
        let result = match stopped {
            Ok(Ok(())) => result,
            Ok(Err(e)) => format!("{result}; cannot stop the command: {}", e.chain()),
            Err(_) => format!("{result}; cannot stop the command: systemd does not answer"),
        };
        audit::ended(&client, &command, &result);
        let _ = timeout(LAST_EVENT, to_client.send(Ok(line(&event)))).await;
    });
    Ok(response)
}

/// Refuses in a fleet that permits no commands.
pub(super) fn permitted(client: &Client) -> Result<(), Refusal> {
    if client.shared().api.topology.access.shell {
        return Ok(());
    }
    let help = "set `shell = true` in `[access]` of fleet.toml, and roll the new images out";
    Err(Refusal::new(StatusCode::FORBIDDEN, "this fleet permits no commands on its nodes").help(help))
}

/// Checks a request, and returns the command for the log.
fn checked(client: &Client, asked: &ExecRequest) -> Result<String, Refusal> {
    permitted(client)?;
    let invalid = |text: String| Refusal::new(StatusCode::BAD_REQUEST, text);
    if asked.command.first().is_none_or(String::is_empty) || asked.command.iter().any(|word| word.contains('\0')) {
        return Err(invalid("the request has no command".to_owned()));
    }
    if !(1..=LONGEST_RUN).contains(&asked.seconds) {
        return Err(invalid(format!("the time limit is not from 1 to {LONGEST_RUN} s")));
    }
    let command = format!("{:?}", asked.command);
    if command.len() > LONGEST_COMMAND {
        let text = format!("the command has {} bytes with its quotes, and may have {LONGEST_COMMAND}", command.len());
        return Err(invalid(text).help("run several shorter commands, because the log has each of them completely"));
    }
    Ok(format!("exec {command} for up to {} s", asked.seconds))
}

/// Standard output and standard error of a command.
type Outputs = (pipe::Receiver, pipe::Receiver);

/// Starts the service of a command.
async fn begin(client: &Client, job: Job) -> Result<(Command, Outputs)> {
    let failed = || Error::io("make", "a pipe");
    let output = || {
        let (reader, writer) = std::io::pipe()?;
        Ok::<_, std::io::Error>((pipe::Receiver::from_owned_fd(reader.into())?, OwnedFd::from(writer)))
    };
    let ((stdout, stdout_end), (stderr, stderr_end)) = (output().map_err(failed())?, output().map_err(failed())?);
    let input = if job.input.is_empty() { None } else { Some(input_of(job.input).map_err(failed())?) };
    // Viewers read the descriptions of units, and arguments may be passwords.
    let program = job.words.first().map(Path::new).and_then(Path::file_name).unwrap_or_default();
    let program: String = fleet::one_line(&program.to_string_lossy()).chars().take(DESCRIPTION).collect();
    let description = format!("{program} of {}", client.certificate.operator.dns_name());
    let line = CommandLine {
        service: &job.service,
        description: &description,
        words: &job.words,
        seconds: job.seconds,
        properties: job.properties,
    };
    let bus = client.shared().api.bus().await?;
    let command = Command::start(bus, line, input, (stdout_end, stderr_end)).await?;
    Ok((command, (stdout, stderr)))
}

/// Returns a pipe from which a program reads these bytes. A task writes them, because they may be more than fit into the
/// pipe. The task ends when the program has ended.
fn input_of(bytes: Vec<u8>) -> std::io::Result<OwnedFd> {
    let (reader, writer) = std::io::pipe()?;
    let mut writer = pipe::Sender::from_owned_fd(writer.into())?;
    tokio::spawn(async move {
        let _ = writer.write_all(&bytes).await;
    });
    Ok(reader.into())
}

/// Sends the output to the client until the service has ended. Returns its exit code.
async fn follow(command: &mut Command, (mut stdout, mut stderr): Outputs, to: &LineSender) -> Result<i32> {
    let outputs = async {
        tokio::join!(copy(&mut stdout, to, ExecEvent::Stdout), copy(&mut stderr, to, ExecEvent::Stderr));
    };
    let mut outputs = pin!(outputs);
    let ended = async {
        loop {
            if let Some(code) = command.ended().await? {
                return Ok::<_, Error>(code);
            }
            sleep(POLL).await;
        }
    };
    let mut ended = pin!(ended);
    let beats = async {
        let mut beat = interval(BEAT);
        loop {
            beat.tick().await;
            let _ = to.send(Ok(Bytes::from_static(b"\n"))).await;
        }
    };
    let mut beats = pin!(beats);
    tokio::select! {
        () = &mut outputs => tokio::select! {
            code = &mut ended => code,
            () = &mut beats => unreachable!("the beat has no end"),
        },
        code = &mut ended => {
            // The pipes may still have output.
            let _ = timeout(LAST_OUTPUT, outputs).await;
            code
        }
        () = &mut beats => unreachable!("the beat has no end"),
    }
}

/// Sends one output as events until its end.
async fn copy(from: &mut pipe::Receiver, to: &LineSender, event: fn(String) -> ExecEvent) {
    let mut buffer = vec![0; PART];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        if to.send(Ok(line(&event(encoding::encode(&buffer[..count]))))).await.is_err() {
            return;
        }
    }
}
