//! Expected result of every cell, and the reason. Change this table when the fleet's privileges change.

use Place::{App, Db, EvictedHub, Hub, Keeper, Monitor, PxeHost, Stranger, TokenHolder, Voter};
use Target::{
    Backups, DenyVersion, EtcdPeer, MeshKeys, Patroni, Postgres, ReadEtcd, Routes, Secrets, TakeSlot, Vip, WriteEtcd,
};

/// The attacker's position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// A node with the role `app`.
    App,
    /// A node with the role `monitor`.
    Monitor,
    /// A node with the role `db`.
    Db,
    /// Has an etcd vote and is not a hub.
    Voter,
    /// Stores the backups and has no other role.
    Keeper,
    /// A hub, with its issuer and its vote.
    Hub,
    /// The operator evicted it with `bakehouse leave --now`. The attacker stopped its agent before, and everything else
    /// still runs.
    EvictedHub,
    /// A host outside the fleet with a group's ticket.
    TokenHolder,
    /// A host that reaches the hubs' public addresses, and has captured a join request.
    Stranger,
    /// A host on the network where `bakehouse netboot` serves.
    PxeHost,
}

/// The attacker's goal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Target {
    /// Read the keys in etcd.
    ReadEtcd,
    /// Write keys in etcd.
    WriteEtcd,
    /// Take part in etcd's Raft as a member.
    EtcdPeer,
    /// Change Patroni's settings.
    Patroni,
    /// Connect to PostgreSQL as another role.
    Postgres,
    /// Read the backups.
    Backups,
    /// Take the VIP with VRRP messages.
    Vip,
    /// Announce another node's address with BGP.
    Routes,
    /// Change another node's mesh key.
    MeshKeys,
    /// Deny a version to the fleet.
    DenyVersion,
    /// Join as the owner of a slot.
    TakeSlot,
    /// Read another node's secrets.
    Secrets,
}

/// How far an attack succeeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// The attack fails.
    No,
    /// The attack reaches a limited part of the goal.
    Part,
    /// The attack reaches the goal.
    Yes,
}

impl Place {
    /// Every position, in the order of the rows.
    pub const ALL: [Self; 10] = [App, Monitor, Db, Voter, Keeper, Hub, EvictedHub, TokenHolder, Stranger, PxeHost];

    /// Returns the heading of the row.
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
    /// Every goal, in the order of the columns.
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

    /// Returns the heading of the column.
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

const PATRONI_OWNS: &str = "Patroni keeps its state in etcd. A db node reads and writes only below Patroni's prefix \
    (leader, settings, history).";
const DB_IS_PATRONI: &str = "Each Patroni member can change the settings of all members, and a setting can name a \
    command. Root on one db node therefore controls the whole database.";
const DB_PASSWORDS: &str = "Patroni on every db node has the passwords of the superuser, the replication user and \
    the owner of Odoo's database.";
const DB_BACKUPS: &str = "Every db node archives WAL to the repository and restores from it.";
const KEEPER_BACKUPS: &str = "This node stores the repository, so root on it reads all data as of the last backup. \
    Encrypt the disk, and give the role a machine of its own.";
const RAFT: &str = "Members of etcd trust each other. A voter proposes any raft entry in the name of any user, and so \
    writes every key: slots, mesh keys, denied versions and Patroni's settings. Protect the machine of the third vote \
    as well as a hub.";
const VOTER_DATA: &str = "A voter has a copy of etcd's data on its disk. etcd stores no passwords and no private keys.";
const HUB: &str = "A hub is the fleet's authority: its agent writes `/bakehouse/`, signs the certificates of joining \
    nodes, and distributes their passwords. Root on a hub controls the fleet, see \"When a hub is taken\".";
const HUB_NETWORK: &str = "A hub routes the mesh and takes part in the VRRP election of the VIP. The other hubs trust \
    its VRRP and BGP messages.";
const OLD_SECRETS: &str = "A hub's state contains every password of the fleet. They stay valid until the operator \
    replaces them.";
const OWN_GROUP: &str = "This is the purpose of the ticket: a slot of its own group, until its uses are spent, it \
    expires, or the operator revokes it. With the slot come the secrets of the group's roles.";
const PXE_GROUP: &str = "`[netboot] others` gives any machine on that network a ticket of the named group. If other \
    people's machines are on that network, leave the key out, or name MAC addresses.";

/// Returns the expected result of a cell, and the reason if it is not "no".
#[must_use]
pub(super) fn expected(place: Place, target: Target) -> (Reach, &'static str) {
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
