//! Rescue disks: orders of the fleet's root that open a maintenance console, as root, on one node until an expiry. The
//! order is the content of a disk's partition, so no file system of an untrusted disk is mounted.

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use crate::certificate::{CertificateError, Issuer};
use crate::encoding;
use crate::text::one_line;

/// Beginning of the message that the fleet's root signs. No other message of the root begins so.
const CONTEXT: &[u8] = b"bakehouse-rescue-1\0";
/// 9999-12-31T23:59:59Z. RFC 3339 has no later time.
const LAST: u64 = 253_402_300_799;

/// An order that opens a maintenance console.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rescue {
    /// Format of the order: [`Rescue::VERSION`].
    pub version: u16,
    /// Name of the fleet.
    pub fleet: String,
    /// Slot of the only node that obeys the order.
    pub node: String,
    /// 128 random bits, hexadecimal. The journals of the operator and of the node name the order by it.
    pub id: String,
    /// Seconds since 1970, by the operator's clock.
    pub issued_at: u64,
    /// Time after which the order is invalid, in seconds since 1970.
    pub expires: u64,
}

/// An order with the signature of the fleet's root: the content of a rescue disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RescueDisk {
    /// [`Rescue`] as JSON.
    pub order: String,
    /// Base64 of the signature: ECDSA P-256 with SHA-256, ASN.1.
    pub signature: String,
}

/// A machine that reads a rescue disk.
#[derive(Clone, Copy, Debug)]
pub struct RescueTarget<'a> {
    /// Name of the fleet.
    pub fleet: &'a str,
    /// Slots of which the machine is one: its own, or those that it may still get.
    pub slots: &'a [&'a str],
    /// The machine's time, in seconds since 1970.
    pub now: u64,
}

/// Reason why a machine refuses a rescue disk. The text has the fix. It goes to the console, and anyone may have written
/// the disk, so texts of the disk have one line and no control characters.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RescueError {
    /// The content is not a signed order.
    #[error("it is damaged; make a new one with `bakehouse ticket NODE --rescue`")]
    Malformed,
    /// The order has another format, namely this one.
    #[error("it has format {0}, and this image reads format {known}", known = Rescue::VERSION)]
    Version(u16),
    /// The order is for another fleet.
    #[error("it is of the fleet `{}`, and this machine is of `{own}`", one_line(.disk))]
    Fleet {
        /// Fleet of the disk.
        disk: String,
        /// Fleet of the machine.
        own: String,
    },
    /// The signature is not the root's.
    #[error("it is not signed with this fleet's key; make a new one in the fleet's folder, with its fleet.key")]
    Signature,
    /// The order is for another node.
    #[error("it is for {}, and this machine is {own}; make one with `bakehouse ticket NODE --rescue`", one_line(.disk))]
    Node {
        /// Node of the disk.
        disk: String,
        /// Slot of the machine, or `a node of another group`.
        own: String,
    },
    /// The order has expired.
    #[error(
        "it expired at {expired}, and this machine's time is {now}; make a new one with `bakehouse ticket {} --rescue`, \
         or set the clock in the firmware's menu",
        one_line(.node)
    )]
    Expired {
        /// Node of the disk.
        node: String,
        /// Expiry, RFC 3339.
        expired: String,
        /// The machine's time, RFC 3339.
        now: String,
    },
}

impl Rescue {
    /// Format of orders.
    pub const VERSION: u16 = 1;

    /// Returns the expiry, RFC 3339.
    #[must_use]
    pub fn expires_at(&self) -> String {
        rfc3339(self.expires)
    }
}

impl RescueDisk {
    /// Name of the partition that has the order.
    pub const PARTITION: &str = "bakehouse-rescue";
    /// Longest content, in bytes. Zeros fill the partition behind it.
    pub const LONGEST: usize = 4096;

