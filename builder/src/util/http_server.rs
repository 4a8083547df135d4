//! An HTTP server for files and for requests with a body. It serves only the open files that its caller lists, so a
//! request's path never reaches the host's file system.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use fleet::ErrorChain;
use futures_util::stream::unfold;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, Limited, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, RANGE};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;

use super::connections::{Acceptor, Limits};

/// Maximum size of a request's body in bytes.
const MAX_BODY: usize = 64 << 10;
/// Size of the part of a file that is in memory for a connection, in bytes.
const CHUNK: u64 = 256 << 10;
/// Size of a connection's buffer, which limits the head of a request, in bytes.
const BUFFER: usize = 16 << 10;

type Body = BoxBody<Bytes, io::Error>;

/// Handles a POST request: path and body. Returns JSON. It runs in a thread of its own, and may block.
pub(crate) type RequestHandler = dyn Fn(&str, &[u8]) -> crate::error::Result<Vec<u8>> + Send + Sync;

/// Files and a handler to serve.
pub(crate) struct FileServer {
    /// Files by path, for GET requests.
    pub files: BTreeMap<String, Arc<File>>,
    /// Handler of POST requests.
    pub handler: Box<RequestHandler>,
}

/// Serves requests until the process ends.
pub(crate) async fn serve(listener: TcpListener, server: Arc<FileServer>) -> Infallible {
    serve_within(listener, server, Limits::default()).await
}

async fn serve_within(listener: TcpListener, server: Arc<FileServer>, limits: Limits) -> Infallible {
    let acceptor = Acceptor::new(listener, limits);
    loop {
        let (stream, admitted) = acceptor.accept().await;
        let server = server.clone();
        tokio::spawn(async move {
            let service = service_fn(|request| {
                let server = server.clone();
                async move { Ok::<_, Infallible>(respond(&server, request, limits.timeout).await) }
            });
            // A client whose connection fails sends its request again.
            let _ = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(limits.timeout)
                .max_buf_size(BUFFER)
                .serve_connection(TokioIo::new(stream), service)
                .await;
            drop(admitted);
        });
    }
}

async fn respond(server: &Arc<FileServer>, request: Request<Incoming>, timeout: Duration) -> Response<Body> {
    let path = request.uri().path().to_owned();
    match *request.method() {
        Method::GET | Method::HEAD => match server.files.get(&path) {
            Some(file) => {
                part(file, &request).unwrap_or_else(|e| plain(StatusCode::INTERNAL_SERVER_ERROR, &e.to_string()))
            }
            None => plain(StatusCode::NOT_FOUND, "there is no such file"),
        },
        Method::POST => {
            let body = tokio::time::timeout(timeout, Limited::new(request.into_body(), MAX_BODY).collect()).await;
            let Ok(Ok(body)) = body else {
                return plain(StatusCode::BAD_REQUEST, "the body is too long or incomplete");
            };
            let server = server.clone();
            let result = tokio::task::spawn_blocking(move || (server.handler)(&path, &body.to_bytes())).await;
            match result {
                Ok(Ok(json)) => {
                    let body = Full::from(json).map_err(|never| match never {}).boxed();
                    with(Response::builder().header(CONTENT_TYPE, "application/json"), body)
                }
                Ok(Err(e)) => plain(StatusCode::BAD_REQUEST, &ErrorChain::new(&e).one_line()),
                Err(e) => plain(StatusCode::INTERNAL_SERVER_ERROR, &e.to_string()),
            }
        }
        _ => plain(StatusCode::METHOD_NOT_ALLOWED, "use GET, HEAD or POST"),
    }
}

/// Returns a file, or the requested range of it.
fn part(file: &Arc<File>, request: &Request<Incoming>) -> io::Result<Response<Body>> {
    let size = file.metadata()?.len();
    let requested = request.headers().get(RANGE).and_then(|v| v.to_str().ok());
    let (start, end) = match requested.map(|text| range(text, size)) {
        None => (0, size),
        Some(Some(found)) => found,
        Some(None) => {
            let mut refused = plain(StatusCode::RANGE_NOT_SATISFIABLE, "the range is outside the file");
            if let Ok(value) = format!("bytes */{size}").parse() {
                refused.headers_mut().insert(CONTENT_RANGE, value);
            }
            return Ok(refused);
        }
    };
    let mut response = Response::builder()
        .header(CONTENT_TYPE, "application/octet-stream")
        .header(ACCEPT_RANGES, "bytes")
        .header(CONTENT_LENGTH, end - start);
    if requested.is_some() {
        response = response
            .status(StatusCode::PARTIAL_CONTENT)
            .header(CONTENT_RANGE, format!("bytes {start}-{}/{size}", end.saturating_sub(1)));
    }
    let body = if request.method() == Method::HEAD { empty() } else { stream(file.clone(), start, end) };
    Ok(with(response, body))
}

