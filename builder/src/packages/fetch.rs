//! Downloads packages into the store, in parallel. Resumes interrupted transfers, and verifies each package against the
//! lock's size and sha256.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use sha2::{Digest as _, Sha256};
use ureq::Agent;

use crate::error::{Cause, Error, Result};
use crate::packages::lock::Package;
use crate::packages::mirror::Mirror;
use crate::progress::{Progress, Step};
use crate::store::{Kind, Store};
use crate::util::digest::hex;

const CONNECTIONS: usize = 8;
const ATTEMPTS: u32 = 4;

/// Downloads the packages that the store does not have. Returns their number.
///
/// # Errors
/// If all attempts to download a package fail. The error names the package.
pub(crate) fn fetch(packages: &[&Package], mirror: &Mirror, store: &Store, progress: &Progress) -> Result<usize> {
    let missing: Vec<&Package> = {
        let mut seen = std::collections::BTreeSet::new();
        packages
            .iter()
            .copied()
            .filter(|p| seen.insert(&p.sha256) && store.get(Kind::Deb, &p.sha256).is_none())
            .collect()
    };
    if missing.is_empty() {
        return Ok(0);
    }
    let total: u64 = missing.iter().map(|p| p.size).sum();
    let step = progress.bytes("fetch", total);
    let fetcher = Fetcher { mirror, store, step: &step };
    let (next, stop, failure) = (AtomicUsize::new(0), AtomicBool::new(false), Mutex::new(None));
    std::thread::scope(|scope| {
        for _ in 0..CONNECTIONS.min(missing.len()) {
            scope.spawn(|| {
                let mut agents = Agents::default();
                while !stop.load(Ordering::Relaxed) {
                    let Some(package) = missing.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
                    if let Err(e) = fetcher.package(package, &mut agents) {
                        stop.store(true, Ordering::Relaxed);
                        failure.lock().unwrap_or_else(std::sync::PoisonError::into_inner).get_or_insert(e);
                    }
                }
            });
        }
    });
    if let Some(e) = failure.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
        return Err(e);
    }
    step.done(&format!("{} packages, {:.1} MB", missing.len(), total as f64 / 1e6));
    Ok(missing.len())
}

#[derive(Default)]
struct Agents(std::collections::BTreeMap<String, Agent>);

impl Agents {
    fn for_scheme(&mut self, scheme: &str, mirror: &Mirror) -> Result<&Agent> {
        if !self.0.contains_key(scheme) {
            let mut config = Agent::config_builder()
                .timeout_connect(Some(Duration::from_secs(20)))
                .timeout_recv_response(Some(Duration::from_secs(60)))
                .user_agent(concat!("bakehouse/", env!("CARGO_PKG_VERSION")));
            if let Some(proxy) = mirror.proxy(scheme) {
                let proxy = ureq::Proxy::new(&proxy).map_err(Error::cannot(format!("use apt's proxy `{proxy}`")))?;
                config = config.proxy(Some(proxy));
            }
            self.0.insert(scheme.to_owned(), config.build().new_agent());
        }
        Ok(&self.0[scheme])
    }
}

struct Fetcher<'a> {
    mirror: &'a Mirror,
    store: &'a Store,
    step: &'a Step,
}

/// Why an attempt failed.
enum FetchError {
    /// Another attempt may succeed.
    Retry(Cause),
    /// Another attempt would fail, too.
    Permanent(Cause),
}

