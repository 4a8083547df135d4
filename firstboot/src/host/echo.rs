//! Echo requests of ICMP over the kernel's [ping sockets], which need no privilege.
//!
//! [ping sockets]: https://man7.org/linux/man-pages/man7/icmp.7.html

use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket as StdSocket};
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, getsockopt, socket, sockopt};
use tokio::net::UdpSocket;
use tokio::time::timeout;

/// Bytes of an IPv4 header without options, and of an echo's header.
const HEADERS: u32 = 28;
/// Smallest packet of a probe, in bytes. Every link of IPv4 carries it.
const SMALLEST: u32 = 68;
/// Largest packet of IPv4, in bytes.
const LARGEST: u32 = 65_535;
/// Most steps of the search for the largest packet, and its exactness in bytes.
const STEPS: u32 = 8;
const EXACTNESS: u32 = 8;
/// Types of ICMP's messages.
const ECHO: u8 = 8;
const REPLY: u8 = 0;

/// Sends echo requests to one address.
pub(crate) struct Echo {
    socket: UdpSocket,
    sequence: u16,
}

impl Echo {
    /// Opens the socket. Its packets take the kernel's route to the address.
    ///
    /// # Errors
    /// If `net.ipv4.ping_group_range` excludes this process, or there is no route.
    pub(crate) async fn open(to: Ipv4Addr) -> io::Result<Self> {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let fd = socket(AddressFamily::Inet, SockType::Datagram, flags, SockProtocol::Icmp)?;
        let socket = UdpSocket::from_std(StdSocket::from(fd))?;
        socket.connect(SocketAddr::from((to, 0))).await?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Returns the kernel's MTU of the path.
    ///
    /// # Errors
    /// If the kernel has no route.
    pub(crate) fn mtu(&self) -> io::Result<u32> {
        let mtu = getsockopt(&self.socket, sockopt::IpMtu)?;
        u32::try_from(mtu).map_err(io::Error::other)
    }

    /// Sends a packet of `size` bytes, with its IP header, and returns the time until its reply; `None` if there is none
    /// within `limit`.
    ///
    /// # Errors
    /// If the kernel does not send the packet.
    async fn ask(&mut self, size: u32, limit: Duration) -> io::Result<Option<Duration>> {
        self.sequence = self.sequence.wrapping_add(1);
        let sequence = self.sequence;
        let request = request(size, sequence);
        let begun = Instant::now();
        match self.socket.send(&request).await {
            // An earlier packet's error, which the kernel reports once.
            Err(e) if is_unreachable(&e) => return Ok(None),
            sent => sent?,
        };
        let replied = async {
            let mut buffer = vec![0; request.len() + 1];
            loop {
                match self.socket.recv(&mut buffer).await {
                    Ok(length) if is_reply(&buffer[..length], request.len(), sequence) => return Ok(Some(())),
                    // A late reply to an earlier packet.
                    Ok(_) => {}
                    Err(e) if is_unreachable(&e) => return Ok(None),
                    Err(e) => return Err(e),
                }
            }
        };
        match timeout(limit, replied).await {
            Ok(replied) => Ok(replied?.map(|()| begun.elapsed())),
            Err(_) => Ok(None),
        }
    }

    /// Returns the largest size up to `largest` that has a reply within `limit`, and the time until the reply; `None` if
    /// no packet has one. Sends at most 11 packets.
    ///
    /// # Errors
    /// If the kernel does not send the packets.
    pub(crate) async fn largest(&mut self, largest: u32, limit: Duration) -> io::Result<Option<(u32, Duration)>> {
        let largest = largest.min(LARGEST);
        // One packet may be lost by chance.
        for _ in 0..2 {
            if let Some(time) = self.ask(largest, limit).await? {
                return Ok(Some((largest, time)));
            }
        }
        let smallest = SMALLEST.min(largest);
        let Some(mut time) = self.ask(smallest, limit).await? else { return Ok(None) };
        let mut search = Search::new(smallest, largest);
        while let Some(size) = search.next() {
            let replied = self.ask(size, limit).await?;
            search.tried(size, replied.is_some());
            time = replied.unwrap_or(time);
        }
        Ok(Some((search.good, time)))
    }
}

/// Whether an error says that a router or the destination does not accept packets.
fn is_unreachable(e: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionRefused, HostUnreachable, NetworkUnreachable};
    matches!(e.kind(), ConnectionRefused | HostUnreachable | NetworkUnreachable)
}

/// Returns an echo request. The kernel sets its identifier and its checksum.
fn request(size: u32, sequence: u16) -> Vec<u8> {
    let payload = size.clamp(SMALLEST, LARGEST) - HEADERS;
    let [high, low] = sequence.to_be_bytes();
    let mut packet = vec![ECHO, 0, 0, 0, 0, 0, high, low];
    packet.resize(8 + payload as usize, 0);
    packet
}

fn is_reply(packet: &[u8], length: usize, sequence: u16) -> bool {
    let [high, low] = sequence.to_be_bytes();
    packet.len() == length && packet.first() == Some(&REPLY) && packet.get(6..8) == Some(&[high, low])
}

/// Search for the largest packet that passes.
#[derive(Debug)]
struct Search {
    /// Largest size that has passed, and smallest one that has not.
    good: u32,
    bad: u32,
    left: u32,
}

impl Search {
    /// Begins below a size that does not pass, with one that does.
    fn new(good: u32, bad: u32) -> Self {
        Self { good, bad, left: STEPS }
    }

    /// Returns the next size to try; `None` if the search is exact enough.
    fn next(&self) -> Option<u32> {
        (self.left > 0 && self.bad - self.good > EXACTNESS).then(|| self.good.midpoint(self.bad))
    }

    fn tried(&mut self, size: u32, passes: bool) {
        self.left -= 1;
        if passes {
            self.good = size;
        } else {
            self.bad = size;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_echo_to_this_machine_has_a_reply() {
        // A machine may permit no ping sockets.
        let mut echo = match Echo::open(Ipv4Addr::LOCALHOST).await {
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => return,
            opened => opened.unwrap(),
        };
        assert!(echo.mtu().unwrap() >= SMALLEST);
        for size in [SMALLEST, 1420, 9000] {
            let found = echo.largest(size, Duration::from_secs(5)).await.unwrap();
            assert_eq!(found.map(|(largest, _)| largest), Some(size));
        }
    }

    #[test]
    fn only_the_reply_to_the_last_packet_counts() {
        let packet = request(100, 0x0102);
        assert_eq!((packet.len(), packet[0]), (80, ECHO));
        let mut reply = packet.clone();
        reply[0] = REPLY;
        assert!(is_reply(&reply, packet.len(), 0x0102));
        assert!(!is_reply(&packet, packet.len(), 0x0102));
        assert!(!is_reply(&reply, packet.len(), 0x0103));
        assert!(!is_reply(&reply[..79], packet.len(), 0x0102));
        assert!(!is_reply(&[], packet.len(), 0x0102));
        assert_eq!((request(0, 1).len(), request(1 << 20, 1).len()), (48, 65_515));
    }

    #[test]
    fn the_search_finds_a_network_that_drops_large_packets() {
        for limit in [68, 69, 576, 1280, 1372, 1419] {
            let (mut search, mut packets) = (Search::new(SMALLEST, 1420), 0);
            while let Some(size) = search.next() {
                search.tried(size, size <= limit);
                packets += 1;
            }
            assert!(search.good <= limit && limit - search.good <= EXACTNESS, "{limit}: {search:?}");
            assert!(packets <= STEPS, "{packets}");
        }
        assert_eq!(Search::new(SMALLEST, SMALLEST).next(), None);
    }
}