/// Parses a range with a first byte, as firmware and installers send it. Returns its start and end.
fn range(text: &str, size: u64) -> Option<(u64, u64)> {
    let (first, last) = text.strip_prefix("bytes=")?.split_once('-')?;
    let first: u64 = first.parse().ok()?;
    let end = if last.is_empty() { size } else { last.parse::<u64>().ok()?.checked_add(1)?.min(size) };
    (first < end).then_some((first, end))
}

fn stream(file: Arc<File>, start: u64, end: u64) -> Body {
    let chunks = unfold(start, move |at| {
        let file = file.clone();
        async move {
            if at >= end {
                return None;
            }
            let size = CHUNK.min(end - at);
            let read = tokio::task::spawn_blocking(move || {
                let mut chunk = vec![0; usize::try_from(size).unwrap_or(0)];
                file.read_exact_at(&mut chunk, at).map(|()| Frame::data(Bytes::from(chunk)))
            });
            Some((read.await.map_err(io::Error::other).and_then(|r| r), at + size))
        }
    });
    BodyExt::boxed(StreamBody::new(Box::pin(chunks)))
}

fn empty() -> Body {
    Full::default().map_err(|never| match never {}).boxed()
}

fn plain(status: StatusCode, text: &str) -> Response<Body> {
    let body = Full::from(format!("{text}\n")).map_err(|never| match never {}).boxed();
    with(Response::builder().status(status).header(CONTENT_TYPE, "text/plain"), body)
}

