//! Lists the packages of an image as an [SPDX 2.3](https://spdx.github.io/spdx-spec/v2.3/) document.

use serde_json::json;

use crate::error::Result;
use crate::packages::lock::{Package, Wheel};
use crate::util::digest::Key;
use crate::util::json::pretty_json;
use crate::util::time::rfc3339;

/// Returns the document.
///
/// # Errors
/// If the document cannot be serialised; does not happen with these values.
pub(crate) fn spdx(id: &str, version: &str, epoch: u64, packages: &[&Package], wheels: &[&Wheel]) -> Result<Vec<u8>> {
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
    for w in wheels {
        key.add("wheel", &w.sha256);
        let reference = format!("SPDXRef-wheel-{}-{}", w.name, &w.sha256[..8]);
        list.push(json!({
            "SPDXID": reference, "name": w.name, "versionInfo": w.version, "downloadLocation": "NOASSERTION",
            "checksums": [{ "algorithm": "SHA256", "checksumValue": w.sha256 }],
            "externalRefs": [{
                "referenceCategory": "PACKAGE-MANAGER", "referenceType": "purl",
                "referenceLocator": format!("pkg:pypi/{}@{}", w.name, purl(&w.version)),
            }],
        }));
        relations.push(json!({
            "spdxElementId": "SPDXRef-image", "relationshipType": "CONTAINS", "relatedSpdxElement": reference,
        }));
    }
    pretty_json(&json!({
        "spdxVersion": "SPDX-2.3", "dataLicense": "CC0-1.0", "SPDXID": "SPDXRef-DOCUMENT",
        "name": format!("{id}_{version}"),
        "documentNamespace": format!("urn:bakehouse:{}", key.finish()),
        "creationInfo": {
            "created": rfc3339(epoch), "creators": [format!("Tool: bakehouse-{}", env!("CARGO_PKG_VERSION"))],
        },
        "packages": list, "relationships": relations,
    }))
}

fn purl(version: &str) -> String {
    version.replace('+', "%2B").replace(':', "%3A")
}
