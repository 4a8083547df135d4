//! Seals a node's state to the machine's TPM 2.0, if there is one. The agent calls systemd's Varlink service
//! [`io.systemd.Credentials`], and does not access the TPM itself.
//!
//! Without a TPM the agent seals nothing. systemd's key for that case is on the same disk, and systemd deletes it when
//! the machine id changes. A disk that was only tried in another machine could then not return to its own.
//!
//! [`io.systemd.Credentials`]: https://systemd.io/CREDENTIALS/

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use fleet::encoding;
use fleet_https::Cause;
use nix::errno::Errno;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};

/// Longest wait for a reply. A TPM usually needs about a second. The agent retries after this time.
const TIMEOUT: Duration = Duration::from_secs(120);

/// Client of the sealing service: the path of its socket.
#[derive(Clone, Debug)]
pub struct Sealer(PathBuf);

#[derive(Deserialize)]
struct Reply {
    error: Option<String>,
    #[serde(default)]
    parameters: Map<String, Value>,
}

impl Sealer {
    /// Returns the sealer of this machine; `None` without a TPM 2.0.
    #[must_use]
    pub fn for_node() -> Option<Self> {
        let has_tpm = fs::read_dir("/sys/class/tpmrm").is_ok_and(|mut all| all.next().is_some());
        has_tpm.then(|| Self("/run/systemd/io.systemd.Credentials".into()))
    }

    /// Seals bytes under a name. They open only under the same name.
    ///
    /// # Errors
    /// If systemd does not reply, or cannot seal the bytes.
    pub fn seal(&self, name: &str, bytes: &[u8]) -> Result<String> {
        let open = json!({ "name": name, "data": encoding::encode(bytes) });
        self.call("Encrypt", &open, "blob").map_err(|e| match e {
            Error::Credential(_) => Error::cannot(format!(
                "seal {name} for this machine's TPM\n  help: clear the TPM, or switch it off, in the firmware's menu"
            ))(e),
            e => e,
        })
    }

    /// Opens sealed bytes.
    ///
    /// # Errors
    /// If systemd does not reply, or the bytes were sealed to another TPM, under another name, or are damaged.
    pub fn open(&self, name: &str, sealed: &str) -> Result<Vec<u8>> {
        let data = self.call("Decrypt", &json!({ "name": name, "blob": sealed }), "data").map_err(|e| match e {
            Error::Credential(_) => elsewhere(name, e),
            e => e,
        })?;
        encoding::decode(&data).ok_or_else(|| elsewhere(name, "the reply is not base64"))
    }

    /// Calls a method. Returns `field` of the reply.
    ///
    /// # Errors
    /// [`Error::Credential`] if systemd returns an error; another error if systemd does not reply.
    fn call(&self, method: &str, parameters: &Value, field: &str) -> Result<String> {
        let call = json!({ "method": format!("io.systemd.Credentials.{method}"), "parameters": parameters });
        let mut reply = Vec::new();
        let mut exchange = || {
            let mut stream = UnixStream::connect(&self.0)?;
            stream.set_read_timeout(Some(TIMEOUT))?;
            stream.write_all(format!("{call}\0").as_bytes())?;
            BufReader::new(stream).read_until(0, &mut reply)
        };
        exchange().map_err(Error::io("ask", &self.0))?;
        let to = self.0.display().to_string();
        let whole = reply.strip_suffix(&[0]).ok_or_else(|| Error::network(&to, "no reply"))?;
        let reply: Reply = serde_json::from_slice(whole).map_err(|e| Error::network(&to, e))?;
        // systemd returns this error for TPM_RC_LOCKOUT.
        if reply.parameters.get("errno").and_then(Value::as_i64) == Some(Errno::ENOLCK as i64) {
            return Err(Error::Failed(
                "this machine's TPM is locked: it counts power losses as failed authorizations, and it has an owner \
                 password, so the agent cannot reset the lock; the agent tries again until the TPM unlocks, in minutes \
                 or a day"
                    .to_owned(),
            ));
        }
        match (reply.error, reply.parameters.get(field).and_then(Value::as_str)) {
            (None, Some(bytes)) => Ok(bytes.to_owned()),
            (error, _) => Err(Error::Credential(error.unwrap_or_else(|| "the reply is empty".to_owned()))),
        }
    }
}