impl Fetcher<'_> {
    fn package(&self, package: &Package, agents: &mut Agents) -> Result<()> {
        let _guard = self.store.lock(Kind::Deb, &package.sha256)?;
        if self.store.get(Kind::Deb, &package.sha256).is_some() {
            self.step.advance(package.size);
            return Ok(());
        }
        self.step.message(&package.name);
        let url = self.mirror.url(&package.archive, &package.path)?;
        // The name has no process id: the next process that holds the lock resumes the transfer.
        let part = self.store.path(Kind::Deb, &package.sha256).with_extension("part");
        let mut counted = 0;
        let mut why = Cause::from("no attempt was made");
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                std::thread::sleep(Duration::from_millis(250 << (2 * attempt)));
            }
            match self.attempt(package, &url, &part, agents, &mut counted) {
                Ok(()) => {
                    let file = File::open(&part).map_err(Error::io("open", &part))?;
                    file.sync_data().map_err(Error::io("sync", &part))?;
                    self.store.put(Kind::Deb, &package.sha256, &part)?;
                    return Ok(());
                }
                Err(FetchError::Retry(e)) => why = e,
                Err(FetchError::Permanent(e)) => {
                    why = e;
                    break;
                }
            }
        }
        let package = format!("{} {}", package.name, package.version);
        Err(Error::Download { package, url, source: why })
    }

    fn attempt(
        &self,
        package: &Package,
        url: &str,
        part: &Path,
        agents: &mut Agents,
        counted: &mut u64,
    ) -> Result<(), FetchError> {
        let disk = |e: io::Error| FetchError::Permanent(Error::cannot("write to the store")(e).into());
        let mut hash = Sha256::new();
        let mut file = OpenOptions::new().create(true).read(true).append(true).open(part).map_err(disk)?;
        let mut have = file.metadata().map_err(disk)?.len();
        if have > package.size {
            file.set_len(0).map_err(disk)?;
            have = 0;
        }
        if have > 0 {
            let mut buffer = Vec::new();
            file.read_to_end(&mut buffer).map_err(disk)?;
            hash.update(&buffer);
        }
        if have < package.size {
            let (mut body, resumed) = self.open(url, have, part, agents)?;
            if !resumed && have > 0 {
                file.set_len(0).map_err(disk)?;
                hash = Sha256::new();
                have = 0;
            }
            self.count(have, counted);
            let mut buffer = vec![0; 1 << 16];
            loop {
                let n = body
                    .read(&mut buffer)
                    .map_err(|e| FetchError::Retry(Error::at("the transfer failed")(e).into()))?;
                if n == 0 {
                    break;
                }
                have += n as u64;
                if have > package.size {
                    let _ = fs::remove_file(part);
                    return Err(FetchError::Retry(
                        format!("the mirror sent more than the {} bytes in the lock", package.size).into(),
                    ));
                }
                hash.update(&buffer[..n]);
                file.write_all(&buffer[..n]).map_err(disk)?;
                self.count(have, counted);
            }
        }
        if have < package.size {
            return Err(FetchError::Retry(
                format!("the mirror sent {have} bytes, but the lock has {}", package.size).into(),
            ));
        }
        let got = hex(&hash.finalize());
        if got != package.sha256 {
            let _ = fs::remove_file(part);
            return Err(FetchError::Retry(
                format!("the mirror's file has sha256 {got}, but the lock has {}", package.sha256).into(),
            ));
        }
        Ok(())
    }

    /// Advances the bar by the new bytes of a package. Repeated bytes do not count.
    fn count(&self, have: u64, counted: &mut u64) {
        if have > *counted {
            self.step.advance(have - *counted);
            *counted = have;
        }
    }

    fn open(
        &self,
        url: &str,
        from: u64,
        scratch: &Path,
        agents: &mut Agents,
    ) -> Result<(Box<dyn Read>, bool), FetchError> {
        let scheme = url.split(':').next().unwrap_or_default();
        if let Some(path) = url.strip_prefix("file://").or_else(|| url.strip_prefix("file:")) {
            let file = File::open(path).map_err(|e| FetchError::Permanent(e.into()))?;
            return Ok((Box::new(file), false));
        }
        if scheme != "http" {
            return apt_helper(url, scratch).map(|file| (Box::new(file) as Box<dyn Read>, false));
        }
        let agent = agents.for_scheme(scheme, self.mirror).map_err(|e| FetchError::Permanent(e.into()))?;
        let mut request = agent.get(url);
        if from > 0 {
            request = request.header("Range", format!("bytes={from}-"));
        }
        match request.call() {
            Ok(response) => {
                let resumed = response.status() == 206;
                Ok((Box::new(response.into_body().into_reader()), resumed))
            }
            Err(ureq::Error::StatusCode(404)) => Err(FetchError::Permanent(
                "the mirror no longer has it (404); update the lock with `bakehouse lock --update`".into(),
            )),
            Err(ureq::Error::StatusCode(code @ (400..=407 | 410))) => {
                Err(FetchError::Permanent(format!("the mirror returned HTTP {code}; check its address").into()))
            }
            Err(e) => Err(FetchError::Retry(e.into())),
        }
    }
}

