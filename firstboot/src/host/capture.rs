//! Captures packets into a [capture file]. Each packet has a header of [LINUX_SLL2], so that one file has packets of
//! interfaces of all kinds.
//!
//! [capture file]: https://datatracker.ietf.org/doc/draft-ietf-opsawg-pcap/
//! [LINUX_SLL2]: https://www.tcpdump.org/linktypes/LINKTYPE_LINUX_SLL2.html

use std::io::{self, BufWriter, Write};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use fleet::node_api::NODE_API_PORT;
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{
    AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

use crate::error::{Error, Result};

/// First bytes of a capture file with times in microseconds.
const MAGIC: u32 = 0xa1b2_c3d4;
/// Link type `LINUX_SLL2`.
const LINK_TYPE: u32 = 276;
/// Bytes of the header of `LINUX_SLL2`.
const LINK_HEADER: usize = 20;
/// Largest packet of the kernel: several packets of a connection that it has joined.
const LARGEST: usize = 256 << 10;
/// Bytes of packets that wait in the kernel.
const WAITING: usize = 4 << 20;
/// Longest time until a packet is written.
const FLUSH: Duration = Duration::from_millis(200);
/// Ethernet's protocol number of IPv4, and IPv4's number of TCP.
const IPV4: [u8; 2] = [0x08, 0x00];
const TCP: u8 = 6;

/// What to capture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capture {
    /// Interface; all interfaces without it.
    pub interface: Option<String>,
    /// Time after which the capture ends.
    pub time: Duration,
    /// Bytes of the file after which the capture ends.
    pub bytes: u64,
    /// First bytes of each packet to capture.
    pub snap: u32,
}

impl Capture {
    /// Parses arguments: an interface or `any`, seconds, bytes, and bytes of each packet. `None` if one is invalid.
    #[must_use]
    pub fn from_args(interface: &str, seconds: &str, bytes: &str, snap: &str) -> Option<Self> {
        Some(Self {
            interface: Some(interface).filter(|name| *name != ANY).map(str::to_owned),
            time: Duration::from_secs(seconds.parse().ok()?),
            bytes: bytes.parse().ok()?,
            snap: snap.parse().ok().filter(|snap| *snap > 0)?,
        })
    }

    /// Returns the arguments that [`Capture::from_args`] parses.
    pub(crate) fn args(&self) -> [String; 4] {
        let interface = self.interface.clone().unwrap_or_else(|| ANY.to_owned());
        [interface, self.time.as_secs().to_string(), self.bytes.to_string(), self.snap.to_string()]
    }

    /// Captures until the end of the time or the file. Leaves the node API's own packets on the mesh out, because they
    /// carry the capture to the operator.
    ///
    /// # Errors
    /// If there is no such interface, the process has no right to capture, or the file cannot be written.
    pub fn run(&self, out: impl Write) -> Result<()> {
        let index = match &self.interface {
            Some(name) => {
                let missing = |e: Errno| Error::cannot(format!("find the interface {name}"))(io::Error::from(e));
                Some(if_nametoindex(name.as_str()).map_err(missing)?)
            }
            None => None,
        };
        let fd = open().map_err(|e| Error::cannot("capture packets")(io::Error::from(e)))?;
        let (until, mut buffer) = (Instant::now() + self.time, vec![0; LARGEST]);
        let mut file = File { out: BufWriter::new(out), written: 0, flushed: Instant::now() };
        let unwritten = |e| Error::cannot("write the capture")(e);
        file.begin(self.snap).map_err(unwritten)?;
        while Instant::now() < until && file.written < self.bytes {
            match recvfrom::<LinkAddr>(fd.as_raw_fd(), &mut buffer) {
                Ok((length, Some(from))) => {
                    let link = Link::from(&from);
                    let packet = &buffer[..length];
                    if index.is_none_or(|index| link.interface == index) && !is_own(&link, packet) {
                        file.add(&link, packet, self.snap, SystemTime::now()).map_err(unwritten)?;
                    }
                }
                // An interface that is down may come up again.
                Ok((_, None)) | Err(Errno::EAGAIN | Errno::EINTR | Errno::ENETDOWN) => {}
                Err(e) => return Err(Error::cannot("capture packets")(io::Error::from(e))),
            }
            file.flush_in_time().map_err(unwritten)?;
        }
        file.out.flush().map_err(unwritten)
    }
}

/// Name of all interfaces.
const ANY: &str = "any";

