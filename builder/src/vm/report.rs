//! `bakehouse report`: an archive of journals, configurations and states from all machines, without secrets.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, BufWriter, Read, Seek as _, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use flate2::write::GzEncoder;
use fleet::{HubKey, Node, Secrets};
use serde_json::json;

use super::machine::Vm;
use super::status::FleetStatus;
use crate::error::{Error, Result};
use crate::keys::authority::FleetKey;
use crate::progress::{Progress, Step};
use crate::project::Project;

/// Files of the archive from every machine, with the commands that print them.
const EVERYWHERE: [(&str, &str); 7] = [
    ("journal.txt", "journalctl -b --no-pager -o short-iso-precise -n 20000"),
    ("units.txt", "systemctl --no-pager --failed; systemctl list-units --no-pager --all 'role-*'"),
    ("agent.json", "firstboot status --json"),
    ("addresses.txt", "ip address; ip route; ip -s link"),
    (
        "mesh.txt",
        "wg show all | sed 's/private key: .*/private key: (removed)/'; birdc -s /run/bird/bird.ctl show protocols; \
         birdc -s /run/bird/bird.ctl show route",
    ),
    ("packet-filter.txt", "nft list ruleset"),
    // `tls/` has keys and certificates.
    (
        "configurations.txt",
        "cd /run/bakehouse && for f in $(find . -type f -not -path './tls/*' | sort); do echo \"== $f\"; cat $f; done",
    ),
];
const ETCD: (&str, &str) = (
    "etcd.txt",
    "PATH=/usr/lib/bakehouse:$PATH; \
     etcdctl member list -w table; etcdctl endpoint status --cluster -w table; etcdctl get --prefix /bakehouse/audit/",
);
const PATRONI: (&str, &str) =
    ("patroni.txt", "patronictl -c /run/bakehouse/patroni.yml list; patronictl -c /run/bakehouse/patroni.yml history");
const HAPROXY: (&str, &str) =
    ("haproxy.csv", "exec 3<>/dev/tcp/ADDRESS/8404; printf 'GET /;csv HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3");

/// Writes the report to a `.tar.gz`. If a machine does not reply, its files contain the error. Returns the paths of
/// the files below `report/` in the archive.
///
/// # Errors
/// If the fleet key of local machines cannot be read, or the archive cannot be written.
pub(crate) fn collect(project: &Project, output: &Path, progress: &Progress) -> Result<Vec<String>> {
    let step = progress.step("report", "reading the fleet key");
    let secrets = passwords(project, &FleetKey::of_vms(project)?.secrets);
    let asked = Asked::new(&step, project.topology.nodes.iter().map(|node| node.name.as_str()));
    let files = |node: &Node| {
        let files = files_of(project, node);
        asked.done(&node.name);
        files
    };
    let all: Vec<Vec<(String, String)>> = std::thread::scope(|scope| {
        let threads: Vec<_> = project
            .topology
            .nodes
            .iter()
            .map(|node| {
                scope.spawn({
                    let files = &files;
                    move || files(node)
                })
            })
            .collect();
        threads.into_iter().filter_map(|thread| thread.join().ok()).collect()
    });
    step.message("asking for the state of the fleet");
    let mut archive = Archive::create(output, &secrets)?;
    archive.add("board.txt", &FleetStatus::read(project).to_string())?;
    archive.add("timeline.txt", &timeline(&all))?;
    for (path, text) in all.iter().flatten() {
        archive.add(path, text)?;
    }
    let files = archive.finish()?;
    step.done(&format!("{}: {} files", output.display(), files.len()));
    Ok(files)
}

/// A `.tar.gz` with the files of a report below `report/`. It removes secrets and private keys from all texts.
pub(crate) struct Archive<'a> {
    tar: tar::Builder<GzEncoder<File>>,
    secrets: &'a [String],
    path: &'a Path,
    files: Vec<String>,
}

impl<'a> Archive<'a> {
    /// Creates the archive, or replaces it.
    ///
    /// # Errors
    /// If the file cannot be created.
    pub(crate) fn create(path: &'a Path, secrets: &'a [String]) -> Result<Self> {
        let file = create_private(path).map_err(Error::io("create", path))?;
        let tar = tar::Builder::new(GzEncoder::new(file, flate2::Compression::default()));
        Ok(Self { tar, secrets, path, files: Vec::new() })
    }

    /// Adds a file with this text.
    ///
    /// # Errors
    /// If the archive cannot be written.
    pub(crate) fn add(&mut self, path: &str, text: &str) -> Result<()> {
        let text = redact(text, self.secrets);
        self.append(path, text.len() as u64, text.as_bytes())
    }