/// Returns the error for sealed bytes that do not open.
pub(crate) fn elsewhere(name: &str, cause: impl Into<Cause>) -> Error {
    Error::Elsewhere { name: name.to_owned(), source: cause.into() }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::path::Path;
    use std::thread;

    /// Serves the protocol of systemd. The machine's number and the name take the place of a key.
    pub(crate) fn machine(dir: &Path, number: u8) -> Sealer {
        let socket = dir.join(format!("credentials-{number}"));
        let listener = UnixListener::bind(&socket).unwrap();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let mut call = Vec::new();
                BufReader::new(&stream).read_until(0, &mut call).unwrap();
                let call: Value = serde_json::from_slice(call.strip_suffix(&[0]).unwrap()).unwrap();
                let text = |field: &str| call["parameters"][field].as_str().unwrap_or_default().to_owned();
                let mark = format!("{number} {} ", text("name"));
                let reply = match call["method"].as_str().unwrap() {
                    "io.systemd.Credentials.Encrypt" => {
                        let sealed = [mark.as_bytes(), &encoding::decode(&text("data")).unwrap()].concat();
                        json!({ "parameters": { "blob": encoding::encode(&sealed) } })
                    }
                    "io.systemd.Credentials.Decrypt" => {
                        match encoding::decode(&text("blob")).unwrap().strip_prefix(mark.as_bytes()) {
                            Some(open) => json!({ "parameters": { "data": encoding::encode(open) } }),
                            None => json!({ "error": "io.systemd.Credentials.NameMismatch", "parameters": {} }),
                        }
                    }
                    other => panic!("{other}"),
                };
                (&stream).write_all(format!("{reply}\0").as_bytes()).unwrap();
            }
        });
        Sealer(socket)
    }

    #[test]
    fn sealed_bytes_open_only_here_and_under_their_name() {
        let dir = tempfile::tempdir().unwrap();
        let here = machine(dir.path(), 1);
        let sealed = here.seal("keys.json", b"secret").unwrap();
        assert_eq!(here.open("keys.json", &sealed).unwrap(), b"secret");
        for (machine, name) in [(&here, "state.json"), (&machine(dir.path(), 2), "keys.json")] {
            let e = machine.open(name, &sealed).unwrap_err();
            assert!(e.chain().contains("TPM of another machine") && e.chain().contains("NameMismatch"), "{e}");
            // The TPM's error may be temporary, so the agent retries.
            assert_eq!(e.exit_code(), 1);
        }
    }

    #[test]
    fn locked_tpm_differs_from_another_machines() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("locked");
        let listener = UnixListener::bind(&socket).unwrap();
        let answers = thread::spawn(move || {
            for stream in listener.incoming().take(2).flatten() {
                BufReader::new(&stream).read_until(0, &mut Vec::new()).unwrap();
                let reply = json!({ "error": "io.systemd.System", "parameters": { "errno": 37 } });
                (&stream).write_all(format!("{reply}\0").as_bytes()).unwrap();
            }
        });
        let locked = Sealer(socket);
        for e in [locked.open("keys.json", "").unwrap_err(), locked.seal("keys.json", b"").map(drop).unwrap_err()] {
            assert!(e.chain().contains("TPM is locked") && e.exit_code() == 1, "{e}");
        }
        answers.join().unwrap();
    }

    #[test]
    fn invalid_replies_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        assert!(Sealer(socket.clone()).seal("x", b"").unwrap_err().chain().starts_with("cannot ask "));
        for reply in ["", "{}", "{}\0", "nonsense\0", "{\"parameters\":{\"blob\":7}}\0"] {
            let listener = UnixListener::bind(&socket).unwrap();
            let answers = thread::spawn(move || {
                let (stream, _) = listener.accept().unwrap();
                BufReader::new(&stream).read_until(0, &mut Vec::new()).unwrap();
                (&stream).write_all(reply.as_bytes()).unwrap();
            });
            Sealer(socket.clone()).seal("x", b"").unwrap_err();
            answers.join().unwrap();
            fs::remove_file(&socket).unwrap();
        }
    }
}