    /// Signs an order.
    ///
    /// # Errors
    /// If the root's key cannot be read.
    ///
    /// # Examples
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use fleet::{Issuer, Rescue, RescueDisk, RescueError, RescueTarget};
    ///
    /// let root = Issuer::root("acme")?;
    /// let order = Rescue {
    ///     version: Rescue::VERSION,
    ///     fleet: "acme".to_owned(),
    ///     node: "db-1".to_owned(),
    ///     id: "00112233445566778899aabbccddeeff".to_owned(),
    ///     issued_at: 1_767_225_600,
    ///     expires: 1_767_312_000,
    /// };
    /// let mut partition = serde_json::to_vec(&RescueDisk::sign(&root, &order)?)?;
    /// partition.resize(1 << 20, 0);
    ///
    /// let disk = RescueDisk::parse(&partition)?;
    /// let target = RescueTarget { fleet: "acme", slots: &["db-1"], now: 1_767_300_000 };
    /// let signed = |_: &[u8], _: &[u8]| true; // the node verifies with the root's certificate
    /// assert_eq!(disk.open(&target, signed)?, order);
    /// let late = RescueTarget { now: 1_767_312_000, ..target };
    /// assert!(matches!(disk.open(&late, signed), Err(RescueError::Expired { .. })));
    /// # Ok(())
    /// # }
    /// ```
    pub fn sign(root: &Issuer, order: &Rescue) -> Result<Self, CertificateError> {
        let order = serde_json::json!(order).to_string();
        let signature = encoding::encode(&root.sign(&message(&order))?);
        Ok(Self { order, signature })
    }

    /// Parses the content of a partition, of which the caller reads at most [`Self::LONGEST`] bytes.
    ///
    /// # Errors
    /// If the bytes before the first zero are not a signed order.
    pub fn parse(bytes: &[u8]) -> Result<Self, RescueError> {
        let bytes = &bytes[..bytes.len().min(Self::LONGEST)];
        let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
        serde_json::from_slice(text).map_err(|_| RescueError::Malformed)
    }

    /// Returns the order, if this machine obeys it. `is_signed` verifies the root's signature over a message.
    ///
    /// # Errors
    /// If the order is damaged, not signed by the root, for another fleet or node, or has expired.
    pub fn open(
        &self,
        target: &RescueTarget<'_>,
        is_signed: impl Fn(&[u8], &[u8]) -> bool,
    ) -> Result<Rescue, RescueError> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u16,
        }
        let Versioned { version } = serde_json::from_str(&self.order).map_err(|_| RescueError::Malformed)?;
        if version != Rescue::VERSION {
            return Err(RescueError::Version(version));
        }
        let order: Rescue = serde_json::from_str(&self.order).map_err(|_| RescueError::Malformed)?;
        if order.fleet != target.fleet {
            return Err(RescueError::Fleet { disk: order.fleet, own: target.fleet.to_owned() });
        }
        let signature = encoding::decode(&self.signature).ok_or(RescueError::Malformed)?;
        if !is_signed(&message(&self.order), &signature) {
            return Err(RescueError::Signature);
        }
        if !target.slots.contains(&order.node.as_str()) {
            let own = if let [slot] = target.slots { slot } else { "a node of another group" };
            return Err(RescueError::Node { disk: order.node, own: own.to_owned() });
        }
        if target.now >= order.expires {
            let (expired, now) = (order.expires_at(), rfc3339(target.now));
            return Err(RescueError::Expired { node: order.node, expired, now });
        }
        Ok(order)
    }
}

fn message(order: &str) -> Vec<u8> {
    [CONTEXT, order.as_bytes()].concat()
}

