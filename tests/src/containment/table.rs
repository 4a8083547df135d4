//! What is expected of every cell, and why. The one place to change when the fleet's privileges change.

use Place::{App, Db, EvictedHub, Hub, Keeper, Monitor, PxeHost, Stranger, TokenHolder, Voter};
use Target::{
    Backups, DenyVersion, EtcdPeer, MeshKeys, Patroni, Postgres, ReadEtcd, Routes, Secrets, TakeSlot, Vip, WriteEtcd,
};

/// Where the attacker stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    App,
    Monitor,
    Db,
    /// Holds an etcd vote and is no hub.
    Voter,
    /// Keeps the backups, and has no other role.
    Keeper,
    Hub,
    /// Has left by `bakehouse leave --now`; root stopped its agent before, everything else still runs.
    EvictedHub,
    /// Not a node; has a ticket of a group.
    TokenHolder,
    /// A host that reaches the hubs' public addresses, and has captured a join request.
    Stranger,
    /// A host on the network where `bakehouse netboot` serves.
    PxeHost,
}

/// What the attacker wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Target {
    ReadEtcd,
    WriteEtcd,
    EtcdPeer,
    Patroni,
    Postgres,
    Backups,
    Vip,
    Routes,
    MeshKeys,
    DenyVersion,
    TakeSlot,
    Secrets,
}

/// How much of it the attacker gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    No,
    Part,
    Yes,
}

impl Place {
    pub const ALL: [Self; 10] = [App, Monitor, Db, Voter, Keeper, Hub, EvictedHub, TokenHolder, Stranger, PxeHost];

    /// Heading of the row.
    #[must_use]
    pub fn title(self) -> &'static str {
        match self {
            App => "app",
            Monitor => "monitor",
            Db => "db",
            Voter => "voter that is no hub",
            Keeper => "backup keeper",
            Hub => "hub",
            EvictedHub => "evicted hub",
            TokenHolder => "holder of a joiner's ticket",
            Stranger => "stranger on the internet",
            PxeHost => "host on the PXE network",
        }
    }
}

impl Target {
    pub const ALL: [Self; 12] = [
        ReadEtcd,
        WriteEtcd,
        EtcdPeer,
        Patroni,
        Postgres,
        Backups,
        Vip,
        Routes,
        MeshKeys,
        DenyVersion,
        TakeSlot,
        Secrets,
    ];

    /// Heading of the column.
    #[must_use]
    pub fn title(self) -> &'static str {
        match self {
            ReadEtcd => "read etcd",
            WriteEtcd => "write etcd",
            EtcdPeer => "be an etcd peer",
            Patroni => "change Patroni's settings",
            Postgres => "PostgreSQL as another role",
            Backups => "read the backups",
            Vip => "take the VIP (VRRP)",
            Routes => "announce another's address (BGP)",
            MeshKeys => "change another's mesh key",
            DenyVersion => "deny a version",
            TakeSlot => "take a slot",
            Secrets => "read another node's secrets",
        }
    }
}

const PATRONI_OWNS: &str = "Patroni keeps its state in etcd: a db node reads and writes below Patroni's prefix \
    (leader, settings, history), and nothing else.";
const DB_IS_PATRONI: &str = "Patroni's members change the settings of all members, and a setting can name a command: \
    one db node is all of the database.";
const DB_PASSWORDS: &str = "Patroni on every db node has the passwords of the superuser, the replication user and \
    the owner of Odoo's database.";
const DB_BACKUPS: &str = "Every db node archives WAL to the repository and restores from it.";
const KEEPER_BACKUPS: &str = "It keeps the repository: whoever is root there has all data as of the last backup. \
    Encrypt the disk, and give the role a machine of its own.";
const RAFT: &str = "Members of etcd trust each other: a voter proposes any entry to raft, in any user's name, and so \
    writes every key; slots, mesh keys, denied versions and Patroni's settings are keys. Give the third vote to a \
    machine as well kept as a hub.";
const VOTER_DATA: &str = "A voter has a copy of etcd's data on its disk. There are no passwords and no private keys in \
    etcd.";
const HUB: &str = "A hub is the fleet's authority: its agent writes `/bakehouse/`, signs the certificates of the nodes \
    it lets in, and hands out their passwords. Whoever is root on a hub owns the fleet; see \"When a hub is taken\".";
const HUB_NETWORK: &str = "A hub routes the mesh and votes on who has the VIP: the other hubs trust its VRRP and BGP.";
const OLD_SECRETS: &str = "It knows what it knew: a hub's state has every password. They stay valid until they are \
    replaced.";
const OWN_GROUP: &str = "This is what the ticket is for: one slot of its own group, as often as the ticket says, until \
    it is used, expires or is revoked. The secrets that come with it are those of the group's roles.";
const PXE_GROUP: &str = "`[netboot] others` gives any machine on that network a ticket of the named group. Leave the key \
    out, or name MAC addresses, where that network has other people's machines.";

/// What a cell is expected to be, and why it is not "no".
#[must_use]
pub fn expected(place: Place, target: Target) -> (Reach, &'static str) {
    match (place, target) {
        (Db, ReadEtcd | WriteEtcd) => (Reach::Part, PATRONI_OWNS),
        (Db, Patroni) => (Reach::Yes, DB_IS_PATRONI),
        (Db, Postgres) => (Reach::Yes, DB_PASSWORDS),
        (Db, Backups) => (Reach::Yes, DB_BACKUPS),
        (Voter, ReadEtcd) => (Reach::Yes, VOTER_DATA),
        (Voter, WriteEtcd | EtcdPeer | Patroni | MeshKeys | DenyVersion | TakeSlot) => (Reach::Yes, RAFT),
        (Keeper, Backups) => (Reach::Yes, KEEPER_BACKUPS),
        (Hub, Vip | Routes) => (Reach::Yes, HUB_NETWORK),
        (Hub, _) => (Reach::Yes, HUB),
        (EvictedHub, Secrets) => (Reach::Yes, OLD_SECRETS),
        (TokenHolder, TakeSlot) => (Reach::Part, OWN_GROUP),
        (PxeHost, TakeSlot) => (Reach::Part, PXE_GROUP),
        _ => (Reach::No, ""),
    }
}
