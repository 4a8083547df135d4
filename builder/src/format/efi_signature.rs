//! Authenticated UEFI variables: [UEFI specification](https://uefi.org/specs/UEFI/2.10/), 8.2.2 and 32.4.

use uuid::{Uuid, uuid};

/// `EFI_CERT_X509_GUID`, 32.4.
const X509: Uuid = uuid!("a5c059a1-94e4-4aa7-87b5-ab155c2bf072");
/// `EFI_CERT_TYPE_PKCS7_GUID`, 8.2.2.
const PKCS7: Uuid = uuid!("4aafd29d-68df-49ee-8aa9-347d375665a7");
/// `SignatureOwner`. Firmware does not evaluate it.
const OWNER: Uuid = uuid!("ba4e4005-e000-4000-8000-00000000005b");
/// Non-volatile, boot service access, runtime access, time-based authenticated write access.
const ATTRIBUTES: u32 = 0x27;
/// `EFI_TIME` of the first second of 2024. Firmware compares the times of two writes of a variable, but the builder's
/// variables are written once.
const TIME: [u8; 16] = [0xe8, 0x07, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// Returns an `EFI_SIGNATURE_LIST` of one certificate.
pub fn signature_list(certificate: &[u8]) -> Vec<u8> {
    const HEAD: u32 = 28;
    let size = 16 + certificate.len() as u32;
    let mut list = X509.to_bytes_le().to_vec();
    for number in [HEAD + size, 0, size] {
        list.extend(number.to_le_bytes());
    }
    list.extend(OWNER.to_bytes_le());
    list.extend(certificate);
    list
}

/// Returns the signed data of a variable: its name, vendor, attributes, time and content.
pub fn signed_part(name: &str, vendor: Uuid, content: &[u8]) -> Vec<u8> {
    let mut part: Vec<u8> = name.encode_utf16().flat_map(u16::to_le_bytes).collect();
    part.extend(vendor.to_bytes_le());
    part.extend(ATTRIBUTES.to_le_bytes());
    part.extend(TIME);
    part.extend(content);
    part
}

/// Returns an `EFI_VARIABLE_AUTHENTICATION_2`, followed by the content.
pub fn authenticated(signature: &[u8], content: &[u8]) -> Vec<u8> {
    const HEAD: u32 = 24;
    let mut file = TIME.to_vec();
    file.extend((HEAD + signature.len() as u32).to_le_bytes());
    file.extend([0x0200_u16, 0x0ef1].into_iter().flat_map(u16::to_le_bytes));
    file.extend(PKCS7.to_bytes_le());
    file.extend(signature);
    file.extend(content);
    file
}

/// Returns the `SignedData` in a PKCS #7 `ContentInfo`. Firmware expects it without the `ContentInfo`.
pub fn signed_data(content_info: &[u8]) -> Option<&[u8]> {
    let inner = element(content_info, 0x30)?.0;
    let (_, rest) = element(inner, 0x06)?;
    Some(element(rest, 0xa0)?.0)
}

/// Parses a DER element with this tag. Returns its content and the bytes after it.
fn element(bytes: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (first, rest) = bytes.split_first()?;
    let (length, rest) = rest.split_first()?;
    let (length, rest) = match length {
        0x81..=0x84 => {
            let (digits, rest) = rest.split_at_checked(usize::from(length & 0x7f))?;
            (digits.iter().fold(0, |n, d| n << 8 | usize::from(*d)), rest)
        }
        _ => (usize::from(*length), rest),
    };
    (*first == tag).then_some(())?;
    rest.split_at_checked(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_have_the_specified_sizes() {
        let list = signature_list(&[7; 300]);
        assert_eq!(list.len(), 28 + 16 + 300);
        assert_eq!(list[16..20], 344_u32.to_le_bytes());
        assert_eq!(list[24..28], 316_u32.to_le_bytes());
        let file = authenticated(&[1; 100], &list);
        assert_eq!(file[16..20], 124_u32.to_le_bytes());
        assert_eq!(file.len(), 16 + 24 + 100 + 344);
        assert_eq!(signed_part("db", X509, b"x").len(), 4 + 16 + 4 + 16 + 1);
    }

    #[test]
    fn unwraps_signed_data() {
        let wrapped = [0x30, 9, 0x06, 1, 5, 0xa0, 4, 0x30, 2, 8, 9];
        assert_eq!(signed_data(&wrapped), Some(&[0x30, 2, 8, 9][..]));
        assert_eq!(signed_data(&wrapped[..10]), None);
        assert_eq!(element(&[0x30, 0x82, 0, 1, 5, 6], 0x30), Some((&[5][..], &[6][..])));
    }

    proptest::proptest! {
        #[test]
        fn parse_never_panics(bytes: Vec<u8>) {
            let _ = signed_data(&bytes);
        }
    }
}
