//! Serves the update folder to systemd-sysupdate on this machine. For a root file system or a boot entry, the server
//! downloads only the blocks that the running image does not have.

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
use tracing::{error, info, warn};

use super::assembly::BlockReader;
use super::upstream::Upstream;
use crate::error::{Error, Result};

/// The file that systemd-sysupdate reads first.
const SUMS: &str = "SHA256SUMS";
const LONGEST_SUMS: usize = 1 << 20;
/// Longest hash tree, bytes: of a root file system of 8 GB. The server keeps one tree in memory.
const LONGEST_TREE: usize = 66 << 20;
/// Longest block list, bytes: of a boot entry of 2 GB.
const LONGEST_LIST: usize = 16 << 20;

type Body = UnsyncBoxBody<Bytes, Error>;

/// Files of the running image.
pub(super) struct LocalImage {
    /// The running root file system, through dm-verity.
    pub root: PathBuf,
    /// The partition with the hash tree of `root`.
    pub tree: PathBuf,
    /// The running image's boot entry.
    pub uki: PathBuf,
    /// Root certificates of public TLS servers, PEM.
    pub authorities: PathBuf,
}

/// The server on loopback.
pub(super) struct Server {
    upstream: Arc<Upstream>,
    here: LocalImage,
    /// Name and content of the last hash tree, because systemd-sysupdate requests it again.
    tree: Mutex<Option<(String, Bytes)>>,
}

impl Server {
    pub(super) fn new(url: &str, here: LocalImage) -> Result<Self> {
        Ok(Self { upstream: Arc::new(Upstream::new(url, &here.authorities)?), here, tree: Mutex::default() })
    }

