//! Test harness: builds fleets with the real binary and boots their images in virtual machines and containers.

pub mod attack;
pub mod browser;
mod compare;
pub mod containment;
mod etcd;
pub mod exporters;
pub mod lan;
mod machine;
pub mod network;
pub mod packages;
pub mod rack;
pub mod rogue_hub;
pub mod runbooks;
pub mod site;
pub mod targets;
pub mod tutorial;
pub mod updates;

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

pub use compare::{first_difference, tar_differences};
pub use etcd::Cluster;
pub use machine::Machine;

/// `etcdctl` with the hub's credentials, for a hub with a vote. `ETCD_CLIENT_DEBUG` silences the warning that the
/// client logs at every call while etcd has no users yet.
pub const ETCDCTL: &str = "ETCD_CLIENT_DEBUG=error /usr/lib/bakehouse/etcdctl";

/// A fleet's folder under `target/lab`, and the `bakehouse` binary that runs in it.
pub struct TestFleet {
    /// Folder with the fleet.toml.
    pub dir: PathBuf,
    store: Option<PathBuf>,
    bakehouse: PathBuf,
}

/// Exit status and output of a `bakehouse` command.
pub struct CommandOutput {
    /// Exit status; -1 if a signal ended the command.
    pub status: i32,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl TestFleet {
    /// Creates an empty folder, copies `profiles/fleets/{fleet}.toml` into it and locks its packages.
    pub fn of_fleet(name: &str, fleet: &str) -> Self {
        let lab = Self::empty(name);
        let toml = root().join("profiles/fleets").join(format!("{fleet}.toml"));
        fs::copy(toml, lab.dir.join("fleet.toml")).expect("the fleet exists");
        // All tests of a run share one lock, because the archive may change between two of them.
        let shared = Self::shared_lock(fleet);
        if shared.exists() {
            fs::copy(&shared, lab.dir.join("bakehouse.lock")).expect("the lock can be copied");
        }
        lab.ok(&["lock"]);
        // Renamed, because another test may read it at the same time.
        let whole = lab.dir.join("bakehouse.lock.shared");
        fs::copy(lab.dir.join("bakehouse.lock"), &whole).expect("the lock can be kept");
        fs::rename(whole, &shared).expect("the lock can be kept");
        lab
    }

    /// Creates the fleet key.
    pub fn init(&self) {
        self.ok(&["init", self.dir.to_str().expect("a UTF-8 path")]);
    }

    /// Makes the fleet's nodes containers instead of virtual machines.
    pub fn is_of_containers(&self) {
        let project = builder::project::Project::load(&self.dir).expect("a valid fleet.toml");
        builder::vm::are_containers(&project, true).expect("no node runs");
    }

    /// Returns the password of Odoo's administrator in fleet.key.
    pub fn odoo_password(&self) -> String {
        let key: serde_json::Value = serde_json::from_str(&self.read("fleet.key")).expect("JSON");
        let found = key.pointer("/secrets/odoo_admin");
        found.and_then(serde_json::Value::as_str).expect("a password").to_owned()
    }

    /// Returns the fleet in a folder of this one's folder.
    #[must_use]
    pub fn within(self, folder: &str) -> Self {
        Self { dir: self.dir.join(folder), ..self }
    }

    /// Returns where the tests of a run keep the lock of a built-in fleet, which they share.
    pub fn shared_lock(fleet: &str) -> PathBuf {
        root().join("target/lab").join(format!("{fleet}.lock"))
    }

    /// Creates an empty folder.
    pub fn empty(name: &str) -> Self {
        let dir = root().join("target/lab").join(name);
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).expect("target/ is writable");
        let bakehouse = root().join("target/release/bakehouse");
        assert!(bakehouse.exists(), "build first: make build");
        Self { dir, store: None, bakehouse }
    }

    /// Gives the lab a store of its own, with only the packages of the shared store.
    #[must_use]
    pub fn with_own_store(mut self) -> Self {
        let store = self.dir.join("store");
        fs::create_dir_all(&store).expect("the lab is writable");
        std::os::unix::fs::symlink(shared_store().join("debs"), store.join("debs")).expect("a link to the packages");
        self.store = Some(store);
        self
    }

    /// Gives the lab an empty store.
    #[must_use]
    pub fn with_empty_store(mut self) -> Self {
        self.store = Some(self.dir.join("store"));
        self
    }

    /// Sends SIGINT as soon as `now` returns true for the process id. Returns the exit status.
    pub fn interrupt(&self, args: &[&str], now: impl Fn(u32) -> bool) -> i32 {
        // A process group of its own, because a terminal sends Ctrl-C to the whole foreground group.
        let mut child = self.command(args).process_group(0).spawn().expect("bakehouse starts");
        while !now(child.id()) {
            assert!(child.try_wait().expect("a child").is_none(), "bakehouse {args:?} ended early");
            std::thread::yield_now();
        }
        press_ctrl_c(child)
    }

