//! What an image says of itself: a manifest, and its packages as an SPDX document.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use serde::Serialize;
use serde_json::{Value, json};

use crate::bake::pretty_json;
use crate::error::Result;
use crate::packages::lock::Package;
use crate::util::digest::Key;

/// `NAME_VERSION.manifest.json`.
#[derive(Serialize)]
pub struct Manifest<'a> {
    pub format: u32,
    pub id: &'a str,
    pub version: &'a str,
    pub fleet: &'a str,
    pub group: &'a str,
    pub roles: &'a [String],
    /// Revision of the fleet's sources, as `--revision` gave it.
    pub revision: Option<&'a str>,
    /// Version of bakehouse.
    pub bakehouse: &'a str,
    /// sha256 of bakehouse.lock.
    pub lock: &'a str,
    pub kernel: &'a str,
    pub roothash: &'a str,
    /// Bytes.
    pub sizes: Sizes,
    /// sha256 of the agent.
    pub agent: &'a str,
    pub packages: Vec<Value>,
    /// Files laid over the packages': path → sha256 (of a link's target, for a link).
    pub files: BTreeMap<&'a str, String>,
    /// Addresses of the group's slots.
    pub nodes: BTreeMap<&'a str, Ipv4Addr>,
    /// Format of what the agent keeps on a node.
    pub state: u16,
    pub mesh: String,
    /// Names of what converts a node's data.
    pub migrations: Vec<&'a str>,
    /// Where the database came from, if not made empty: `[backup] restore`.
    pub restore: Option<&'a str>,
}

#[derive(Serialize)]
pub struct Sizes {
    pub disk: u64,
    pub root_slot: u64,
    pub root: u64,
    pub uki: u64,
    /// All files of the tree, unpacked.
    pub tree: u64,
}

/// Packages as the manifest lists them.
#[must_use]
pub fn package_list(packages: &[&Package]) -> Vec<Value> {
    packages
        .iter()
        .map(|p| json!({ "name": p.name, "version": p.version, "arch": p.arch, "suite": p.suite, "sha256": p.sha256 }))
        .collect()
}

/// An SPDX 2.3 document.
///
/// # Errors
/// Never in practice: the values are plain.
pub fn spdx(id: &str, version: &str, epoch: u64, packages: &[&Package]) -> Result<Vec<u8>> {
    let mut key = Key::new("spdx");
    key.add("id", id).add("version", version);
    let mut list = vec![json!({
        "SPDXID": "SPDXRef-image", "name": id, "versionInfo": version,
        "downloadLocation": "NOASSERTION", "primaryPackagePurpose": "OPERATING-SYSTEM",
    })];
    let mut relations = vec![json!({
        "spdxElementId": "SPDXRef-DOCUMENT", "relationshipType": "DESCRIBES", "relatedSpdxElement": "SPDXRef-image",
    })];
    for p in packages {
        key.add("deb", &p.sha256);
        let name: String = p.name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        let reference = format!("SPDXRef-deb-{name}-{}", &p.sha256[..8]);
        list.push(json!({
            "SPDXID": reference, "name": p.name, "versionInfo": p.version, "downloadLocation": "NOASSERTION",
            "checksums": [{ "algorithm": "SHA256", "checksumValue": p.sha256 }],
            "externalRefs": [{
                "referenceCategory": "PACKAGE-MANAGER", "referenceType": "purl",
                "referenceLocator": format!("pkg:deb/debian/{}@{}?arch={}", p.name, purl(&p.version), p.arch),
            }],
        }));
        relations.push(json!({
            "spdxElementId": "SPDXRef-image", "relationshipType": "CONTAINS", "relatedSpdxElement": reference,
        }));
    }
    pretty_json(&json!({
        "spdxVersion": "SPDX-2.3", "dataLicense": "CC0-1.0", "SPDXID": "SPDXRef-DOCUMENT", "name": format!("{id}_{version}"),
        "documentNamespace": format!("urn:bakehouse:{}", key.finish()),
        "creationInfo": { "created": rfc3339(epoch), "creators": [format!("Tool: bakehouse-{}", env!("CARGO_PKG_VERSION"))] },
        "packages": list, "relationships": relations,
    }))
}

fn purl(version: &str) -> String {
    version.replace('+', "%2B").replace(':', "%3A")
}

/// Seconds since 1970 as `2025-01-31T12:00:00Z`.
pub(crate) fn rfc3339(seconds: u64) -> String {
    let (days, time) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let era = days / 146_097;
    let of_era = days % 146_097;
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let day_of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let m = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * m + 2) / 5 + 1;
    let month = if m < 10 { m + 3 } else { m - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", time / 3600, time / 60 % 60, time % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339(1_709_251_199), "2024-02-29T23:59:59Z");
        assert_eq!(rfc3339(1_757_153_702), "2025-09-06T10:15:02Z");
    }
}
