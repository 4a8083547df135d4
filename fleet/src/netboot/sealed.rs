//! Encryption of tickets to the requesting machine: X25519, HKDF-SHA-256 and AES-256-GCM. The same key agreement gives
//! the key that authenticates the machine's reports.

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, KeyType, Prk, Salt};
use ring::hmac;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use x25519_dalek::{PublicKey, StaticSecret};

use super::messages::{ProgressReport, SealedTicket};
use crate::encoding::{decode, encode};

/// Alphabet of a code: Crockford's base 32, in which no letter looks like a digit.
const SYMBOLS: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
/// Number of symbols in a code. They have 80 bits, so a search for another key with the same code is not feasible.
const CODE: usize = 16;

/// A ticket that cannot be encrypted or decrypted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SealError(String);

/// The machine's key pair. The machine makes it at each boot, and stores it nowhere.
pub struct Key {
    secret: StaticSecret,
    public: String,
}

impl Key {
    /// Makes a new key pair.
    ///
    /// # Errors
    /// If the kernel returns no random bytes.
    pub fn generate() -> Result<Self, SealError> {
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes).map_err(|e| failed(&format!("the kernel returns no random bytes: {e}")))?;
        let secret = StaticSecret::from(bytes);
        let public = encode(PublicKey::from(&secret).as_bytes());
        Ok(Self { secret, public })
    }

    /// Returns the public key, base64.
    #[must_use]
    pub fn public(&self) -> &str {
        &self.public
    }

    /// Decrypts a ticket. Returns it with the key for this machine's reports.
    ///
    /// # Errors
    /// If the ticket is encrypted to another key, or was changed in transit.
    pub fn open(&self, sealed: &SealedTicket) -> Result<(Vec<u8>, ReportKey), SealError> {
        let mut content = decode(&sealed.content).ok_or_else(|| failed("the ticket is not base64"))?;
        let (key, report) = agree(&self.secret, &sealed.key, &sealed.key, &self.public)?;
        let open = key.open_in_place(nonce(), Aad::empty(), &mut content);
        let ticket = open.map_err(|_| failed("the ticket is encrypted to another machine, or damaged"))?.to_vec();
        Ok((ticket, report))
    }
}

/// Encrypts a ticket to a machine's public key. Returns it with the key for the machine's reports.
///
/// # Errors
/// If `to` is not an X25519 key.
pub fn seal(content: &[u8], to: &str) -> Result<(SealedTicket, ReportKey), SealError> {
    let own = Key::generate()?;
    let mut content = content.to_vec();
    let (key, report) = agree(&own.secret, to, &own.public, to)?;
    key.seal_in_place_append_tag(nonce(), Aad::empty(), &mut content).map_err(|_| failed("the ticket is too long"))?;
    Ok((SealedTicket { key: own.public, content: encode(&content) }, report))
}

/// Returns the code of a machine's key and the node that it becomes. The machine shows the code on its console, and the
/// operator types it at the server.
///
/// The code has 80 bits of SHA-256, in four groups of four symbols. An attacker would need a key with the same code to
/// get that key confirmed.
#[must_use]
pub fn code(key: &str, to: &str) -> String {
    let mut hash = Sha256::new();
    for part in ["bakehouse netboot code, v1", to, key] {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    let hash = hash.finalize();
    let number = hash.iter().take(CODE * 5 / 8).fold(0_u128, |n, byte| n << 8 | u128::from(*byte));
    let symbol = |i: usize| char::from(SYMBOLS[(number >> (5 * (CODE - 1 - i))) as usize & 31]);
    let symbols: Vec<char> = (0..CODE).map(symbol).collect();
    symbols.chunks(4).map(|group| group.iter().collect()).collect::<Vec<String>>().join("-")
}

/// Normalises a code that the operator typed: in either case, with or without dashes and spaces.
#[must_use]
pub fn read_code(typed: &str) -> Option<String> {
    let symbols: Option<Vec<char>> = typed
        .chars()
        .filter(|c| *c != '-' && !c.is_whitespace())
        .map(|c| match c.to_ascii_uppercase() {
            'O' => Some('0'),
            'I' | 'L' => Some('1'),
            c => SYMBOLS.contains(&u8::try_from(c).ok()?).then_some(c),
        })
        .collect();
    let symbols = symbols.filter(|s| s.len() == CODE)?;
    Some(symbols.chunks(4).map(|group| group.iter().collect()).collect::<Vec<String>>().join("-"))
}

/// Key that authenticates a machine's reports. Only the machine and the server can derive it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ReportKey(String);

impl std::fmt::Debug for ReportKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ReportKey(…)")
    }
}

impl ReportKey {
    /// Returns the report with its proof.
    #[must_use]
    pub fn prove(&self, mut report: ProgressReport) -> ProgressReport {
        report.proof = encode(hmac::sign(&self.hmac(), &report.message()).as_ref());
        report
    }

    /// Whether the report comes from the machine that shares this key.
    #[must_use]
    pub fn verify(&self, report: &ProgressReport) -> bool {
        decode(&report.proof).is_some_and(|proof| hmac::verify(&self.hmac(), &report.message(), &proof).is_ok())
    }

    fn hmac(&self) -> hmac::Key {
        hmac::Key::new(hmac::HMAC_SHA256, self.0.as_bytes())
    }
}

