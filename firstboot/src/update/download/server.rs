//! The update folder, for systemd-sysupdate on this machine alone: what is in it, as it is there;
//! but of what this node has most blocks of, only the others are loaded.

use std::fs::{self, File};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use fleet::blocks::{Blocks, missing, pieces};
use futures_util::stream::try_unfold;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

use super::assembly::BlockReader;
use super::upstream::Upstream;
use crate::error::{Error, Result};

/// What systemd-sysupdate reads first.
const SUMS: &str = "SHA256SUMS";
const LONGEST_SUMS: usize = 1 << 20;
/// Of a root of 8 GB; it is held in memory.
const LONGEST_TREE: usize = 66 << 20;
/// Of a kernel with its initrd of 2 GB.
const LONGEST_LIST: usize = 16 << 20;

type Body = UnsyncBoxBody<Bytes, Error>;

/// What this node has.
pub(super) struct LocalImage {
    /// The root that runs, as dm-verity lets it be read.
    pub root: PathBuf,
    pub tree: PathBuf,
    /// The boot entry of what runs.
    pub uki: PathBuf,
    /// By whom TLS servers of the world are believed.
    pub authorities: PathBuf,
}

pub(super) struct Server {
    upstream: Arc<Upstream>,
    here: LocalImage,
    /// The hash tree that came last, by its name: it is asked for twice.
    tree: Mutex<Option<(String, Bytes)>>,
}

impl Server {
    pub(super) fn of(url: &str, here: LocalImage) -> Result<Self> {
        Ok(Self { upstream: Arc::new(Upstream::of(url, &here.authorities)?), here, tree: Mutex::default() })
    }

