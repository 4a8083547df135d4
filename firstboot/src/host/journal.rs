//! Events of a node. Each has a constant `MESSAGE_ID`, so `journalctl MESSAGE_ID=…` finds it also if its text changes.

use tracing::{error, info, warn};

/// An event of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The node asks the hubs for a slot.
    Asking,
    /// No hub has granted a slot yet. The message has the reasons.
    Waiting,
    /// The node has its slot for the first time.
    Joined,
    /// The services of the node's roles are starting.
    Starting,
    /// All services of the roles run.
    Ready,
    /// Another machine has the slot, and this node has stopped.
    Fenced,
    /// The node leaves the fleet: it hands over its work, and stops.
    Leaving,
    /// The primary is unreachable, and the hubs released its leader key.
    Deposed,
    /// The agent stopped, and needs an operator. The message has the reason.
    Stopped,
    /// The image failed its health check. The machine restarts if it has another image.
    Unwell,
    /// The node has the update lock, and downloads a newer image.
    Changing,
    /// The download of the newer image failed, and the node keeps its version.
    NotLoaded,
    /// The newer image is on the disk, and the machine restarts.
    Restarting,
    /// A rescue disk has opened the maintenance console.
    Rescue,
    /// The maintenance console closes.
    RescueClosed,
    /// A rescue disk is attached, and opens no maintenance console. The message has the reason.
    RescueRefused,
}

impl Event {
    /// Returns the event's `MESSAGE_ID`, which must never change.
    #[must_use]
    pub fn id(self) -> &'static str {
        match self {
            Self::Asking => "2a940f1d1d3f4c08875d3666b5c85668",
            Self::Waiting => "c57ee05a949f4b0883ab0d71a5cbd1d8",
            Self::Joined => "4710a24b19b84f0f8d015e7414ab14be",
            Self::Starting => "74b55afba0f24abe81f825e454cced90",
            Self::Ready => "ed332b9acea34a0a815d470208bf32ac",
            Self::Fenced => "7821c7809036486380b365c57b3d1af7",
            Self::Leaving => "5b0e1f3a6c9d4b7e8a2f4d6c8e0b1a39",
            Self::Deposed => "8f0c2e9d61b34a7c9d5e47b1a2c36f58",
            Self::Stopped => "424c74a10ab84d0682252246d5d67e4a",
            Self::Unwell => "cd7f83f7efc4486e8ee0159ec8aa1aff",
            Self::Changing => "55e9a1067c1b47f380ecbd230fafea28",
            Self::NotLoaded => "bfee075d293e41ae8a9bbe02b6d0febf",
            Self::Restarting => "dba5ab0f619a404e81c1653a014dc3c8",
            Self::Rescue => "0c6f3f6c5f1e4b0c9a58e3d27b41a9d6",
            Self::RescueClosed => "6b2d90a1c7e84f35b1f04d8a3e97c652",
            Self::RescueRefused => "e41a7c58d9034b62a6c5f27b80d13e9f",
        }
    }
}

/// Writes an event to the log. Its level is `error` if an operator has to act.
pub fn record(event: Event, text: &str) {
    let message_id = event.id();
    match event {
        Event::Fenced | Event::Stopped | Event::Unwell | Event::RescueRefused => error!(message_id, "{text}"),
        Event::Waiting | Event::Deposed | Event::NotLoaded | Event::Rescue | Event::RescueClosed => {
            warn!(message_id, "{text}");
        }
        _ => info!(message_id, "{text}"),
    }
}

/// A request of an operator to the node API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// It reads a state.
    Read,
    /// It changes the node, or opens a service of the node.
    Action,
}

impl Request {
    /// Returns the request's `MESSAGE_ID`, which must never change.
    #[must_use]
    pub fn id(self) -> &'static str {
        match self {
            Self::Read => "9f6a3c0d5b8e4f27a1c94e0b7d2f6a58",
            Self::Action => "3be1d7a90c6248f5b27fd41e8a9c5063",
        }
    }
}

/// Writes an operator's request to the log: who sent it, the hub that forwarded it, what it asks, and its result: a
/// status of HTTP, or `begins` for an action.
pub fn record_request(request: Request, operator: &str, from: &str, what: &str, result: &str) {
    let message_id = request.id();
    info!(message_id, operator, from, result, "{operator} from {from}: {what}: {result}");
}
