//! Rescue disks: signed orders that open the maintenance console of one node, in the image of a disk.

use std::collections::BTreeMap;
use std::io::{Cursor, Seek as _, SeekFrom, Write as _};
use std::time::Duration;

use fleet::{Rescue, RescueDisk, Topology};
use gpt::mbr::ProtectiveMBR;
use gpt::partition::Partition;
use gpt::partition_types::LINUX_FS;
use uuid::Uuid;

use crate::error::{Error, Result};
use crate::keys::authority::FleetKey;
use crate::util::digest::hex;
use crate::util::random::random;

/// Bytes of a sector.
const SECTOR: u64 = 512;
/// Size of the disk. Any stick is larger.
const DISK: u64 = 3 << 20;
/// First byte of the partition.
const START: u64 = 1 << 20;
/// Size of the partition.
const SIZE: u64 = 1 << 20;

/// What fails if the image cannot be made.
const WRITE: &str = "write the partition of the rescue disk";

/// Makes an order for a node. `issued_at`: now, in seconds since 1970.
///
/// # Errors
/// If there is no such node, or the kernel returns no random bytes.
pub fn order(topology: &Topology, node: &str, issued_at: u64, lasts: Duration) -> Result<Rescue> {
    if topology.node(node).is_none() {
        let known: Vec<&str> = topology.nodes.iter().map(|n| n.name.as_str()).collect();
        return Err(Error::Usage(format!("there is no node `{node}`; there are: {}", known.join(", "))));
    }
    Ok(Rescue {
        version: Rescue::VERSION,
        fleet: topology.name.clone(),
        node: node.to_owned(),
        id: hex(&random::<16>()?),
        issued_at,
        expires: issued_at.saturating_add(lasts.as_secs()),
    })
}

/// Signs an order, and returns the image of the disk.
///
/// # Errors
/// If the root's key cannot be read.
pub fn image(authority: &FleetKey, order: &Rescue) -> Result<Vec<u8>> {
    let disk = RescueDisk::sign(&authority.root, order)?;
    let content = serde_json::to_vec(&disk).map_err(Error::Json)?;
    if content.len() > RescueDisk::LONGEST {
        return Err(Error::Failed(format!("the order has {} bytes, which is too long", content.len())));
    }
    let mut image = Cursor::new(vec![0; usize::try_from(DISK).unwrap_or_default()]);
    let sectors = u32::try_from(DISK / SECTOR - 1).unwrap_or(u32::MAX);
    ProtectiveMBR::with_lb_size(sectors).overwrite_lba0(&mut image).map_err(Error::cannot(WRITE))?;
    let mut table = gpt::GptConfig::new()
        .writable(true)
        .create_from_device(&mut image, Some(Uuid::from_bytes(random()?)))
        .map_err(Error::cannot(WRITE))?;
    let partition = Partition {
        part_type_guid: LINUX_FS,
        part_guid: Uuid::from_bytes(random()?),
        first_lba: START / SECTOR,
        last_lba: (START + SIZE) / SECTOR - 1,
        flags: 0,
        name: RescueDisk::PARTITION.to_owned(),
    };
    table.update_partitions(BTreeMap::from([(1, partition)])).map_err(Error::cannot(WRITE))?;
    table.write().map_err(Error::cannot(WRITE))?;
    image.seek(SeekFrom::Start(START)).and_then(|_| image.write_all(&content)).map_err(Error::cannot(WRITE))?;
    Ok(image.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet::RescueTarget;

    fn topology() -> Topology {
        let toml = b"name = \"acme\"\n[groups]\nhub.count = 3\ndb.count = 2\n";
        Topology::from_fleet(&fleet::Fleet::parse("f", toml).unwrap())
    }

    #[test]
    fn image_has_one_partition_with_the_order() {
        let order = order(&topology(), "db-2", 1_800_000_000, Duration::from_secs(3600)).unwrap();
        let image = image(&FleetKey::create("acme").unwrap(), &order).unwrap();
        let disk = gpt::GptConfig::new().open_from_device(Cursor::new(image.clone())).unwrap();
        let partitions: Vec<&Partition> = disk.partitions().values().collect();
        let [partition] = partitions[..] else { panic!("{partitions:?}") };
        assert_eq!(partition.name, "bakehouse-rescue");
        let start = usize::try_from(partition.first_lba * SECTOR).unwrap();
        let found = RescueDisk::parse(&image[start..]).unwrap();
        let target = RescueTarget { fleet: "acme", slots: &["db-2"], now: 1_800_000_000 };
        assert_eq!(found.open(&target, |_, _| true).unwrap(), order);
        assert_eq!(order.expires, 1_800_003_600);
    }

    #[test]
    fn orders_differ_and_name_a_node() {
        let of = |node: &str| order(&topology(), node, 1, Duration::from_secs(1));
        assert_ne!(of("db-1").unwrap().id, of("db-1").unwrap().id);
        let e = of("db").unwrap_err().to_string();
        assert!(e.contains("there is no node `db`; there are: db-1, db-2, hub-1"), "{e}");
    }
}
