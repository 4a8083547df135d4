//! WireGuard interfaces: of the kernel, over netlink, or of a userspace program. The agent does not use
//! systemd-networkd, whose reload removes unknown peers ([systemd issue 38196]).
//!
//! [systemd issue 38196]: https://github.com/systemd/systemd/issues/38196

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use fleet::MeshKey;
use futures_util::{StreamExt as _, TryStreamExt as _};
use genetlink::GenetlinkHandle;
use ipnet::Ipv4Net;
use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_generic::GenlMessage;
use netlink_packet_wireguard::{
    WireguardAddressFamily, WireguardAllowedIp, WireguardAllowedIpAttr, WireguardAttribute, WireguardCmd,
    WireguardMessage, WireguardPeer, WireguardPeerAttribute, WireguardPeerFlags,
};
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::route::RouteScope;
use rtnetlink::{Handle, LinkUnspec, LinkWireguard, RouteMessageBuilder};

use super::plan::{Interface, Peer};
use super::state::{PeerState, from_kernel};
use super::userspace::Program;
use crate::error::{Error, Result};

/// Number of peers in one message, which has to fit in a netlink buffer of one or two pages.
const BATCH: usize = 16;

/// Netlink client for WireGuard interfaces.
pub(super) struct Wireguard {
    route: Handle,
    generic: GenetlinkHandle,
}

impl Wireguard {
    pub(super) fn open() -> Result<Self> {
        let (route_task, route, _) = rtnetlink::new_connection().map_err(Error::io("open", "a netlink socket"))?;
        let (generic_task, generic, _) = genetlink::new_connection().map_err(Error::io("open", "a netlink socket"))?;
        tokio::spawn(route_task);
        tokio::spawn(generic_task);
        Ok(Self { route, generic })
    }

    /// Configures an interface as `wanted`. `before` is the configuration that this process applied last.
    pub(super) async fn apply(
        &mut self,
        wanted: &Interface<SocketAddr>,
        before: Option<&Interface<SocketAddr>>,
        private: &[u8; 32],
        mtu: u16,
    ) -> Result<()> {
        let program = Program::for_interface(&wanted.name);
        if before.is_none() {
            self.make(wanted, mtu).await?;
            if let Some(program) = &program {
                program.set_device(private, wanted.port).await?;
            } else {
                let mut device = vec![WireguardAttribute::PrivateKey(*private)];
                device.extend(wanted.port.map(WireguardAttribute::ListenPort));
                self.set(&wanted.name, device).await?;
            }
        }
        let had: &[Peer<SocketAddr>] = before.map_or(&[], |b| &b.peers);
        let known: Vec<MeshKey> = match before {
            Some(before) => before.peers.iter().map(|p| p.key).collect(),
            // An earlier process of the agent may have left peers.
            None => self.states(&wanted.name).await?.into_keys().collect(),
        };
        // Remove peers first, because an allowed address belongs to one peer, and may move to another.
        let gone: Vec<MeshKey> = known.into_iter().filter(|key| wanted.peers.iter().all(|w| w.key != *key)).collect();
        let new: Vec<&Peer<SocketAddr>> = wanted.peers.iter().filter(|p| !had.contains(p)).collect();
        if let Some(program) = program {
            return program.set_peers(&gone, &new).await;
        }
        let changes: Vec<WireguardPeer> = gone.into_iter().map(removed).chain(new.into_iter().map(present)).collect();
        for batch in changes.chunks(BATCH) {
            self.set(&wanted.name, vec![WireguardAttribute::Peers(batch.to_vec())]).await?;
        }
        Ok(())
    }