    /// Serves until it is dropped.
    pub(super) async fn serve(self, listener: TcpListener) {
        let server = Arc::new(self);
        while let Ok((tcp, _)) = listener.accept().await {
            let server = server.clone();
            tokio::spawn(async move {
                let service = service_fn(|request| {
                    let server = server.clone();
                    async move {
                        let answer = server.answer(&request).await.unwrap_or_else(|e| {
                            println!("{e}");
                            refused(StatusCode::BAD_GATEWAY)
                        });
                        Ok::<_, Error>(answer)
                    }
                });
                let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(tcp), service).await;
            });
        }
    }

    async fn answer(&self, request: &Request<Incoming>) -> Result<Response<Body>> {
        let name = request.uri().path().trim_start_matches('/');
        if request.method() != Method::GET || name.is_empty() || name.contains('/') {
            return Ok(refused(StatusCode::NOT_FOUND));
        }
        if name.ends_with(".verity.raw") {
            let tree = self.tree(name).await?;
            return Ok(Response::new(Full::new(tree).map_err(|e| match e {}).boxed_unsync()));
        }
        match self.put_together(name).await {
            Ok(Some(answer)) => return Ok(answer),
            Ok(None) => {}
            Err(e) => println!("{name} is loaded whole: {e}"),
        }
        let mut connection = self.upstream.connect().await?;
        Ok(passed_on(self.upstream.get(&mut connection, name, None).await?))
    }

    /// A root or a boot entry; none for what is small.
    async fn put_together(&self, name: &str) -> Result<Option<Response<Body>>> {
        let none = |what: &str| Error::Failed(format!("{what} has no hashes that are known here"));
        let (path, old, new) = if let Some(stem) = name.strip_suffix(".root.raw") {
            let tree = self.tree(&self.tree_beside(stem).await?).await?;
            let new = Blocks::of_tree(&tree).ok_or_else(|| none(name))?;
            let own = fs::read(&self.here.tree).map_err(Error::io("read", &self.here.tree))?;
            (&self.here.root, Blocks::of_tree(&own).ok_or_else(|| none("what runs"))?, new)
        } else if let Some(stem) = name.strip_suffix(".efi") {
            let list = self.upstream.read(&format!("{stem}.blocks"), LONGEST_LIST).await?;
            let new = Blocks::of_list(&list).ok_or_else(|| none(name))?;
            let own = fs::read(&self.here.uki).map_err(Error::io("read", &self.here.uki))?;
            (&self.here.uki, Blocks::of_bytes(&own), new)
        } else {
            return Ok(None);
        };
        let pieces = pieces(&old, &new);
        let first = pieces.iter().find(|p| p.here.is_none()).map(|p| (p.at, p.len));
        println!("{name}: {:.1} of {:.1} MB are loaded", missing(&pieces) as f64 / 1e6, new.size as f64 / 1e6);
        let here = File::open(path).map_err(Error::io("open", path))?;
        if let Some(part) = first {
            // A server that has no parts sends the whole file.
            let mut connection = self.upstream.connect().await?;
            let answer = self.upstream.get(&mut connection, name, Some((part.0, 1))).await?;
            if answer.status() != StatusCode::PARTIAL_CONTENT {
                println!("{name} is loaded whole: the server has no parts of files");
                return Ok(Some(passed_on(answer)));
            }
        }
        let assembly = BlockReader::of(pieces, here, self.upstream.clone(), name);
        let bytes = try_unfold(assembly, |mut assembly| async {
            Ok(assembly.next().await?.map(|bytes| (Frame::data(bytes), assembly)))
        });
        let mut answer = Response::new(StreamBody::new(bytes).boxed_unsync());
        answer.headers_mut().insert("content-length", new.size.into());
        Ok(Some(answer))
    }

    /// The name of the hash tree of a root: `ID_VERSION_UUID`, where the UUID is the tree's own.
    async fn tree_beside(&self, root: &str) -> Result<String> {
        let sums = self.upstream.read(SUMS, LONGEST_SUMS).await?;
        let stem = root.rsplit_once('_').map_or(root, |(stem, _)| stem);
        let is_it = |name: &&str| {
            let uuid = name.strip_prefix(stem).and_then(|n| n.strip_prefix('_')?.strip_suffix(".verity.raw"));
            uuid.is_some_and(|u| !u.contains('_'))
        };
        let sums = String::from_utf8_lossy(&sums);
        let found = sums.lines().filter_map(|line| Some(line.split_once("  ")?.1)).find(is_it);
        Ok(found.ok_or_else(|| Error::Failed(format!("{SUMS} has no hash tree of it")))?.to_owned())
    }

    async fn tree(&self, name: &str) -> Result<Bytes> {
        let last = || self.tree.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, tree)) = last().as_ref().filter(|(n, _)| n == name) {
            return Ok(tree.clone());
        }
        let tree = self.upstream.read(name, LONGEST_TREE).await?;
        *last() = Some((name.to_owned(), tree.clone()));
        Ok(tree)
    }
}

fn refused(status: StatusCode) -> Response<Body> {
    let mut refused = Response::new(Full::default().map_err(|e| match e {}).boxed_unsync());
    *refused.status_mut() = status;
    refused
}