fn rfc3339(seconds: u64) -> String {
    let time = OffsetDateTime::from_unix_timestamp(seconds.min(LAST).cast_signed()).expect("at most the year 9999");
    let (date, (hour, minute, second)) = (time.date(), time.to_hms());
    let (year, month, day) = (date.year(), u8::from(date.month()), date.day());
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    const TARGET: RescueTarget<'_> = RescueTarget { fleet: "acme", slots: &["db-1"], now: 1_767_300_000 };

    fn order() -> Rescue {
        Rescue {
            version: Rescue::VERSION,
            fleet: "acme".to_owned(),
            node: "db-1".to_owned(),
            id: "0".repeat(32),
            issued_at: 1_767_225_600,
            expires: 1_767_312_000,
        }
    }

    fn signed(order: &Rescue) -> RescueDisk {
        RescueDisk::sign(&Issuer::root("acme").unwrap(), order).unwrap()
    }

    fn refusal(order: &Rescue, target: &RescueTarget<'_>) -> RescueError {
        signed(order).open(target, |_, _| true).unwrap_err()
    }

    #[test]
    fn opens_until_the_second_of_its_expiry() {
        let at = |now| signed(&order()).open(&RescueTarget { now, ..TARGET }, |_, _| true);
        assert_eq!(at(order().expires - 1).unwrap(), order());
        let e = at(order().expires).unwrap_err().to_string();
        assert!(e.contains("expired at 2026-01-02T00:00:00Z") && e.contains("`bakehouse ticket db-1 --rescue`"), "{e}");
        // A machine without a battery begins in 1970.
        assert_eq!(at(0).unwrap(), order());
    }

    #[test]
    fn rejects_another_fleet_node_format_and_signature() {
        let e = refusal(&Rescue { fleet: "other".into(), ..order() }, &TARGET);
        assert_eq!(e, RescueError::Fleet { disk: "other".into(), own: "acme".into() });
        let e = refusal(&Rescue { node: "db-2".into(), ..order() }, &TARGET);
        assert!(e.to_string().starts_with("it is for db-2, and this machine is db-1"), "{e}");
        let e = refusal(&Rescue { version: 2, ..order() }, &TARGET);
        assert_eq!(e.to_string(), "it has format 2, and this image reads format 1");
        assert_eq!(signed(&order()).open(&TARGET, |_, _| false), Err(RescueError::Signature));
    }

    /// The fleet is compared before the signature, so the text of an unsigned disk gets onto the console.
    #[test]
    fn refusal_has_no_control_characters_of_the_disk() {
        let text = "x\u{1b}[2J\r\n*** ready\u{202e}".to_owned();
        let fleet = refusal(&Rescue { fleet: text.clone(), ..order() }, &TARGET).to_string();
        assert!(fleet.starts_with("it is of the fleet `x\u{fffd}[2J\u{fffd} *** ready\u{fffd}`"), "{fleet}");
        let node = refusal(&Rescue { node: text.clone(), ..order() }, &TARGET).to_string();
        let slots = [text.as_str()];
        let target = RescueTarget { slots: &slots, now: order().expires, ..TARGET };
        let expired = refusal(&Rescue { node: text.clone(), ..order() }, &target).to_string();
        for refusal in [fleet, node, expired] {
            assert!(!refusal.contains(crate::is_unsafe), "{}", refusal.escape_debug());
        }
    }

    #[test]
    fn signature_covers_the_order_and_its_kind() {
        let disk = signed(&order());
        disk.open(&TARGET, |message, _| {
            assert!(message.starts_with(b"bakehouse-rescue-1\0{") && message.ends_with(disk.order.as_bytes()));
            true
        })
        .unwrap();
    }

    /// A later version may add fields.
    #[test]
    fn ignores_unknown_fields() {
        let mut json = serde_json::json!(order());
        json["reason"] = "disk".into();
        let disk = RescueDisk { order: json.to_string(), signature: String::new() };
        assert_eq!(disk.open(&TARGET, |_, _| true).unwrap(), order());
    }

    #[test]
    fn partition_ends_at_the_first_zero() {
        let disk = signed(&order());
        let mut bytes = serde_json::to_vec(&disk).unwrap();
        assert_eq!(RescueDisk::parse(&bytes).unwrap(), disk);
        bytes.resize(1 << 20, 0);
        assert_eq!(RescueDisk::parse(&bytes).unwrap(), disk);
        bytes.fill(b' ');
        assert_eq!(RescueDisk::parse(&bytes), Err(RescueError::Malformed));
        assert_eq!(RescueDisk::parse(&[]), Err(RescueError::Malformed));
    }

    proptest::proptest! {
        #[test]
        fn never_panics(bytes: Vec<u8>, order: String, signature: String, now: u64) {
            let _ = RescueDisk::parse(&bytes);
            let _ = RescueDisk { order, signature }.open(&RescueTarget { now, ..TARGET }, |_, _| true);
            let _ = rfc3339(now);
        }
    }
}