    /// Adds a file with the lines that `write` passes to its argument. They may be too many for the memory.
    ///
    /// # Errors
    /// If the archive or a temporary file cannot be written, or `write` fails.
    pub(crate) fn add_lines(
        &mut self,
        path: &str,
        write: impl FnOnce(&mut dyn FnMut(&str) -> Result<()>) -> Result<()>,
    ) -> Result<()> {
        let failed = || Error::io("write in", std::env::temp_dir());
        let mut file = BufWriter::new(tempfile::tempfile().map_err(failed())?);
        let mut redactor = Redactor::default();
        write(&mut |line| {
            let line = redactor.line(&without(line, self.secrets));
            file.write_all(line.as_bytes()).map_err(failed())
        })?;
        let mut file = file.into_inner().map_err(|e| failed()(e.into_error()))?;
        let size = file.stream_position().and_then(|size| file.rewind().map(|()| size)).map_err(failed())?;
        self.append(path, size, file)
    }

    fn append(&mut self, path: &str, size: u64, content: impl Read) -> Result<()> {
        let mut header = tar::Header::new_gnu();
        header.set_size(size);
        header.set_mode(0o600);
        let appended = self.tar.append_data(&mut header, format!("report/{path}"), content);
        appended.map_err(Error::io("write", self.path))?;
        self.files.push(path.to_owned());
        Ok(())
    }

    /// Completes the archive. Returns the paths of its files below `report/`.
    ///
    /// # Errors
    /// If the archive cannot be written.
    pub(crate) fn finish(self) -> Result<Vec<String>> {
        self.tar.into_inner().and_then(GzEncoder::finish).map_err(Error::io("write", self.path))?;
        Ok(self.files)
    }
}

/// Names in the step's message the machines that have not replied yet.
struct Asked<'a> {
    step: &'a Step,
    open: Mutex<Vec<&'a str>>,
}

impl<'a> Asked<'a> {
    fn new(step: &'a Step, nodes: impl Iterator<Item = &'a str>) -> Self {
        let asked = Self { step, open: Mutex::new(nodes.collect()) };
        asked.done("");
        asked
    }

    fn done(&self, node: &str) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|name| *name != node);
        self.step.message(&format!("asking {}", open.join(", ")));
    }
}

/// Creates or truncates a file, and sets mode 0600 also on an existing file. Journals may contain secrets that
/// [`redact`] does not find.
fn create_private(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.set_permissions(Permissions::from_mode(0o600))?;
    Ok(file)
}

/// Returns a node's files: path and content.
fn files_of(project: &Project, node: &Node) -> Vec<(String, String)> {
    let vm = Vm::at(&node.name, project.dir.join("build/vm").join(&node.name));
    let file = |name: &str, text: String| (format!("{}/{name}", node.name), text);
    let mut files = vec![file("console.txt", vm.console())];
    if !vm.is_running() {
        files.push(file("off.txt", "this machine is off\n".to_owned()));
        return files;
    }
    let mut wanted = EVERYWHERE.to_vec();
    for (role, more) in [("voter", ETCD), ("db", PATRONI), ("hub", HAPROXY)] {
        if node.has_role(role) {
            wanted.push(more);
        }
    }
    for (name, command) in wanted {
        // Compressed, because the serial port is slow.
        let command = command.replace("ADDRESS", &node.address.to_string());
        let result = vm.exec(&format!("{{ {command}; }} 2>&1 | gzip -c | base64 -w0"));
        let text = result.and_then(|done| {
            let action = format!("decode the output of `{command}` on {}", node.name);
            let packed = BASE64.decode(done.output.trim()).map_err(Error::cannot(&action))?;
            io::read_to_string(flate2::read::GzDecoder::new(&packed[..])).map_err(Error::cannot(&action))
        });
        files.push(file(name, text.unwrap_or_else(|e| format!("{}\n", e.chain()))));
    }
    files
}

/// Returns the journal lines of the agents and the daemons on all machines, sorted by time.
fn timeline(all: &[Vec<(String, String)>]) -> String {
    let journals = all.iter().flatten().filter(|(path, _)| path.ends_with("/journal.txt"));
    let mut lines: Vec<&str> = journals
        .flat_map(|(_, text)| text.lines())
        .filter(|line| {
            let unit = line.split_whitespace().nth(2).unwrap_or_default();
            ["firstboot[", "patroni[", "Keepalived", "etcd[", "haproxy[", "bird["].iter().any(|w| unit.starts_with(w))
        })
        .collect();
    // Each line begins with its time.
    lines.sort_unstable();
    lines.iter().map(|line| format!("{line}\n")).collect()
}

/// Returns every password of the fleet, those of the receivers of alerts, and that of the mail server.
pub(crate) fn passwords(project: &Project, secrets: &Secrets) -> Vec<String> {
    let topology = &project.topology;
    let key = secrets.alert_key();
    let of_alerts = topology.alert_secrets.values(key.as_ref(), &topology.name, &topology.alerts.secrets());
    let mail_key = secrets.mail_key();
    let hub_key = HubKey::derive(&topology.name, &secrets.etcd_root);
    let open = |name: &&str| String::from_utf8(topology.web_secrets.open(hub_key.as_ref()?, name)?).ok();
    let names = topology.hub_secret_names();
    let of_hubs = names.iter().filter_map(open);
    let of_mail = topology.mail_secrets.password(mail_key.as_ref(), &topology.name);
    let key = key.iter().map(|key| key.text().to_owned()).chain(mail_key.iter().map(|key| key.text().to_owned()));
    let value = serde_json::to_value(secrets).unwrap_or_default();
    let all = value.as_object().into_iter().flatten().filter_map(|(_, v)| v.as_str()).map(str::to_owned);
    // A configuration may have the secret as a string of JSON.
    let quoted = |text: &String| json!(text).to_string().trim_matches('"').to_owned();
    let of_alerts = of_alerts.into_values().flat_map(|text| [quoted(&text), text]);
    all.chain(key).chain(of_alerts).chain(of_hubs).chain([of_mail]).filter(|secret| !secret.is_empty()).collect()
}

