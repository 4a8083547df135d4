//! A ticket on its way over a network that others listen on: encrypted for the machine that asked. The
//! same key agreement gives the key that the machine's reports are authenticated with.

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, KeyType, Prk, Salt};
use ring::hmac;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use x25519_dalek::{PublicKey, StaticSecret};

use super::messages::{ProgressReport, SealedTicket};
use crate::encoding::{decode, encode};

/// Symbols of a code: Crockford's base 32, which has no letter that looks like a digit.
const SYMBOLS: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
/// Symbols of a code: 80 bits, so that no one can search for another key with the same code.
const CODE: usize = 16;

/// A ticket that cannot be encrypted or decrypted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SealError(String);

/// The machine's key pair, made for this boot and never written down.
pub struct Key {
    secret: StaticSecret,
    public: String,
}

impl Key {
    /// A new key pair.
    ///
    /// # Errors
    /// The kernel gives no randomness.
    pub fn generate() -> Result<Self, SealError> {
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes).map_err(|e| failed(&format!("the kernel gives no randomness: {e}")))?;
        let secret = StaticSecret::from(bytes);
        let public = encode(PublicKey::from(&secret).as_bytes());
        Ok(Self { secret, public })
    }

    /// The public half, base64.
    #[must_use]
    pub fn public(&self) -> &str {
        &self.public
    }

    /// Decrypts a ticket; also returns the key for this machine's reports.
    ///
    /// # Errors
    /// The ticket was encrypted for another key, or was changed on its way.
    pub fn open(&self, sealed: &SealedTicket) -> Result<(Vec<u8>, ReportKey), SealError> {
        let mut content = decode(&sealed.content).ok_or_else(|| failed("the ticket is not base64"))?;
        let (key, report) = agree(&self.secret, &sealed.key, &sealed.key, &self.public)?;
        let open = key.open_in_place(nonce(), Aad::empty(), &mut content);
        let ticket = open.map_err(|_| failed("the ticket is encrypted for another machine, or damaged"))?.to_vec();
        Ok((ticket, report))
    }
}

/// Encrypts a ticket for the machine that has this key; also returns the key for its reports.
///
/// # Errors
/// `to` is not an X25519 key.
pub fn seal(content: &[u8], to: &str) -> Result<(SealedTicket, ReportKey), SealError> {
    let own = Key::generate()?;
    let mut content = content.to_vec();
    let (key, report) = agree(&own.secret, to, &own.public, to)?;
    key.seal_in_place_append_tag(nonce(), Aad::empty(), &mut content).map_err(|_| failed("the ticket is too long"))?;
    Ok((SealedTicket { key: own.public, content: encode(&content) }, report))
}

/// What a machine shows on its console and the operator types at the server: it stands for the machine's
/// key and for the node that it is to be.
///
/// 80 bits of SHA-256 in four groups of four symbols. A host that wants its own key to be confirmed would have to
/// find one with the same code.
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

/// A code as [`code`] writes it, of what a person typed: either case, with or without dashes and spaces.
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

/// Authenticates a machine's reports. Only the machine and the server can derive it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ReportKey(String);

impl std::fmt::Debug for ReportKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ReportKey(…)")
    }
}

impl ReportKey {
    /// The news with their proof.
    #[must_use]
    pub fn prove(&self, mut news: ProgressReport) -> ProgressReport {
        news.proof = encode(hmac::sign(&self.hmac(), &news.message()).as_ref());
        news
    }

    /// Whether the news come from the machine that shares this key.
    #[must_use]
    pub fn verify(&self, news: &ProgressReport) -> bool {
        decode(&news.proof).is_some_and(|proof| hmac::verify(&self.hmac(), &news.message(), &proof).is_ok())
    }

    fn hmac(&self) -> hmac::Key {
        hmac::Key::new(hmac::HMAC_SHA256, self.0.as_bytes())
    }
}

/// 32 bytes of HKDF's output.
struct Secret32;

impl KeyType for Secret32 {
    fn len(&self) -> usize {
        32
    }
}

/// The ticket's key and the reports' key that `secret` and the other's public key agree on.
fn agree(
    secret: &StaticSecret,
    other: &str,
    server: &str,
    machine: &str,
) -> Result<(LessSafeKey, ReportKey), SealError> {
    let bytes = decode(other).and_then(|b| <[u8; 32]>::try_from(b).ok());
    let other = PublicKey::from(bytes.ok_or_else(|| failed("the key is not an X25519 key in base64"))?);
    let shared = secret.diffie_hellman(&other);
    // A key of low order would give a secret that everyone knows.
    if !shared.was_contributory() {
        return Err(failed("the key is not an X25519 key"));
    }
    let prk = Salt::new(HKDF_SHA256, b"bakehouse netboot ticket").extract(shared.as_bytes());
    let context = |what: &'static str| [what.as_bytes(), server.as_bytes(), machine.as_bytes()];
    let no_key = |_| failed("the keys can't be derived");
    let ticket = prk.expand(&context("ticket"), &AES_256_GCM).map(UnboundKey::from).map_err(no_key)?;
    Ok((LessSafeKey::new(ticket), ReportKey(report_secret(&prk, &context("report")).map_err(no_key)?)))
}

fn report_secret(prk: &Prk, context: &[&[u8]]) -> Result<String, ring::error::Unspecified> {
    let mut bytes = [0; 32];
    prk.expand(context, Secret32)?.fill(&mut bytes)?;
    Ok(encode(&bytes))
}

/// The server makes a key pair for each answer: no key encrypts twice.
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
    fn only_who_asked_reads_it() {
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
    fn what_was_changed_is_refused() {
        let asker = Key::generate().unwrap();
        let (mut sealed, _) = seal(b"a ticket", asker.public()).unwrap();
        sealed.content.replace_range(..1, if sealed.content.starts_with('A') { "B" } else { "A" });
        assert!(asker.open(&sealed).is_err());
    }

    #[test]
    fn reports_are_proven_by_the_machine_that_opened_the_ticket() {
        let (asker, other) = (Key::generate().unwrap(), Key::generate().unwrap());
        let (sealed, server) = seal(b"a ticket", asker.public()).unwrap();
        let (_, machine) = asker.open(&sealed).unwrap();
        let mac = "52:54:00:00:00:01".parse().unwrap();
        let key = asker.public().to_owned();
        let news =
            ProgressReport { version: NetbootMachine::VERSION, mac, step: Step::Installed, key, proof: String::new() };
        let proven = machine.prove(news.clone());
        assert!(server.verify(&proven));
        assert!(!server.verify(&news));
        assert!(
            !server.verify(&ProgressReport { step: Step::Started, ..proven.clone() }),
            "another step, the same proof"
        );
        // A key of another agreement.
        let (sealed, _) = seal(b"a ticket", other.public()).unwrap();
        assert!(!server.verify(&other.open(&sealed).unwrap().1.prove(news)));
        // The server keeps it in a file.
        let kept: ReportKey = serde_json::from_str(&serde_json::to_string(&server).unwrap()).unwrap();
        assert!(kept.verify(&proven));
    }

    #[test]
    fn a_code_stands_for_a_key_and_a_node() {
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
        fn a_code_reads_as_itself(key: String, to: String) {
            let shown = code(&key, &to);
            proptest::prop_assert_eq!(read_code(&shown), Some(shown));
        }
    }
}
