//! Attack on `bakehouse netboot` by a host on the same network, which sends false messages.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use fleet::netboot::{Assignment, Key, NetbootMachine};
use fleet::{Credential, Ticket, encoding};
use fleet_https::{Connection, request};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use ring::digest::{SHA256, digest};
use serde_json::{Value, json};

use super::arena::INTERNET;
use super::{Arena, Foothold};

const PORT: u16 = 8470;
/// MAC address of a machine in fleet.toml. The attacker can see it on the network.
pub const HUB_MAC: &str = "52:54:00:00:00:01";

/// A real `bakehouse netboot`, on the attacker's network.
pub struct NetbootServer {
    child: Child,
    log: PathBuf,
}

impl NetbootServer {
    /// Starts the server with these additional options.
    ///
    /// # Panics
    /// If it is not ready within 240 s.
    #[must_use]
    pub fn start(arena: &Arena, more: &[&str]) -> Self {
        let log = arena.lab.dir.join("netboot.log");
        let file = File::create(&log).expect("the lab is writable");
        let bakehouse = arena.lab.command(&[]);
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", arena.internet().display())).arg("--").arg(bakehouse.get_program());
        command.arg("-C").arg(&arena.lab.dir).args(["netboot", "--interface", "wire"]).args(more);
        command.stdin(Stdio::null()).stdout(file.try_clone().expect("a file")).stderr(file);
        let mut server = Self { child: command.spawn().expect("nsenter"), log };
        let until = Instant::now() + Duration::from_secs(240);
        while !server.said().contains("Ctrl-C ends it") {
            let ended = server.child.try_wait().expect("a child");
            assert!(ended.is_none() && Instant::now() < until, "bakehouse netboot did not start:\n{}", server.said());
            sleep(Duration::from_millis(100));
        }
        server
    }

    /// Returns what the server has printed so far.
    #[must_use]
    pub fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for NetbootServer {
    fn drop(&mut self) {
        let _ = self.child.kill().and_then(|()| self.child.wait());
    }
}

/// Posts a message to the server and returns the reply.
///
/// # Errors
/// If the server refuses the message.
pub(super) async fn tell(path: &str, message: &Value) -> Result<Vec<u8>, String> {
    let sent = async {
        let mut server = Connection::plain(INTERNET, PORT).await?;
        server.ask(request("POST", INTERNET, path, &[], message.to_string().into())?, 1 << 20).await
    };
    sent.await.map(Into::into).map_err(|e| fleet::ErrorChain::new(&e).to_string())
}

/// Requests a ticket as a machine with these MAC addresses.
///
/// # Errors
/// If the server gives no ticket. The text is its reason.
pub(super) async fn ticket_of(macs: &[&str]) -> Result<Ticket, String> {
    let key = Key::generate().map_err(|e| e.to_string())?;
    let machine = json!({
        "version": NetbootMachine::VERSION, "macs": macs, "serial": "", "memory": 8_u64 << 30, "key": key.public(),
        "disks": [{ "path": "/dev/sda", "size": 64_u64 << 30, "removable": false }],
    });
    let answer = tell("/v1/machine", &machine).await?;
    let sealed =
        match serde_json::from_slice(&answer).map_err(|e| format!("{e}: {}", String::from_utf8_lossy(&answer)))? {
            Assignment::Install(install) => install.ticket,
            Assignment::Run(run) => run.ticket,
            Assignment::Confirm { to } => return Err(format!("the operator has to confirm the code of {to}")),
            Assignment::Nothing { why } => return Err(why),
        };
    let (ticket, _) = key.open(&sealed).map_err(|e| e.to_string())?;
    // A ticket for the EFI partition is a systemd credential, encrypted with systemd's null key.
    Ticket::parse(&ticket).or_else(|_| opened(&ticket))
}

/// Decrypts a systemd credential that was encrypted with the null key, which is public.
fn opened(credential: &[u8]) -> Result<Ticket, String> {
    const HEADER: usize = 48;
    const IV: std::ops::Range<usize> = 32..44;
    let text = String::from_utf8_lossy(credential);
    let bytes = encoding::decode(text.trim()).unwrap_or_else(|| credential.to_vec());
    let (header, sealed) = bytes.split_at_checked(HEADER).ok_or("a ticket that is too short")?;
    let key = digest(&SHA256, b"");
    let key = UnboundKey::new(&AES_256_GCM, key.as_ref()).map(LessSafeKey::new).map_err(|e| e.to_string())?;
    let nonce = Nonce::try_assume_unique_for_key(&header[IV]).map_err(|e| e.to_string())?;
    let mut inner = sealed.to_vec();
    let plain = key.open_in_place(nonce, Aad::from(header), &mut inner).map_err(|_| "a ticket with another key")?;
    let begin = plain.iter().position(|b| *b == b'{').ok_or("no ticket in the credential")?;
    Ticket::parse(&plain[begin..]).map_err(|e| e.to_string())
}

/// Sends false messages to the server. Stores the tickets that any machine may have in `from.tickets`, and everything
/// beyond that in `from.loot`.
///
/// # Panics
/// If the lab is not writable.
pub fn attack(arena: &Arena, from: &mut Foothold) {
    // A file of the operator's host. The server runs as root and could overwrite it.
    let file = arena.lab.dir.join("precious");
    fs::write(&file, "precious").expect("the lab is writable");
    let path = file.display().to_string();
    let (joiners, mut loot) = from.run(|| async {
        let (mut joiners, mut loot) = (Vec::new(), Vec::new());
        let news = |mac: &str| json!({ "version": NetbootMachine::VERSION, "mac": mac, "step": "installed" });
        // The MAC address of a machine in fleet.toml, and a false progress report of it.
        match ticket_of(&[HUB_MAC]).await {
            Ok(ticket) => loot.push(format!("{} for a MAC address seen on the network", right(&ticket))),
            Err(e) => println!("  {HUB_MAC}: {e}"),
        }
        println!("  false report: {:?}", tell("/v1/news", &news(HUB_MAC)).await.map(|_| "accepted"));
        // Other first addresses before it: an unknown one, and a path.
        for first in ["52:54:00:00:00:77", path.as_str()] {
            match ticket_of(&[first, HUB_MAC]).await {
                Ok(ticket) => loot.push(format!("{} behind another address", right(&ticket))),
                Err(e) => println!("  {HUB_MAC} as the second address: {e}"),
            }
        }
        println!("  report with a path: {:?}", tell("/v1/news", &news(&path)).await.map(|_| "accepted"));
        match ticket_of(&["52:54:00:00:00:66"]).await.map(|t| t.right) {
            Ok(Credential::Joiner(joiner)) => joiners.push(joiner),
            Ok(Credential::Founder(founder)) => loot.push(format!("the founder's ticket of {}", founder.slot)),
            Err(e) => println!("  any machine: {e}"),
        }
        (joiners, loot)
    });
    if fs::read_to_string(&file).expect("the file exists") != "precious" {
        loot.push("a file of the operator's host overwritten".to_owned());
    }
    from.tickets = joiners;
    from.loot = loot;
}

fn right(ticket: &Ticket) -> String {
    match &ticket.right {
        Credential::Founder(founder) => format!("the founder's ticket of {}", founder.slot),
        Credential::Joiner(_) => "a joiner's ticket".to_owned(),
    }
}
