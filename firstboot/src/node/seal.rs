//! Seals what a node keeps for this machine's TPM, if it has one. systemd does it
//! (`io.systemd.Credentials`, a Varlink service); the agent does not touch the TPM.
//!
//! Without a TPM nothing is sealed: systemd's key for that case lies on the same disk, and systemd
//! deletes it where the machine's id is another, so that a disk that was only tried in another machine
//! would no longer be a node in its own.

use std::fmt::Display;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use fleet::encoding;
use nix::errno::Errno;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};

/// A TPM takes a second for what it does; one that is silent for longer is asked again.
const PATIENCE: Duration = Duration::from_secs(120);

/// Where sealing is asked for.
#[derive(Clone, Debug)]
pub struct Sealer(PathBuf);

#[derive(Deserialize)]
struct Reply {
    error: Option<String>,
    #[serde(default)]
    parameters: Map<String, Value>,
}

impl Sealer {
    /// None without a TPM 2.0.
    #[must_use]
    pub fn of_node() -> Option<Self> {
        let has_tpm = fs::read_dir("/sys/class/tpmrm").is_ok_and(|mut all| all.next().is_some());
        has_tpm.then(|| Self("/run/systemd/io.systemd.Credentials".into()))
    }

    /// Seals bytes under a name, without which they don't open.
    ///
    /// # Errors
    /// systemd says no.
    pub fn seal(&self, name: &str, bytes: &[u8]) -> Result<String> {
        let open = json!({ "name": name, "data": encoding::encode(bytes) });
        self.call("Encrypt", &open, "blob")?.map_err(|why| {
            Error::Failed(format!(
                "{name} could not be sealed for this machine's TPM ({why}); clear the TPM, or switch it off, in the \
                 firmware's menu"
            ))
        })
    }

    /// # Errors
    /// It was sealed for another TPM, under another name, or was damaged.
    pub fn open(&self, name: &str, sealed: &str) -> Result<Vec<u8>> {
        let told = self.call("Decrypt", &json!({ "name": name, "blob": sealed }), "data")?;
        told.and_then(|data| encoding::decode(&data).ok_or_else(|| "no Base64".to_owned()))
            .map_err(|why| not_here(name, &why))
    }

    /// What systemd answers, or why it does not.
    fn call(&self, method: &str, parameters: &Value, field: &str) -> Result<Result<String, String>> {
        let call = json!({ "method": format!("io.systemd.Credentials.{method}"), "parameters": parameters });
        let mut reply = Vec::new();
        let mut exchange = || {
            let mut stream = UnixStream::connect(&self.0)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.write_all(format!("{call}\0").as_bytes())?;
            BufReader::new(stream).read_until(0, &mut reply)
        };
        exchange().map_err(Error::io("ask", &self.0))?;
        let broken = |e: &dyn Display| Error::Failed(format!("{}: {e}", self.0.display()));
        let whole = reply.strip_suffix(&[0]).ok_or_else(|| broken(&"no answer"))?;
        let reply: Reply = serde_json::from_slice(whole).map_err(|e| broken(&e))?;
        // What systemd makes of TPM_RC_LOCKOUT.
        if reply.parameters.get("errno").and_then(Value::as_i64) == Some(Errno::ENOLCK as i64) {
            return Err(Error::Failed(
                "this machine's TPM is locked: it takes power cuts for attempts to guess a password, and somebody gave \
                 it an owner's password; it opens by itself, in minutes or a day, and is asked until then"
                    .to_owned(),
            ));
        }
        Ok(match (reply.error, reply.parameters.get(field).and_then(Value::as_str)) {
            (None, Some(bytes)) => Ok(bytes.to_owned()),
            (error, _) => Err(error.unwrap_or_else(|| "an empty answer".to_owned())),
        })
    }
}

/// What was sealed does not open.
pub fn not_here(name: &str, why: &str) -> Error {
    Error::Failed(format!(
        "{name} was sealed for the TPM of another machine, or for this one's before it was cleared ({why}); put the \
         disk back where it was, or wipe /var to make this a new node"
    ))
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::path::Path;
    use std::thread;

    /// Answers as systemd does, with the name in the place of a key; a machine more is another one.
    pub fn machine(dir: &Path, number: u8) -> Sealer {
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
    fn what_is_sealed_opens_here_by_its_name_and_nowhere_else() {
        let dir = tempfile::tempdir().unwrap();
        let here = machine(dir.path(), 1);
        let sealed = here.seal("keys.json", b"secret").unwrap();
        assert_eq!(here.open("keys.json", &sealed).unwrap(), b"secret");
        for (machine, name) in [(&here, "state.json"), (&machine(dir.path(), 2), "keys.json")] {
            let e = machine.open(name, &sealed).unwrap_err();
            assert!(e.to_string().contains("TPM of another machine") && e.to_string().contains("NameMismatch"), "{e}");
            // It may be the TPM's mood: it is asked again.
            assert_eq!(e.exit_code(), 1);
        }
    }

    #[test]
    fn a_tpm_that_is_locked_is_not_another_machines() {
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
            assert!(e.to_string().contains("TPM is locked") && e.exit_code() == 1, "{e}");
        }
        answers.join().unwrap();
    }

    #[test]
    fn without_an_answer_nothing_is_guessed() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("nobody");
        assert!(Sealer(socket.clone()).seal("x", b"").unwrap_err().to_string().starts_with("cannot ask "));
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