    /// Serves until the returned future is dropped.
    pub(super) async fn serve(self, listener: TcpListener) {
        let server = Arc::new(self);
        while let Ok((tcp, _)) = listener.accept().await {
            let server = server.clone();
            tokio::spawn(async move {
                let service = service_fn(|request| {
                    let server = server.clone();
                    async move {
                        let answer = server.answer(&request).await.unwrap_or_else(|e| {
                            error!("{}: download failed: {}", request.uri().path(), e.chain());
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
        match self.assemble(name).await {
            Ok(Some(answer)) => return Ok(answer),
            Ok(None) => {}
            Err(e) => warn!("{name}: downloading the whole file: {}", e.chain()),
        }
        let mut connection = self.upstream.connect().await?;
        Ok(forwarded(self.upstream.get(&mut connection, name, None).await?))
    }

    /// Assembles a root file system or a boot entry; returns `None` for other, small files.
    async fn assemble(&self, name: &str) -> Result<Option<Response<Body>>> {
        let unknown = |what: &str| Error::Failed(format!("the hashes of {what} have an unknown format"));
        let (path, old, new) = if let Some(stem) = name.strip_suffix(".root.raw") {
            let tree = self.tree(&self.tree_name(stem).await?).await?;
            let new = Blocks::from_tree(&tree).ok_or_else(|| unknown(name))?;
            let own = fs::read(&self.here.tree).map_err(Error::io("read", &self.here.tree))?;
            (&self.here.root, Blocks::from_tree(&own).ok_or_else(|| unknown("the running root file system"))?, new)
        } else if let Some(stem) = name.strip_suffix(".efi") {
            let list = self.upstream.read(&format!("{stem}.blocks"), LONGEST_LIST).await?;
            let new = Blocks::from_list(&list).ok_or_else(|| unknown(name))?;
            let own = fs::read(&self.here.uki).map_err(Error::io("read", &self.here.uki))?;
            (&self.here.uki, Blocks::from_bytes(&own), new)
        } else {
            return Ok(None);
        };
        let pieces = pieces(&old, &new);
        let first = pieces.iter().find(|p| p.here.is_none()).map(|p| (p.at, p.len));
        info!("{name}: {:.1} of {:.1} MB have to be downloaded", missing(&pieces) as f64 / 1e6, new.size as f64 / 1e6);
        let here = File::open(path).map_err(Error::io("open", path))?;
        if let Some(part) = first {
            // A server without support for ranges sends the whole file.
            let mut connection = self.upstream.connect().await?;
            let answer = self.upstream.get(&mut connection, name, Some((part.0, 1))).await?;
            if answer.status() != StatusCode::PARTIAL_CONTENT {
                warn!("{name}: downloading the whole file: the server does not support ranges");
                return Ok(Some(forwarded(answer)));
            }
        }
        let assembly = BlockReader::new(pieces, here, self.upstream.clone(), name);
        let bytes = try_unfold(assembly, |mut assembly| async {
            Ok(assembly.next().await?.map(|bytes| (Frame::data(bytes), assembly)))
        });
        let mut answer = Response::new(StreamBody::new(bytes).boxed_unsync());
        answer.headers_mut().insert("content-length", new.size.into());
        Ok(Some(answer))
    }

    /// Returns the file name of a root's hash tree: `ID_VERSION_UUID`, with the UUID of the tree's partition.
    async fn tree_name(&self, root: &str) -> Result<String> {
        let sums = self.upstream.read(SUMS, LONGEST_SUMS).await?;
        let stem = root.rsplit_once('_').map_or(root, |(stem, _)| stem);
        let is_tree = |name: &&str| {
            let uuid = name.strip_prefix(stem).and_then(|n| n.strip_prefix('_')?.strip_suffix(".verity.raw"));
            uuid.is_some_and(|u| !u.contains('_'))
        };
        let sums = String::from_utf8_lossy(&sums);
        let found = sums.lines().filter_map(|line| Some(line.split_once("  ")?.1)).find(is_tree);
        Ok(found.ok_or_else(|| Error::Failed(format!("{SUMS} has no hash tree of {root}")))?.to_owned())
    }

    /// Returns a hash tree, from the server or from the previous request.
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

/// Forwards the upstream server's response.
fn forwarded(answer: Response<Incoming>) -> Response<Body> {
    let status = answer.status();
    let length = answer.headers().get("content-length").cloned();
    let body = answer.into_body().map_err(|e| Error::cannot("read the response")(e)).boxed_unsync();
    let mut forwarded = Response::new(body);
    *forwarded.status_mut() = status;
    if let Some(length) = length {
        forwarded.headers_mut().insert("content-length", length);
    }
    forwarded
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

    /// A file server, as an operator might use.
    struct Folder {
        files: BTreeMap<String, Vec<u8>>,
        has_parts: bool,
        /// The next response ends in the middle.
        breaks: AtomicBool,
        sent: AtomicU64,
    }

    impl Folder {
        /// Returns a folder with an image's boot entry and its block list.
        fn new(uki: &[u8]) -> Self {
            let files = [("a_2.efi", uki.to_vec()), ("a_2.blocks", Blocks::from_bytes(uki).list())];
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

        /// Starts the file server, and returns its URL.
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
                    // A client that rejects the certificate disconnects.
                    if let Ok(stream) = TlsAcceptor::from(tls).accept(tcp).await {
                        tokio::spawn(http.serve_connection(TokioIo::new(stream), service));
                    }
                }
            });
            format!("{scheme}://{at}/db/")
        }
    }

    /// Returns the response that a node with the boot entry `own` gets.
    async fn loaded(folder: &Arc<Folder>, own: &[u8], name: &str) -> (StatusCode, Vec<u8>) {
        loaded_from(&folder.clone().open(None).await, "", own, name).await
    }

    /// As [`loaded`], with TLS servers verified against `authorities` (PEM).
    async fn loaded_from(url: &str, authorities: &str, own: &[u8], name: &str) -> (StatusCode, Vec<u8>) {
        let dir = tempfile::tempdir().unwrap();
        let (uki, pem) = (dir.path().join("own.efi"), dir.path().join("authorities.pem"));
        fs::write(&uki, own).unwrap();
        fs::write(&pem, authorities).unwrap();
        let here = LocalImage { root: "/nowhere".into(), tree: "/nowhere".into(), uki, authorities: pem.clone() };
        let server = Server::new(url, here).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let serving = tokio::spawn(server.serve(listener));
        let upstream = Upstream::new(&format!("http://{at}/"), &pem).unwrap();
        let mut connection = upstream.connect().await.unwrap();
        let answer = upstream.get(&mut connection, name, None).await.unwrap();
        let status = answer.status();
        let bytes = answer.into_body().collect().await.map(|b| b.to_bytes().to_vec()).unwrap_or_default();
        serving.abort();
        (status, bytes)
    }

    /// Returns two versions of a file that differ in one block.
    fn versions() -> (Vec<u8>, Vec<u8>) {
        let block = |i: usize| vec![(i % 251) as u8 ^ (i / 251) as u8; BLOCK];
        let old: Vec<u8> = (0..1000).flat_map(block).chain([7; 99]).collect();
        let mut new = old.clone();
        new[500 * BLOCK + 17] ^= 1;
        (old, new)
    }

    #[tokio::test]
    async fn downloads_only_changed_blocks() {
        let (old, new) = versions();
        let folder = Arc::new(Folder::new(&new));
        let (status, bytes) = loaded(&folder, &old, "a_2.efi").await;
        assert!(status == StatusCode::OK && bytes == new);
        let list = folder.files["/db/a_2.blocks"].len() as u64;
        assert_eq!(folder.sent.load(Ordering::Relaxed), list + 1 + BLOCK as u64);
    }

    #[tokio::test]
    async fn rejects_tls_servers_of_unknown_authorities() {
        let (old, new) = versions();
        let folder = Arc::new(Folder::new(&new));
        let fleet = fleet::Fleet::parse("f", b"name = \"acme\"\n[groups]\nhub.count = 1\n").unwrap();
        let topology = fleet::Topology::from_fleet(&fleet);
        let (authority, other) = (fleet::Issuer::root("world").unwrap(), fleet::Issuer::root("world").unwrap());
        let key = fleet::PrivateKey::generate().unwrap();
        let cert = authority.node(&topology, &topology.nodes[0], &key.public().unwrap()).unwrap();
        let own = Identity { cert: &cert, key: key.pem() };
        let url = folder.clone().open(Some(fleet_https::server(authority.certificate(), own).unwrap())).await;
        let (status, bytes) = loaded_from(&url, authority.certificate(), &old, "a_2.efi").await;
        assert!(status == StatusCode::OK && bytes == new);
        let list = folder.files["/db/a_2.blocks"].len() as u64;
        assert_eq!(folder.sent.load(Ordering::Relaxed), list + 1 + BLOCK as u64);
        // The client also accepts Debian's list of more than a hundred root certificates.
        fleet_https::client(&fs::read_to_string(super::super::sysupdate::AUTHORITIES).unwrap(), None).unwrap();
        assert_ne!(loaded_from(&url, other.certificate(), &old, "a_2.efi").await.0, StatusCode::OK);
    }

    #[tokio::test]
    async fn reconnects_after_a_broken_connection() {
        let (old, new) = versions();
        let folder = Arc::new(Folder::new(&new));
        // Without the block list the server would download the whole file, so the break comes after the list.
        let breaking = folder.clone();
        tokio::spawn(async move {
            while breaking.sent.load(Ordering::Relaxed) <= 1000 * 32 {
                tokio::task::yield_now().await;
            }
            breaking.breaks.store(true, Ordering::Relaxed);
        });
        let (status, bytes) = loaded(&folder, &old, "a_2.efi").await;
        assert!(status == StatusCode::OK && bytes == new);
        assert!(!folder.breaks.load(Ordering::Relaxed), "no response ended in the middle");
    }

    #[tokio::test]
    async fn downloads_whole_files_without_ranges_or_hashes() {
        let (old, new) = versions();
        let mut folder = Folder::new(&new);
        folder.has_parts = false;
        assert!(loaded(&Arc::new(folder), &old, "a_2.efi").await == (StatusCode::OK, new.clone()));
        let mut folder = Folder::new(&new);
        folder.files.remove("/db/a_2.blocks");
        assert!(loaded(&Arc::new(folder), &old, "a_2.efi").await == (StatusCode::OK, new));
    }

    #[tokio::test]
    async fn missing_files_are_not_found() {
        let (old, new) = versions();
        let folder = Arc::new(Folder::new(&new));
        for name in ["a_3.efi", "a_3_1.root.raw", "a_3_1.verity.raw", "SHA256SUMS"] {
            assert_ne!(loaded(&folder, &old, name).await.0, StatusCode::OK, "{name}");
        }
    }
}