fn with(response: hyper::http::response::Builder, body: Body) -> Response<Body> {
    // The builder fails only for invalid headers, and these are valid.
    response.body(body).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};
    use std::net::{SocketAddr, TcpStream};

    #[test]
    fn parses_ranges() {
        assert_eq!(range("bytes=0-9", 100), Some((0, 10)));
        assert_eq!(range("bytes=90-", 100), Some((90, 100)));
        assert_eq!(range("bytes=90-900", 100), Some((90, 100)));
        for text in ["bytes=100-", "bytes=5-4", "bytes=-5", "bytes=a-b", "x", "bytes=0-18446744073709551615x"] {
            assert_eq!(range(text, 100), None, "{text}");
        }
        assert_eq!(range("bytes=0-18446744073709551615", 100), None);
    }

    fn served() -> SocketAddr {
        served_within(Limits::default())
    }

    fn served_within(limits: Limits) -> SocketAddr {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7; 3 << 20]).unwrap();
        let server = FileServer {
            files: BTreeMap::from([("/a".to_owned(), Arc::new(file))]),
            handler: Box::new(|path, body| if path == "/v1/x" { Ok(body.to_vec()) } else { crate::error::fail("no") }),
        };
        let (send, receive) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
                send.send(listener.local_addr().unwrap()).unwrap();
                serve_within(listener, Arc::new(server), limits).await
            })
        });
        receive.recv().unwrap()
    }

    fn exchange(to: SocketAddr, text: &str) -> String {
        let mut stream = TcpStream::connect(to).unwrap();
        stream.write_all(text.as_bytes()).unwrap();
        let mut response = Vec::new();
        stream.read_to_end(&mut response).unwrap();
        String::from_utf8_lossy(&response).into_owned()
    }

    #[test]
    fn serves_only_listed_files() {
        let to = served();
        let get = |path: &str, more: &str| {
            exchange(to, &format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{more}\r\n"))
        };
        assert!(get("/a", "").ends_with(&"\u{7}".repeat(3 << 20)));
        let part = get("/a", "range: bytes=1048570-1048580\r\n");
        assert!(part.starts_with("HTTP/1.1 206") && part.ends_with(&"\u{7}".repeat(11)), "{part}");
        assert!(part.contains("content-range: bytes 1048570-1048580/3145728"), "{part}");
        assert!(get("/a", "range: bytes=9999999-\r\n").starts_with("HTTP/1.1 416"));
        for path in ["/", "/b", "/../a", "/a/../../etc/passwd", "/%2e%2e/etc/passwd", "//etc/passwd"] {
            assert!(get(path, "").starts_with("HTTP/1.1 404"), "{path}");
        }
        assert!(exchange(to, "DELETE /a HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").starts_with("HTTP/1.1 405"));
        let post = |path: &str, body: &str| {
            exchange(
                to,
                &format!(
                    "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
                    body.len()
                ),
            )
        };
        assert!(post("/v1/x", "hello").ends_with("hello"));
        assert!(post("/v1/y", "hello").starts_with("HTTP/1.1 400"));
        assert!(post("/v1/x", &"x".repeat(MAX_BODY + 1)).starts_with("HTTP/1.1 400"));
    }

    /// Connects from an address of the loopback network.
    fn from(address: &str, to: SocketAddr) -> TcpStream {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind(format!("{address}:0").parse().unwrap()).unwrap();
        let stream = runtime.block_on(socket.connect(to)).unwrap().into_std().unwrap();
        stream.set_nonblocking(false).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    /// Whether the server sends a part of the file.
    fn is_served(mut stream: TcpStream) -> bool {
        let part = b"GET /a HTTP/1.1\r\nhost: x\r\nconnection: close\r\nrange: bytes=0-9\r\n\r\n";
        let mut response = Vec::new();
        stream.write_all(part).is_ok() && stream.read_to_end(&mut response).is_ok() && response.ends_with(&[7; 10])
    }

    #[test]
    fn one_address_cannot_use_all_connections() {
        let to = served_within(Limits { connections: 4, per_address: 2, ..Limits::default() });
        // These connections send nothing.
        let _idle: Vec<TcpStream> = (0..20).map(|_| from("127.0.0.2", to)).collect();
        assert!(is_served(from("127.0.0.3", to)));
    }

    #[test]
    fn ends_stalled_downloads() {
        let timeout = Duration::from_secs(1);
        let to = served_within(Limits { connections: 2, per_address: 2, timeout, ..Limits::default() });
        let stalled: Vec<TcpStream> = (0..2)
            .map(|_| {
                let mut stream = from("127.0.0.2", to);
                // Many responses, which exceed the kernel's buffers.
                for _ in 0..10 {
                    stream.write_all(b"GET /a HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
                }
                stream
            })
            .collect();
        assert!(is_served(from("127.0.0.3", to)));
        drop(stalled);
    }

    #[test]
    fn serves_slow_client_above_the_minimum_rate() {
        let timeout = Duration::from_millis(300);
        let to = served_within(Limits { timeout, rate: 1 << 20, ..Limits::default() });
        let mut stream = from("127.0.0.2", to);
        stream.write_all(b"GET /a HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
        let (mut chunk, mut bytes) = (vec![0; 128 << 10], 0);
        loop {
            let read = stream.read(&mut chunk).unwrap();
            if read == 0 {
                break;
            }
            bytes += read;
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(bytes > 3 << 20);
    }

    /// The test below starts this server in a process with a low limit of open files.
    #[test]
    #[ignore = "serves until it is killed"]
    fn server_process() {
        println!("serves at {}", served());
        std::thread::sleep(Duration::from_secs(60));
    }

    #[test]
    fn server_survives_lack_of_file_descriptors() {
        use std::io::{BufRead as _, BufReader};
        let own = std::env::current_exe().unwrap();
        let test = concat!(module_path!(), "::server_process").trim_start_matches("builder::");
        let mut child = std::process::Command::new("sh")
            .args(["-c", "ulimit -n 24; exec \"$0\" \"$@\""])
            .arg(own)
            .args(["--exact", test, "--ignored", "--nocapture"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let to = lines.find_map(|line| line.split_once("serves at ").map(|(_, at)| at.to_owned())).unwrap();
        let to: SocketAddr = to.trim().parse().unwrap();
        let many: Vec<TcpStream> = (0..60).map(|_| from("127.0.0.2", to)).collect();
        std::thread::sleep(Duration::from_millis(500));
        drop(many);
        let served = is_served(from("127.0.0.3", to));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(served, "the server ended");
    }
}
