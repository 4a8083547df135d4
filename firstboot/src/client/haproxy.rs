//! Client of HAProxy's [statistics] and [runtime API] on this node.
//!
//! [statistics]: https://docs.haproxy.org/3.0/management.html#9.1
//! [runtime API]: https://docs.haproxy.org/3.0/management.html#9.3

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use fleet_https::{Connection, request};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::error::{Error, Result};

pub(crate) const PORT: u16 = 8404;
/// Longest reply, in bytes: a line has about 500 bytes.
const LONGEST: usize = 4 << 20;
/// HAProxy's backend with Odoo's servers.
const BACKEND: &str = "odoo";

/// Longest reply of the runtime API to a change, in bytes.
const LONGEST_REPLY: u64 = 64 << 10;
/// Time limit of the runtime API.
const PATIENCE: Duration = Duration::from_secs(10);

/// Replaces the certificates and the key that HAProxy has read from the file `pem`. Connections that are open continue.
///
/// # Errors
/// If HAProxy does not answer on the socket, or refuses the certificates.
pub(crate) async fn set_certificate(socket: &Path, pem: &Path, content: &str) -> Result<()> {
    let file = pem.display();
    // An empty line ends the content.
    let content: String =
        content.lines().filter(|line| !line.trim().is_empty()).flat_map(|line| [line, "\n"]).collect();
    let set = command(socket, &format!("set ssl cert {file} <<\n{content}\n")).await?;
    if !set.contains("Transaction") {
        return Err(Error::Failed(format!("HAProxy does not read the certificate: {}", set.trim())));
    }
    let done = command(socket, &format!("commit ssl cert {file}\n")).await?;
    if done.contains("Success!") {
        return Ok(());
    }
    // Without this, the next attempt would continue the failed one.
    let _ = command(socket, &format!("abort ssl cert {file}\n")).await;
    Err(Error::Failed(format!("HAProxy does not use the certificate: {}", done.trim())))
}

async fn command(socket: &Path, text: &str) -> Result<String> {
    let exchange = async {
        let mut stream = UnixStream::connect(socket).await?;
        stream.write_all(text.as_bytes()).await?;
        let mut reply = Vec::new();
        stream.take(LONGEST_REPLY).read_to_end(&mut reply).await?;
        Ok(String::from_utf8_lossy(&reply).into_owned())
    };
    let late = |_| Error::Failed(format!("HAProxy does not answer on {}", socket.display()));
    timeout(PATIENCE, exchange).await.map_err(late)?.map_err(Error::io("ask", socket))
}

/// Returns the status of each Odoo server.
pub(crate) async fn odoo(host: &str) -> Result<BTreeMap<String, String>> {
    let mut connection = Connection::plain(host, PORT).await?;
    let text = connection.ask(request("GET", host, "/;csv", &[], "".into())?, LONGEST).await?;
    Ok(servers(&String::from_utf8_lossy(&text)))
}

/// Parses the CSV. No value before the status contains a comma or a quote.
fn servers(csv: &str) -> BTreeMap<String, String> {
    let mut lines = csv.lines();
    let header: Vec<&str> = lines.next().unwrap_or_default().trim_start_matches("# ").split(',').collect();
    let column = |name: &str| header.iter().position(|column| *column == name);
    let (Some(proxy), Some(server), Some(status)) = (column("pxname"), column("svname"), column("status")) else {
        return BTreeMap::new();
    };
    let rows = lines.map(|line| line.split(',').collect::<Vec<_>>()).filter(|row| row.get(proxy) == Some(&BACKEND));
    let named = rows.filter_map(|row| Some(((*row.get(server)?).to_owned(), (*row.get(status)?).to_owned())));
    named.filter(|(name, _)| name != "BACKEND" && name != "FRONTEND").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines of HAProxy 3.0.11, with the first columns.
    const CSV: &str = "# pxname,svname,qcur,qmax,scur,smax,slim,stot,bin,bout,dreq,dresp,ereq,econ,eresp,wretr,wredis,\
                       status,weight,act,bck,chkfail\n\
                       postgres-primary,db-1,0,0,0,0,,0,0,0,,0,,0,0,0,0,UP,1,1,0,0\n\
                       odoo,FRONTEND,,,0,0,3000,0,0,0,0,0,0,,,,,OPEN,,,,\n\
                       odoo,app-1,0,0,0,0,,0,0,0,,0,,0,0,0,0,UP 1/2,1,1,0,0\n\
                       odoo,app-2,0,0,0,0,,0,0,0,,0,,0,0,0,0,DOWN,1,0,0,2\n\
                       odoo,BACKEND,0,0,0,0,300,0,0,0,0,0,,0,0,0,0,UP,1,1,0,,\n\
                       odoo-websocket,app-1,0,0,0,0,,0,0,0,,0,,0,0,0,0,UP,1,1,0,0\n";

    #[test]
    fn returns_the_servers_of_odoo() {
        let expected = [("app-1", "UP 1/2"), ("app-2", "DOWN")].map(|(name, s)| (name.to_owned(), s.to_owned()));
        assert_eq!(servers(CSV), BTreeMap::from(expected));
        for other in ["", "<html>", "# pxname,svname\nodoo,app-1\n"] {
            assert_eq!(servers(other), BTreeMap::new());
        }
    }
}