/// The server's own answer.
fn passed_on(answer: Response<Incoming>) -> Response<Body> {
    let status = answer.status();
    let length = answer.headers().get("content-length").cloned();
    let body = answer.into_body().map_err(|e| Error::Failed(e.to_string())).boxed_unsync();
    let mut passed = Response::new(body);
    *passed.status_mut() = status;
    if let Some(length) = length {
        passed.headers_mut().insert("content-length", length);
    }
    passed
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet::blocks::BLOCK;
    use fleet_https::Identity;
    use std::collections::BTreeMap;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    use tokio_rustls::TlsAcceptor;
    use tokio_rustls::rustls::ServerConfig;

    /// A server of files, as an operator might have.
    struct Folder {
        files: BTreeMap<String, Vec<u8>>,
        has_parts: bool,
        /// The next answer breaks off in its middle.
        breaks: AtomicBool,
        sent: AtomicU64,
    }

    impl Folder {
        /// With an image's boot entry.
        fn of(uki: &[u8]) -> Self {
            let files = [("a_2.efi", uki.to_vec()), ("a_2.blocks", Blocks::of_bytes(uki).list())];
            Self {
                files: files.map(|(name, bytes)| (format!("/db/{name}"), bytes)).into(),
                has_parts: true,
                breaks: AtomicBool::new(false),
                sent: AtomicU64::new(0),
            }
        }

        fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
            let mut answer = Response::new(Full::default());
            let Some(file) = self.files.get(request.uri().path()) else {
                *answer.status_mut() = StatusCode::NOT_FOUND;
                return answer;
            };
            let range = request.headers().get("range").filter(|_| self.has_parts);
            let range = range.map(|r| r.to_str().unwrap().strip_prefix("bytes=").unwrap().split_once('-').unwrap());
            let mut bytes = &file[..];
            if let Some((from, to)) = range {
                bytes = &file[from.parse().unwrap()..=to.parse().unwrap()];
                *answer.status_mut() = StatusCode::PARTIAL_CONTENT;
            }
            answer.headers_mut().insert("content-length", bytes.len().into());
            if bytes.len() > 1 && self.breaks.swap(false, Ordering::Relaxed) {
                bytes = &bytes[..bytes.len() / 2];
            }
            self.sent.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            *answer.body_mut() = Full::new(bytes.to_vec().into());
            answer
        }

        /// Its address.
        async fn open(self: Arc<Self>, tls: Option<Arc<ServerConfig>>) -> String {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let at = listener.local_addr().unwrap();
            let scheme = if tls.is_some() { "https" } else { "http" };
            tokio::spawn(async move {
                while let Ok((tcp, _)) = listener.accept().await {
                    let folder = self.clone();
                    let service = service_fn(move |request| {
                        let answer = folder.answer(&request);
                        async move { Ok::<_, Error>(answer) }
                    });
                    let http = hyper::server::conn::http1::Builder::new();
                    let Some(tls) = tls.clone() else {
                        tokio::spawn(http.serve_connection(TokioIo::new(tcp), service));
                        continue;
                    };
                    // Who does not believe it hangs up.
                    if let Ok(stream) = TlsAcceptor::from(tls).accept(tcp).await {
                        tokio::spawn(http.serve_connection(TokioIo::new(stream), service));
                    }
                }
            });
            format!("{scheme}://{at}/db/")
        }
    }

    /// What a node with the entry `own` gets.
    async fn loaded(folder: &Arc<Folder>, own: &[u8], name: &str) -> (StatusCode, Vec<u8>) {
        loaded_from(&folder.clone().open(None).await, "", own, name).await
    }

    /// The same where TLS servers are believed by `authorities` (PEM).
    async fn loaded_from(url: &str, authorities: &str, own: &[u8], name: &str) -> (StatusCode, Vec<u8>) {
        let dir = tempfile::tempdir().unwrap();
        let (uki, pem) = (dir.path().join("own.efi"), dir.path().join("authorities.pem"));
        fs::write(&uki, own).unwrap();
        fs::write(&pem, authorities).unwrap();
        let here = LocalImage { root: "/nowhere".into(), tree: "/nowhere".into(), uki, authorities: pem.clone() };
        let server = Server::of(url, here).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let serving = tokio::spawn(server.serve(listener));
        let upstream = Upstream::of(&format!("http://{at}/"), &pem).unwrap();
        let mut connection = upstream.connect().await.unwrap();
        let answer = upstream.get(&mut connection, name, None).await.unwrap();
        let status = answer.status();
        let bytes = answer.into_body().collect().await.map(|b| b.to_bytes().to_vec()).unwrap_or_default();
        serving.abort();
        (status, bytes)
    }

    /// Two versions: one block in the middle is another.
    fn versions() -> (Vec<u8>, Vec<u8>) {
        let block = |i: usize| vec![(i % 251) as u8 ^ (i / 251) as u8; BLOCK];
        let old: Vec<u8> = (0..1000).flat_map(block).chain([7; 99]).collect();
        let mut new = old.clone();
        new[500 * BLOCK + 17] ^= 1;
        (old, new)
    }

    #[tokio::test]
    async fn only_what_differs_is_loaded() {
        let (old, new) = versions();
        let folder = Arc::new(Folder::of(&new));
        let (status, bytes) = loaded(&folder, &old, "a_2.efi").await;
        assert!(status == StatusCode::OK && bytes == new);
        let list = folder.files["/db/a_2.blocks"].len() as u64;
        assert_eq!(folder.sent.load(Ordering::Relaxed), list + 1 + BLOCK as u64);
    }

    #[tokio::test]
    async fn over_tls_only_from_whom_the_world_believes() {
        let (old, new) = versions();
        let folder = Arc::new(Folder::of(&new));
        let fleet = fleet::Fleet::parse("f", b"name = \"acme\"\n[groups]\nhub.count = 1\n").unwrap();
        let topology = fleet::Topology::of(&fleet);
        let (authority, other) = (fleet::Issuer::root("world").unwrap(), fleet::Issuer::root("world").unwrap());
        let key = fleet::PrivateKey::generate().unwrap();
        let cert = authority.node(&topology, &topology.nodes[0], &key.public().unwrap()).unwrap();
        let own = Identity { cert: &cert, key: key.pem() };
        let url = folder.clone().open(Some(fleet_https::server(authority.certificate(), own).unwrap())).await;
        let (status, bytes) = loaded_from(&url, authority.certificate(), &old, "a_2.efi").await;
        assert!(status == StatusCode::OK && bytes == new);
        let list = folder.files["/db/a_2.blocks"].len() as u64;
        assert_eq!(folder.sent.load(Ordering::Relaxed), list + 1 + BLOCK as u64);
        // A Debian's own list of them, of more than a hundred.
        fleet_https::client(&fs::read_to_string(super::super::sysupdate::AUTHORITIES).unwrap(), None).unwrap();
        assert_ne!(loaded_from(&url, other.certificate(), &old, "a_2.efi").await.0, StatusCode::OK);
    }

    #[tokio::test]
    async fn a_connection_that_breaks_is_made_again() {
        let (old, new) = versions();
        let folder = Arc::new(Folder::of(&new));
        // Not while the list comes: then the whole would be loaded.
        let breaking = folder.clone();
        tokio::spawn(async move {
            while breaking.sent.load(Ordering::Relaxed) <= 1000 * 32 {
                tokio::task::yield_now().await;
            }
            breaking.breaks.store(true, Ordering::Relaxed);
        });
        let (status, bytes) = loaded(&folder, &old, "a_2.efi").await;
        assert!(status == StatusCode::OK && bytes == new);
        assert!(!folder.breaks.load(Ordering::Relaxed), "nothing broke");
    }

    #[tokio::test]
    async fn a_server_without_parts_or_hashes_sends_the_whole() {
        let (old, new) = versions();
        let mut folder = Folder::of(&new);
        folder.has_parts = false;
        assert!(loaded(&Arc::new(folder), &old, "a_2.efi").await == (StatusCode::OK, new.clone()));
        let mut folder = Folder::of(&new);
        folder.files.remove("/db/a_2.blocks");
        assert!(loaded(&Arc::new(folder), &old, "a_2.efi").await == (StatusCode::OK, new));
    }

    #[tokio::test]
    async fn what_is_not_there_is_not_here() {
        let (old, new) = versions();
        let folder = Arc::new(Folder::of(&new));
        for name in ["a_3.efi", "a_3_1.root.raw", "a_3_1.verity.raw", "SHA256SUMS"] {
            assert_ne!(loaded(&folder, &old, name).await.0, StatusCode::OK, "{name}");
        }
    }
}
