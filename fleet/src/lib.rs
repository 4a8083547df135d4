//! The contract between the builder and the agent: the schema of `fleet.toml`, the slots and addresses that follow from
//! it, the roles, the templates, and the messages between nodes.
//!
//! The crate does no I/O. Callers pass bytes, and get values or [`Diagnostic`]s, so tests and fuzzers reach every rule
//! without a disk.
//!
//! # Examples
//!
//! From the text of a `fleet.toml` to a file of one node:
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let text = b"name = \"acme\"\n[groups]\nhub.count = 3\ndb.count = 2\n";
//! let fleet = fleet::Fleet::parse("fleet.toml", text)?;
//! let topology = fleet::Topology::from_fleet(&fleet);
//! let template = "{% for node in nodes %}\n{{ node.address }} {{ node.name }}\n{% endfor %}\n";
//! let hosts = fleet::render("hosts.j2", template, &topology)?;
//! assert!(hosts.starts_with("10.10.0.10 db-1\n10.10.0.11 db-2\n10.10.0.1 hub-1\n"));
//! # Ok(())
//! # }
//! ```

mod alerts;
pub mod blocks;
mod calendar;
mod certificate;
mod chain;
mod diagnostic;
mod dns;
pub mod encoding;
pub mod etcd_keys;
#[cfg(feature = "schema")]
mod form;
pub mod grubenv;
mod join;
mod lan;
mod lint;
mod mail;
mod membership;
pub mod netboot;
pub mod node_api;
mod odoo;
mod odoo_code;
mod odoo_server;
mod operator;
mod overlay;
pub mod ports;
pub mod postgres;
mod profile;
#[cfg(feature = "schema")]
pub mod reference;
mod rescue;
mod rollout;
mod schema;
mod settings;
mod signed;
mod template;
mod text;
mod ticket;
mod topology;
mod version;
mod web;

pub use alerts::{AlertKey, AlertSecretError, AlertSecrets, Alerts, Email, MailTls, Matrix, Ntfy, Slack, Telegram};
pub use certificate::{
    CertificateError, Issuer, OPERATOR_SUFFIX, OPERATOR_USAGE_DER, PrivateKey, PublicKey, etcd_client_anchor,
};
pub use chain::ErrorChain;
pub use diagnostic::{Diagnostic, Diagnostics, Severity, Source};
pub use dns::{Dns, HubAnswer, dnssec_key, serving_hubs, zone_file};
pub use join::{
    Departure, Eviction, Grant, Introduction, JoinReply, JoinRequest, LONGEST, MeshKey, PROTOCOL, Peers, Reason,
    Refusal, Renewal, Revocation, SIGNATURE_HEADER, SlotRecord, Tokens, TokensRequest,
};
pub use lan::{LanAddress, LanPlace};
pub use lint::{HaRow, ha_table, is_fleet_name, lint};
pub use mail::{Mail, MailKey, MailSecrets, MailServer};
pub use membership::{Membership, STATE_VERSION, Secrets, Tls};
pub use odoo::{Odoo, OdooOption};
pub use odoo_code::{CodeOrigin, OdooSource, Repository};
pub use odoo_server::OdooServer;
pub use operator::{
    HubPeer, Operator, OperatorPeer, OperatorPeerRequest, OperatorPeering, OperatorRevocation, OperatorRole,
    RevokedOperator, WireguardKey, operator_peer_message,
};
pub use overlay::{Check, FileMeta, MIGRATIONS, Make, Migration, OverlayManifest, is_of};
pub use profile::{Disk, Fonts, Health, Port, Profile, Profiles, Trim, Units, User, VmSize, parse_size, wheel_name};
pub use rescue::{Rescue, RescueDisk, RescueError, RescueTarget};
pub use rollout::{
    Report, Rollout, RolloutOrder, RolloutRequest, UpdateDecision, UpdateLock, UpdateState, Verdict, disruption_order,
};
pub use schema::{Debian, ExtraSource, Fleet, Group, Hardware, Image, Mesh, Vip};
pub use settings::{Access, Backup, Database, Firewall, Netboot, OpenPort, Promise, Proto, S3, SecureBoot, Update};
pub use signed::{
    BOUND_SIGNATURE_HEADER, ChannelBinding, EXPORTER_LABEL, ORDER_VALIDITY, OrderScope, SignedOrder, bound_message,
};
pub use template::{EMULATED_TIMEOUT_SCALE, MachineSize, NodeContext, RenderError, line_map, render, variables};
pub use text::{is_unsafe, one_line, printable};
pub use ticket::{Claims, Credential, Founder, Joiner, Ticket, TicketError, Token};
pub use topology::{BACKUP, DNS, GIVEN, Node, Topology, UPDATE, VOTER, slot_parts};
pub use version::compare_versions;
pub use web::{Authority, HubKey, HubSecretError, HubSecrets, Web};

/// Directory in the image with the agent's input: `fleet.json` and the templates.
pub const IMAGE_DIR: &str = "usr/lib/bakehouse";