/// Downloads other kinds of addresses with apt, which has the TLS settings, credentials and certificates of the host's
/// administrator.
fn apt_helper(url: &str, beside: &Path) -> Result<File, FetchError> {
    let path = beside.with_extension("apt");
    let _ = fs::remove_file(&path);
    let result = Command::new("/usr/lib/apt/apt-helper").args(["-qq", "download-file", url]).arg(&path).output();
    let output =
        result.map_err(|e| FetchError::Permanent(Error::cannot("run apt-helper\n  help: install apt")(e).into()))?;
    let file = File::open(&path);
    let _ = fs::remove_file(&path);
    match file {
        Ok(file) if output.status.success() => Ok(file),
        _ => Err(FetchError::Retry(String::from_utf8_lossy(&output.stderr).trim().into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::util::digest::sha256;
    use std::io::{BufRead, BufReader};
    use std::net::TcpListener;
    use std::sync::Arc;

    /// A mirror on loopback that answers each connection's request with the next of `replies`.
    fn mirror(replies: Vec<Vec<u8>>) -> (Mirror, Arc<Mutex<Vec<String>>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let log = requests.clone();
        std::thread::spawn(move || {
            for (reply, stream) in replies.into_iter().zip(listener.incoming()) {
                let mut stream = stream.unwrap();
                let mut request = String::new();
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                while !request.ends_with("\r\n\r\n") {
                    reader.read_line(&mut request).unwrap();
                }
                log.lock().unwrap().push(request);
                stream.write_all(&reply).unwrap();
            }
        });
        (Mirror { archives: [("debian".to_owned(), base)].into(), ..Mirror::default() }, requests)
    }

    fn ok(body: &[u8], length: usize) -> Vec<u8> {
        [format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n").as_bytes(), body].concat()
    }

    fn package(body: &[u8]) -> Package {
        Package {
            name: "thing".to_owned(),
            version: "1".to_owned(),
            arch: "all".to_owned(),
            suite: "s".to_owned(),
            archive: "debian".to_owned(),
            path: "pool/thing.deb".to_owned(),
            sha256: sha256(body),
            size: body.len() as u64,
            installed_size: 1,
            essential: false,
        }
    }

    fn run(replies: Vec<Vec<u8>>, body: &[u8]) -> (Result<usize>, Vec<String>, Option<Vec<u8>>) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(dir.path()).unwrap();
        let (mirror, requests) = mirror(replies);
        let package = package(body);
        let result = fetch(&[&package], &mirror, &store, &Progress::new(true, false));
        let stored = store.get(Kind::Deb, &package.sha256).map(|p| fs::read(p).unwrap());
        let requests = requests.lock().unwrap().clone();
        (result, requests, stored)
    }

    #[test]
    fn resumes_interrupted_transfer() {
        let body = b"0123456789";
        let rest = b"HTTP/1.1 206 Partial Content\r\ncontent-length: 6\r\nconnection: close\r\n\r\n456789".to_vec();
        let (result, requests, stored) = run(vec![ok(b"0123", 10), rest], body);
        assert_eq!(result.unwrap(), 1);
        assert!(requests[1].to_lowercase().contains("range: bytes=4-"), "{requests:?}");
        assert_eq!(stored.unwrap(), body);
    }

    #[test]
    fn retries_and_never_stores_wrong_bytes() {
        let body = b"0123456789";
        let (result, requests, stored) = run(vec![ok(b"012345678X", 10), ok(body, 10)], body);
        assert_eq!(result.unwrap(), 1);
        assert_eq!(requests.len(), 2);
        assert_eq!(stored.unwrap(), body);
    }

    #[test]
    fn error_names_package_and_hash() {
        let (result, requests, stored) = run(vec![ok(b"012345678X", 10); 4], b"0123456789");
        let message = result.unwrap_err().chain();
        assert!(message.contains("thing 1") && message.contains("sha256"), "{message}");
        assert_eq!((requests.len(), stored), (4, None));
    }

    #[test]
    fn missing_file_is_not_retried() {
        let gone = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".to_vec();
        let (result, requests, _) = run(vec![gone; 4], b"0123456789");
        assert!(result.unwrap_err().chain().contains("bakehouse lock --update"));
        assert_eq!(requests.len(), 1);
    }
}