    /// Sends SIGINT as soon as the command reports a finished step. Returns the step's line.
    pub fn interrupt_after_a_line(&self, args: &[&str]) -> String {
        let mut command = self.command(args);
        let mut child = command.process_group(0).stderr(Stdio::piped()).spawn().expect("bakehouse starts");
        let mut said = BufReader::new(child.stderr.take().expect("a pipe"));
        let mut line = String::new();
        said.read_line(&mut line).expect("a pipe");
        press_ctrl_c(child);
        line
    }

    /// Returns a `bakehouse` command on this fleet, which has not started.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.bakehouse);
        command.arg("-C").arg(&self.dir).args(args);
        if let Some(store) = &self.store {
            command.env("BAKEHOUSE_STORE", store);
        }
        command
    }

    /// Runs a command, which may fail.
    pub fn run(&self, args: &[&str]) -> CommandOutput {
        CommandOutput::new(&self.command(args).output().expect("bakehouse starts"))
    }

    /// Runs a command that must succeed. Returns its output.
    #[track_caller]
    pub fn ok(&self, args: &[&str]) -> CommandOutput {
        let answer = self.run(args);
        assert_eq!(answer.status, 0, "bakehouse {args:?} failed:\n{}{}", answer.out, answer.err);
        answer
    }

    /// Writes a file of the fleet's folder, and creates the folders above it.
    pub fn write(&self, path: &str, text: &str) {
        let path = self.dir.join(path);
        fs::create_dir_all(path.parent().expect("a file in the lab")).expect("the lab is writable");
        fs::write(path, text).expect("the lab is writable");
    }

    /// Adds a role without services, whose nodes only join the mesh. `volatile` keeps its /var in memory.
    pub fn has_idle_role(&self, role: &str, volatile: bool) {
        self.write(
            &format!("profiles/roles/{role}.toml"),
            &format!("description = \"In the mesh\"\noverlays = [\"{role}\"]\n[disk]\nvolatile = {volatile}\n"),
        );
        self.write(
            &format!("overlays/{role}/usr/lib/systemd/system/role-{role}.target"),
            "[Unit]\nDescription=In the mesh\n",
        );
    }

    /// Reads a file of the fleet's folder.
    pub fn read(&self, path: &str) -> String {
        fs::read_to_string(self.dir.join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
    }

    /// Replaces `from` by `to` in a file of the lab. A built-in file is copied into the lab first, where the copy takes
    /// precedence.
    pub fn edit(&self, path: &str, from: &str, to: &str) {
        let own = self.dir.join(path);
        let text = fs::read_to_string(if own.exists() { own } else { root().join(path) }).expect("the file exists");
        assert!(text.contains(from), "{path} has no `{from}`");
        self.write(path, &text.replacen(from, to, 1));
    }
}

impl CommandOutput {
    /// Reads the output of a process that has ended.
    pub fn new(output: &Output) -> Self {
        Self {
            status: output.status.code().unwrap_or(-1),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Returns the result that a command with `--json` printed in its last line.
    #[track_caller]
    pub fn result(&self) -> serde_json::Value {
        let last = self.out.lines().last().unwrap_or_default();
        let line: serde_json::Value = serde_json::from_str(last).unwrap_or_else(|e| panic!("{e}: {}", self.out));
        line.get("result").unwrap_or_else(|| panic!("no result: {}{}", self.out, self.err)).clone()
    }

    /// Asserts that the command failed with this status and printed all of these words to stderr.
    #[track_caller]
    pub fn fails(&self, status: i32, words: &[&str]) {
        assert_eq!(self.status, status, "{}{}", self.out, self.err);
        for word in words {
            assert!(self.err.contains(word), "`{word}` is not in:\n{}", self.err);
        }
    }
}

fn press_ctrl_c(mut child: Child) -> i32 {
    let group = Pid::from_raw(-i32::try_from(child.id()).expect("a pid"));
    // The process may have ended already.
    let _ = kill(group, Signal::SIGINT);
    child.wait().expect("a child").code().unwrap_or(-1)
}

/// Path of the repository.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ is in the workspace")
}

/// Returns the folder of the store that all tests share, as `bakehouse` finds it.
pub fn shared_store() -> PathBuf {
    let var = |name| std::env::var_os(name).map(PathBuf::from);
    var("BAKEHOUSE_STORE")
        .or_else(|| var("XDG_CACHE_HOME").map(|d| d.join("bakehouse")))
        .or_else(|| var("HOME").map(|d| d.join(".cache/bakehouse")))
        .expect("HOME is set")
}