/// Opens a socket that receives a copy of each packet, without its link header.
fn open() -> nix::Result<OwnedFd> {
    let fd = socket(AddressFamily::Packet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)?;
    setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::new(0, FLUSH.as_micros() as i64))?;
    // The kernel may permit less.
    let _ = setsockopt(&fd, sockopt::RcvBuf, &WAITING);
    Ok(fd)
}

/// Link of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Link {
    /// Ethernet's protocol number, in the order of the network.
    protocol: [u8; 2],
    /// Index of the interface.
    interface: u32,
    /// Kind of the hardware.
    hardware: u16,
    /// Whether the packet is to this host, from it, or to others.
    kind: u8,
    address_length: u8,
    address: [u8; 6],
}

impl From<&LinkAddr> for Link {
    fn from(from: &LinkAddr) -> Self {
        Self {
            protocol: from.protocol().to_ne_bytes(),
            interface: from.ifindex() as u32,
            hardware: from.hatype(),
            kind: from.pkttype(),
            address_length: from.halen().min(6) as u8,
            address: from.addr().unwrap_or_default(),
        }
    }
}

impl Link {
    /// Returns the header of `LINUX_SLL2`.
    fn header(&self) -> [u8; LINK_HEADER] {
        let mut header = [0; LINK_HEADER];
        header[0..2].copy_from_slice(&self.protocol);
        header[4..8].copy_from_slice(&self.interface.to_be_bytes());
        header[8..10].copy_from_slice(&self.hardware.to_be_bytes());
        (header[10], header[11]) = (self.kind, self.address_length);
        header[12..18].copy_from_slice(&self.address);
        header
    }
}

/// Whether a packet belongs to the node API.
fn is_own(link: &Link, packet: &[u8]) -> bool {
    let Some(first) = packet.first().filter(|_| link.protocol == IPV4) else { return false };
    let ports = usize::from(first & 0xf) * 4;
    if first >> 4 != 4 || packet.get(9) != Some(&TCP) {
        return false;
    }
    let word = |at: usize| packet.get(at..at + 2).map(|bytes| u16::from_be_bytes([bytes[0], bytes[1]]));
    // A later fragment has no ports. Its offset is in the lower 13 bits.
    let is_first = word(6).is_some_and(|offset| offset % (1 << 13) == 0);
    is_first && (word(ports) == Some(NODE_API_PORT) || word(ports + 2) == Some(NODE_API_PORT))
}

/// A capture file.
struct File<W: Write> {
    out: BufWriter<W>,
    written: u64,
    flushed: Instant,
}

impl<W: Write> File<W> {
    /// Writes the header of the file.
    fn begin(&mut self, snap: u32) -> io::Result<()> {
        let mut header = Vec::with_capacity(24);
        header.extend(MAGIC.to_le_bytes());
        // Version 2.4 of the format, and two fields that are always 0.
        header.extend([2, 0, 4, 0]);
        header.extend([0; 8]);
        header.extend((snap + LINK_HEADER as u32).to_le_bytes());
        header.extend(LINK_TYPE.to_le_bytes());
        self.write(&header)?;
        self.out.flush()
    }

    /// Writes the first `snap` bytes of a packet.
    fn add(&mut self, link: &Link, packet: &[u8], snap: u32, at: SystemTime) -> io::Result<()> {
        let at = at.duration_since(UNIX_EPOCH).unwrap_or_default();
        let kept = &packet[..packet.len().min(snap as usize)];
        let fields = [
            at.as_secs() as u32,
            at.subsec_micros(),
            (LINK_HEADER + kept.len()) as u32,
            (LINK_HEADER + packet.len()) as u32,
        ];
        self.write(&fields.map(u32::to_le_bytes).concat())?;
        self.write(&link.header())?;
        self.write(kept)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len() as u64;
        self.out.write_all(bytes)
    }