    /// Creates the interface with its address, and sets it up. An existing interface of an earlier process, or of a
    /// program, stays with its sessions.
    async fn make(&self, wanted: &Interface<SocketAddr>, mtu: u16) -> Result<()> {
        let refused = |e: rtnetlink::Error| Error::cannot(format!("create the interface {}", wanted.name))(e);
        if self.index(&wanted.name).await.is_none() {
            let link = LinkWireguard::new(&wanted.name).mtu(mtu.into()).build();
            self.route.link().add(link).execute().await.map_err(refused)?;
        }
        let missing = || Error::Failed(format!("the interface {} is missing after its creation", wanted.name));
        let index = self.index(&wanted.name).await.ok_or_else(missing)?;
        let local = wanted.address.addr();
        let mut address = self.route.address().add(index, IpAddr::V4(local), wanted.address.prefix_len()).replace();
        if let Some(partner) = wanted.partner {
            let message = address.message_mut();
            message.attributes.retain(|a| !matches!(a, AddressAttribute::Address(_) | AddressAttribute::Broadcast(_)));
            message.attributes.push(AddressAttribute::Address(IpAddr::V4(partner)));
        }
        address.execute().await.map_err(refused)?;
        let up = LinkUnspec::new_with_index(index).mtu(mtu.into()).up().build();
        self.route.link().change(up).execute().await.map_err(refused)?;
        let Some(net) = wanted.route else { return Ok(()) };
        let route = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(net.network(), net.prefix_len())
            .output_interface(index)
            .scope(RouteScope::Link)
            .build();
        self.route.route().add(route).replace().execute().await.map_err(refused)
    }

    async fn index(&self, name: &str) -> Option<u32> {
        let found = self.route.link().get().match_name(name.to_owned()).execute().try_next().await;
        found.ok().flatten().map(|link| link.header.index)
    }

    /// Returns the peers of an interface.
    pub(super) async fn states(&mut self, name: &str) -> Result<BTreeMap<MeshKey, PeerState>> {
        if let Some(program) = Program::for_interface(name) {
            return program.states().await;
        }
        let of = vec![WireguardAttribute::IfName(name.to_owned())];
        let answers = self.talk(name, WireguardCmd::GetDevice, of, NLM_F_REQUEST | NLM_F_DUMP).await?;
        Ok(from_kernel(answers))
    }

    async fn set(&mut self, name: &str, mut attributes: Vec<WireguardAttribute>) -> Result<()> {
        attributes.insert(0, WireguardAttribute::IfName(name.to_owned()));
        self.talk(name, WireguardCmd::SetDevice, attributes, NLM_F_REQUEST | NLM_F_ACK).await?;
        Ok(())
    }

    async fn talk(
        &mut self,
        name: &str,
        cmd: WireguardCmd,
        attributes: Vec<WireguardAttribute>,
        flags: u16,
    ) -> Result<Vec<WireguardMessage>> {
        let action = format!("configure the interface {name}");
        let mut message = NetlinkMessage::from(GenlMessage::from_payload(WireguardMessage { cmd, attributes }));
        message.header.flags = flags;
        let mut answers = self.generic.request(message).await.map_err(Error::cannot(&action))?;
        let mut messages = Vec::new();
        while let Some(answer) = answers.next().await {
            match answer.map_err(Error::cannot(&action))?.payload {
                NetlinkPayload::Error(e) if e.code.is_some() => return Err(Error::cannot(action)(e.to_io())),
                NetlinkPayload::InnerMessage(message) => messages.push(message.payload),
                _ => {}
            }
        }
        Ok(messages)
    }
}

fn removed(key: MeshKey) -> WireguardPeer {
    WireguardPeer(vec![
        WireguardPeerAttribute::PublicKey(key.0),
        WireguardPeerAttribute::Flags(WireguardPeerFlags::RemoveMe),
    ])
}

fn present(peer: &Peer<SocketAddr>) -> WireguardPeer {
    let mut attributes = vec![
        WireguardPeerAttribute::PublicKey(peer.key.0),
        WireguardPeerAttribute::Flags(WireguardPeerFlags::ReplaceAllowedIps),
    ];
    attributes.extend(peer.endpoint.map(WireguardPeerAttribute::Endpoint));
    attributes.extend(peer.keepalive.map(WireguardPeerAttribute::PersistentKeepalive));
    attributes.push(WireguardPeerAttribute::AllowedIps(peer.allowed.iter().copied().map(allowed).collect()));
    WireguardPeer(attributes)
}

fn allowed(net: Ipv4Net) -> WireguardAllowedIp {
    WireguardAllowedIp(vec![
        WireguardAllowedIpAttr::Family(WireguardAddressFamily::Ipv4),
        WireguardAllowedIpAttr::IpAddr(IpAddr::V4(net.network())),
        WireguardAllowedIpAttr::Cidr(net.prefix_len()),
    ])
}