/// Returns the text without passwords and private keys.
fn redact(text: &str, secrets: &[String]) -> String {
    let mut redactor = Redactor::default();
    without(text, secrets).split_inclusive('\n').map(|line| redactor.line(line)).collect()
}

fn without(text: &str, secrets: &[String]) -> String {
    secrets.iter().fold(text.to_owned(), |text, secret| text.replace(secret.as_str(), "(removed)"))
}

/// Removes private keys from lines.
#[derive(Default)]
struct Redactor {
    /// The line is one of a private key.
    inside: bool,
}

impl Redactor {
    fn line(&mut self, line: &str) -> String {
        let mut out = String::new();
        if line.contains("-----BEGIN") && line.contains("PRIVATE KEY") {
            self.inside = true;
            out += "(private key removed)\n";
        }
        if !self.inside {
            out += line;
        }
        if line.contains("-----END") {
            self.inside = false;
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removes_passwords_and_private_keys() {
        let dir = tempfile::tempdir().unwrap();
        let fleet = "name = \"acme\"\n[[alerts.slack]]\n[groups.hub]\ncount = 1\nendpoints = [\"hub.acme.com\"]\n";
        std::fs::write(dir.path().join("fleet.toml"), fleet).unwrap();
        let project = Project::load(dir.path()).unwrap();
        let secrets = passwords(&project, &Secrets::sample());
        assert!(secrets.contains(&"https://example.net/sample-slack".to_owned()), "{secrets:?}");
        let mut text = String::new();
        for secret in &secrets {
            text += &format!("password: {secret}!\n");
        }
        let kind = "PRIVATE KEY";
        text += &format!("-----BEGIN {kind}-----\nMIGH\n-----END {kind}-----\nafter\n");
        let redacted = redact(&text, &secrets);
        assert!(secrets.len() > 5 && secrets.iter().all(|s| !redacted.contains(s.as_str())), "{redacted}");
        assert!(!redacted.contains("MIGH") && redacted.ends_with("(private key removed)\nafter\n"), "{redacted}");
    }

    #[test]
    fn archive_has_texts_and_lines_without_secrets() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("report.tar.gz");
        let secrets = ["s3cret".to_owned()];
        let mut archive = Archive::create(&path, &secrets).unwrap();
        archive.add("board.txt", "a s3cret\n").unwrap();
        let kind = "PRIVATE KEY";
        let lines =
            ["one s3cret\n", &format!("-----BEGIN {kind}-----\n"), "MIGH\n", &format!("-----END {kind}-----\n")];
        archive.add_lines("timeline.txt", |write| lines.iter().try_for_each(|line| write(line))).unwrap();
        assert_eq!(archive.finish().unwrap(), ["board.txt", "timeline.txt"]);
        let mut tar = tar::Archive::new(flate2::read::GzDecoder::new(File::open(&path).unwrap()));
        let texts: Vec<String> =
            tar.entries().unwrap().map(|entry| io::read_to_string(entry.unwrap()).unwrap()).collect();
        assert_eq!(texts, ["a (removed)\n", "one (removed)\n(private key removed)\n"]);
    }

    #[test]
    fn only_the_owner_can_read_the_archive() {
        let dir = tempfile::tempdir().unwrap();
        let (new, old) = (dir.path().join("new"), dir.path().join("old"));
        std::fs::write(&old, "an earlier report").unwrap();
        std::fs::set_permissions(&old, Permissions::from_mode(0o644)).unwrap();
        for path in [&new, &old] {
            let meta = create_private(path).unwrap().metadata().unwrap();
            assert_eq!((meta.permissions().mode() & 0o777, meta.len()), (0o600, 0), "{}", path.display());
        }
    }

    #[test]
    fn timeline_merges_journals_by_time() {
        let of = |node: &str, lines: &str| vec![(format!("{node}/journal.txt"), lines.to_owned())];
        let text = timeline(&[
            of("a", "2026-01-01T00:00:02 a patroni[1]: two\n2026-01-01T00:00:03 a kernel: no\n"),
            of("b", "2026-01-01T00:00:01 b firstboot[1]: one\n"),
        ]);
        assert_eq!(text, "2026-01-01T00:00:01 b firstboot[1]: one\n2026-01-01T00:00:02 a patroni[1]: two\n");
    }
}
