//! Captures of a node's packets.

use serde::{Deserialize, Serialize};

/// `POST`, admin, with a [`PcapRequest`]: [`crate::node_api::ExecEvent`]s, one a line. Standard output is a [capture
/// file] with the link type `LINUX_SLL2`.
///
/// [capture file]: https://datatracker.ietf.org/doc/draft-ietf-opsawg-pcap/
pub const PCAP_PATH: &str = "/v1/pcap";
/// Longest capture, in seconds.
pub const LONGEST_CAPTURE: u32 = 600;
/// Largest capture, in bytes.
pub const LARGEST_CAPTURE: u64 = 1 << 30;
/// Most bytes of one packet in a capture.
pub const LARGEST_SNAP: u32 = 262_144;

/// A request to capture packets.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PcapRequest {
    /// Interface; all interfaces without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interface: Option<String>,
    /// Seconds after which the capture ends, from 1 to [`LONGEST_CAPTURE`].
    pub seconds: u32,
    /// Bytes of the file after which the capture ends, from 1 to [`LARGEST_CAPTURE`].
    pub bytes: u64,
    /// First bytes of each packet to capture, from 1 to [`LARGEST_SNAP`].
    pub snap: u32,
}