/// Length of HKDF's output: 32 bytes.
struct Secret32;

impl KeyType for Secret32 {
    fn len(&self) -> usize {
        32
    }
}

/// Derives the ticket's key and the reports' key from `secret` and the other end's public key.
fn agree(
    secret: &StaticSecret,
    other: &str,
    server: &str,
    machine: &str,
) -> Result<(LessSafeKey, ReportKey), SealError> {
    let bytes = decode(other).and_then(|b| <[u8; 32]>::try_from(b).ok());
    let other = PublicKey::from(bytes.ok_or_else(|| failed("the key is not an X25519 key in base64"))?);
    let shared = secret.diffie_hellman(&other);
    // A key of low order would give a secret that is publicly known (RFC 7748 § 6.1).
    if !shared.was_contributory() {
        return Err(failed("the key is not an X25519 key"));
    }
    let prk = Salt::new(HKDF_SHA256, b"bakehouse netboot ticket").extract(shared.as_bytes());
    let context = |what: &'static str| [what.as_bytes(), server.as_bytes(), machine.as_bytes()];
    let no_key = |_| failed("cannot derive the keys");
    let ticket = prk.expand(&context("ticket"), &AES_256_GCM).map(UnboundKey::from).map_err(no_key)?;
    Ok((LessSafeKey::new(ticket), ReportKey(report_secret(&prk, &context("report")).map_err(no_key)?)))
}

fn report_secret(prk: &Prk, context: &[&[u8]]) -> Result<String, ring::error::Unspecified> {
    let mut bytes = [0; 32];
    prk.expand(context, Secret32)?.fill(&mut bytes)?;
    Ok(encode(&bytes))
}

/// Returns the nonce. It can be constant, because the server makes a key pair for each reply and so uses each key once.
fn nonce() -> Nonce {
    Nonce::assume_unique_for_key([0; 12])
}

fn failed(why: &str) -> SealError {
    SealError(why.to_owned())
}

#[cfg(test)]
mod tests {
    use super::super::messages::{NetbootMachine, Step};
    use super::*;

    #[test]
    fn only_the_requesting_machine_opens_the_ticket() {
        let (asker, other) = (Key::generate().unwrap(), Key::generate().unwrap());
        let (sealed, _) = seal(b"a ticket", asker.public()).unwrap();
        assert!(!sealed.content.contains("ticket"));
        assert!(other.open(&sealed).is_err());
        assert_eq!(asker.open(&sealed).unwrap().0, b"a ticket");
        for key in ["bm8=", "?", &encode(&[0; 32])] {
            assert!(seal(b"a ticket", key).is_err(), "{key}");
        }
    }

    #[test]
    fn open_rejects_changed_ticket() {
        let asker = Key::generate().unwrap();
        let (mut sealed, _) = seal(b"a ticket", asker.public()).unwrap();
        sealed.content.replace_range(..1, if sealed.content.starts_with('A') { "B" } else { "A" });
        assert!(asker.open(&sealed).is_err());
    }

    #[test]
    fn verify_rejects_reports_of_other_machines() {
        let (asker, other) = (Key::generate().unwrap(), Key::generate().unwrap());
        let (sealed, server) = seal(b"a ticket", asker.public()).unwrap();
        let (_, machine) = asker.open(&sealed).unwrap();
        let mac = "52:54:00:00:00:01".parse().unwrap();
        let key = asker.public().to_owned();
        let report =
            ProgressReport { version: NetbootMachine::VERSION, mac, step: Step::Installed, key, proof: String::new() };
        let proven = machine.prove(report.clone());
        assert!(server.verify(&proven));
        assert!(!server.verify(&report));
        assert!(!server.verify(&ProgressReport { step: Step::Started, ..proven.clone() }), "the proof of another step");
        // The key of another machine.
        let (sealed, _) = seal(b"a ticket", other.public()).unwrap();
        assert!(!server.verify(&other.open(&sealed).unwrap().1.prove(report)));
        // The server stores the key in a file.
        let stored: ReportKey = serde_json::from_str(&serde_json::to_string(&server).unwrap()).unwrap();
        assert!(stored.verify(&proven));
    }

    #[test]
    fn code_depends_on_key_and_node() {
        let (one, two) = (Key::generate().unwrap(), Key::generate().unwrap());
        let shown = code(one.public(), "hub-1");
        assert_eq!(shown.len(), CODE + 3);
        assert_ne!(shown, code(two.public(), "hub-1"));
        assert_ne!(shown, code(one.public(), "hub-2"));
        let typed = format!(" {} ", shown.to_lowercase().replace('-', "").replace('0', "o").replace('1', "l"));
        assert_eq!(read_code(&typed), Some(shown));
        for typed in ["", "0000-0000-0000-000", "0000-0000-0000-00000", "0000-0000-0000-000U", "0000-0000-0000-000ü"] {
            assert_eq!(read_code(typed), None, "{typed}");
        }
    }

    proptest::proptest! {
        #[test]
        fn open_never_panics(key: String, content: String) {
            let _ = Key::generate().unwrap().open(&SealedTicket { key, content });
        }

        #[test]
        fn code_round_trips(key: String, to: String) {
            let shown = code(&key, &to);
            proptest::prop_assert_eq!(read_code(&shown), Some(shown));
        }
    }
}
