//! Runs a program in the namespaces of a container.

use std::io::Read as _;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;

use super::command::Done;
use crate::error::{Error, Result, fail};

/// Returns a command that runs a shell command in the namespaces of a process.
pub(super) fn command(pid: Pid, shell: &str) -> Command {
    let mut enter = Command::new("nsenter");
    enter.args(["--target", &pid.to_string(), "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--"]);
    enter.args(["env", "-i", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin", "bash", "-c"]);
    enter.arg(format!("exec 2>&1\n{shell}"));
    enter
}

/// Runs a command on a node, and returns its output. Kills it after the time limit.
///
/// # Errors
/// If the command does not start, or does not end within the time limit.
pub(super) fn output(mut command: Command, limit: Duration, node: &str) -> Result<Done> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().map_err(Error::cannot(format!("run a command on {node}")))?;
    let (send, receive) = channel();
    if let Some(mut pipe) = child.stdout.take() {
        let send = send.clone();
        thread::spawn(move || {
            let mut bytes = Vec::new();
            let _ = pipe.read_to_end(&mut bytes);
            let _ = send.send(Part::Output(bytes));
        });
    }
    let running = Arc::new(Mutex::new(Some(pid_of(&child))));
    thread::spawn({
        let running = running.clone();
        move || send.send(Part::Status(wait(&child, &running)))
    });
    let (mut status, mut bytes) = (None, None);
    let deadline = Instant::now() + limit;
    while status.is_none() || bytes.is_none() {
        let left = deadline.saturating_duration_since(Instant::now());
        match receive.recv_timeout(left) {
            Ok(Part::Output(output)) => bytes = Some(output),
            Ok(Part::Status(code)) => status = Some(code),
            Err(_) => {
                if let Some(pid) = *running.lock().unwrap_or_else(PoisonError::into_inner) {
                    let _ = kill(pid, Signal::SIGKILL);
                }
                return fail(format!("no reply from {node} within {:.0} s", limit.as_secs_f64()));
            }
        }
    }
    let output = String::from_utf8_lossy(&bytes.unwrap_or_default()).into_owned();
    Ok(Done { status: status.flatten().unwrap_or(-1), output })
}

enum Part {
    Output(Vec<u8>),
    Status(Option<i32>),
}

fn pid_of(child: &Child) -> Pid {
    Pid::from_raw(child.id().cast_signed())
}

/// Waits for the end of a process. Returns its exit code, or `None` after a signal. `running` becomes `None` before the
/// kernel can reuse the pid.
///
/// nsenter stops itself when its child stops, which systemd does with all processes before it kills them at shutdown. A
/// stopped nsenter does not collect its child, and a container with such a child never ends: so it has to continue.
fn wait(child: &Child, running: &Mutex<Option<Pid>>) -> Option<i32> {
    let pid = pid_of(child);
    loop {
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WSTOPPED | WaitPidFlag::WNOWAIT;
        waitid(Id::Pid(pid), flags).ok()?;
        let mut running = running.lock().unwrap_or_else(PoisonError::into_inner);
        match waitpid(pid, Some(WaitPidFlag::WUNTRACED | WaitPidFlag::WNOHANG)).ok()? {
            WaitStatus::Stopped(..) => drop(kill(pid, Signal::SIGCONT)),
            WaitStatus::Exited(_, code) => {
                *running = None;
                return Some(code);
            }
            WaitStatus::Signaled(..) => {
                *running = None;
                return None;
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn a_command_that_stops_itself_continues() {
        let done = output(shell("echo a; kill -STOP $$; echo b; exit 3"), Duration::from_secs(20), "x").unwrap();
        assert_eq!((done.status, done.output.as_str()), (3, "a\nb\n"));
        let done = output(shell("kill -TERM $$"), Duration::from_secs(20), "x").unwrap();
        assert_eq!(done.status, -1);
    }

    #[test]
    fn a_command_ends_with_its_time_limit() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("pid");
        let script = format!("echo $$ >{}; exec sleep 60", file.display());
        let e = output(shell(&script), Duration::from_millis(500), "x").unwrap_err().to_string();
        assert!(e.contains("no reply"), "{e}");
        let pid = Pid::from_raw(std::fs::read_to_string(file).unwrap().trim().parse().unwrap());
        let begun = Instant::now();
        while kill(pid, None).is_ok() {
            assert!(begun.elapsed() < Duration::from_secs(20), "the command still runs");
            thread::sleep(Duration::from_millis(10));
        }
    }
}