    fn flush_in_time(&mut self) -> io::Result<()> {
        if self.flushed.elapsed() >= FLUSH {
            self.flushed = Instant::now();
            self.out.flush()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;
    use std::sync::atomic::{AtomicBool, Ordering};

    /// Returns the link header and the data of each packet.
    fn packets(file: &[u8]) -> Vec<(&[u8], &[u8])> {
        let word = |at: usize| u32::from_le_bytes(file[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(20)), (MAGIC, LINK_TYPE));
        let (mut at, mut found) = (24, Vec::new());
        while at < file.len() {
            let length = word(at + 8) as usize;
            assert!(word(at + 8) <= word(16) && word(at + 8) <= word(at + 12));
            let packet = &file[at + 16..at + 16 + length];
            found.push(packet.split_at(LINK_HEADER));
            at += 16 + length;
        }
        found
    }

    #[test]
    fn the_file_has_the_format_of_its_specification() {
        let link = Link { protocol: IPV4, interface: 7, hardware: 1, kind: 4, address_length: 6, address: [2; 6] };
        let mut bytes = Vec::new();
        let mut file = File { out: BufWriter::new(&mut bytes), written: 0, flushed: Instant::now() };
        file.begin(4).unwrap();
        let at = UNIX_EPOCH + Duration::from_micros(5_000_007);
        file.add(&link, b"abcdefgh", 4, at).unwrap();
        let written = file.written;
        drop(file);
        assert_eq!(bytes.len() as u64, written);
        assert_eq!(bytes[..16], [0xd4, 0xc3, 0xb2, 0xa1, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[24..40], [5, 0, 0, 0, 7, 0, 0, 0, 24, 0, 0, 0, 28, 0, 0, 0]);
        let header = [8, 0, 0, 0, 0, 0, 0, 7, 0, 1, 4, 6, 2, 2, 2, 2, 2, 2, 0, 0];
        assert_eq!(packets(&bytes), [(header.as_slice(), b"abcd".as_slice())]);
    }

    #[test]
    fn packets_of_the_node_api_are_left_out() {
        let link = Link { protocol: IPV4, interface: 7, hardware: 1, kind: 0, address_length: 0, address: [0; 6] };
        let packet = |from: u16, to: u16| {
            let mut packet = vec![0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, TCP, 0, 0, 10, 10, 0, 1, 10, 10, 0, 2];
            packet.extend([from.to_be_bytes(), to.to_be_bytes()].concat());
            packet
        };
        assert!(is_own(&link, &packet(NODE_API_PORT, 40000)) && is_own(&link, &packet(40000, NODE_API_PORT)));
        assert!(!is_own(&link, &packet(5432, 40000)));
        let mut fragment = packet(NODE_API_PORT, 40000);
        fragment[7] = 1;
        assert!(!is_own(&link, &fragment));
        let mut udp = packet(NODE_API_PORT, 40000);
        udp[9] = 17;
        assert!(!is_own(&link, &udp));
        for length in 0..24 {
            let cut = is_own(&link, &packet(40000, NODE_API_PORT)[..length]);
            assert!(!cut, "{length}");
        }
        assert!(!is_own(&Link { protocol: [0x86, 0xdd], ..link }, &packet(NODE_API_PORT, 40000)));
    }

    #[test]
    fn arguments_round_trip() {
        let capture = Capture { interface: Some("wg0".to_owned()), time: Duration::from_secs(7), bytes: 9, snap: 256 };
        for capture in [Capture { interface: None, ..capture.clone() }, capture] {
            let [interface, seconds, bytes, snap] = capture.args();
            assert_eq!(Capture::from_args(&interface, &seconds, &bytes, &snap), Some(capture));
        }
        assert_eq!(Capture::from_args("any", "7", "9", "0"), None);
        assert_eq!(Capture::from_args("any", "x", "9", "1"), None);
    }

    #[test]
    fn captures_on_this_machine() {
        // Only root may capture.
        if open().is_err() {
            return;
        }
        let stop = AtomicBool::new(false);
        let mut bytes = Vec::new();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
                let own = socket.local_addr().unwrap();
                while !stop.load(Ordering::Relaxed) {
                    socket.send_to(b"a packet of this test", own).unwrap();
                    std::thread::sleep(Duration::from_millis(5));
                }
            });
            let capture =
                Capture { interface: Some("lo".to_owned()), time: Duration::from_secs(20), bytes: 2000, snap: 256 };
            capture.run(&mut bytes).unwrap();
            stop.store(true, Ordering::Relaxed);
        });
        assert!((2000..3000).contains(&bytes.len()), "{}", bytes.len());
        let found = packets(&bytes);
        assert!(found.iter().any(|(link, data)| link[..2] == IPV4 && data.ends_with(b"a packet of this test")));
        let missing = Capture { interface: Some("no-such".to_owned()), time: Duration::ZERO, bytes: 1, snap: 1 };
        assert!(missing.run(io::sink()).is_err());
    }
}
