//! Forms of texts in TOML files, for the JSON Schema. The parser and the lint have the same rules, and a test compares
//! them.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};

/// Declares forms: Rust type, name of the type in the reference, pattern, longest text in characters.
macro_rules! forms {
    ($($(#[$doc:meta])* $name:ident = $people:literal, $pattern:expr, $longest:expr;)*) => {$(
        $(#[$doc])*
        pub(crate) struct $name;

        impl JsonSchema for $name {
            fn inline_schema() -> bool {
                true
            }

            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                let longest: Option<u32> = $longest;
                let mut schema = json_schema!({ "type": "string", "pattern": $pattern, "x-type": $people });
                if let Some(longest) = longest {
                    schema.insert("maxLength".to_owned(), longest.into());
                }
                schema
            }
        }
    )*};
}

macro_rules! octet {
    () => {
        "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
    };
}

macro_rules! ipv4 {
    () => {
        concat!(octet!(), "\\.", octet!(), "\\.", octet!(), "\\.", octet!())
    };
}

macro_rules! label {
    () => {
        "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
    };
}

macro_rules! mail_domain {
    () => {
        "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)+"
    };
}

macro_rules! mail_name {
    () => {
        "[a-z0-9_+-]+(\\.[a-z0-9_+-]+)*"
    };
}

/// A character that has no meaning in a shell, in a unit or in an INI file.
macro_rules! plain {
    () => {
        "[^\\x00-\\x1f\\x7f-\\x9f\"'%\\\\$]"
    };
}

/// Name of a group.
pub(crate) const GROUP_NAME: &str = "^[a-z]([a-z0-9-]{0,18}[a-z0-9])?$";
/// MAC address in lower case, or a serial number.
pub(crate) const MACHINE: &str = "^([0-9a-f]{2}(:[0-9a-f]{2}){5}|[^:]*)$";
/// Paths that a generated file cannot have: outside the image, or below `run/`.
pub(crate) const NOT_BAKED: &str = "^(\\./|\\.$|run/)|(^|/)\\.\\.(/|$)";

forms! {
    /// Name of a fleet.
    FleetName = "name", "^[a-z]([a-z0-9-]*[a-z0-9])?$", Some(32);
    /// Version of the images.
    ImageVersion = "version", "^[A-Za-z0-9.~^-]{1,16}$", None;
    /// Size, as `parse_size` reads it.
    Size = "size", "^[0-9]+[KMGT]?$", None;
    /// IPv4 address.
    Address = "address", concat!("^", ipv4!(), "$"), None;
    /// IPv4 address, and the length of its network's prefix if one follows.
    LanAddress = "address", concat!("^", ipv4!(), "(/([0-9]|[12][0-9]|3[0-2]))?$"), None;
    /// IPv6 address, and the length of its network's prefix if one follows.
    LanAddress6 = "address", "^[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(/([0-9]|[1-9][0-9]|1[01][0-9]|12[0-8]))?$", Some(49);
    /// IPv4 network.
    Network = "network", concat!("^", ipv4!(), "/([0-9]|[12][0-9]|3[0-2])$"), None;
    /// Host name or IPv4 address, without a port.
    Host = "host", concat!("^", label!(), "(\\.", label!(), ")*$"), Some(253);
    /// Address of the folder with updates. It goes into files of systemd-sysupdate.
    UpdateUrl = "address", "^https?://[A-Za-z0-9._~:/\\[\\]-]*[A-Za-z0-9._~:\\[\\]-][A-Za-z0-9._~:/\\[\\]-]*$", None;
    /// Address of an HTTPS service.
    HttpsUrl = "address", concat!("^https://", label!(), "(\\.", label!(), ")*(:[0-9]{1,5})?(/[!#&()-\\[\\]-~]*)?$"), None;
    /// Address of a web service.
    Url = "address", "^https?://\\S*$", None;
    /// Topic of ntfy.
    Topic = "name", "^[A-Za-z0-9_-]{1,64}$", None;
    /// Mail address without a name.
    MailAddress = "address", concat!("^", mail_name!(), "@", mail_domain!(), "$"), Some(254);
    /// Mail domain, in lower case.
    MailDomain = "domain", concat!("^", mail_domain!(), "$"), Some(253);
    /// Name in a mail domain, as Odoo stores it.
    MailName = "name", concat!("^", mail_name!(), "$"), Some(64);
    /// Mail address or mail domain.
    MailSender = "sender", concat!("^(", mail_name!(), "@)?", mail_domain!(), "$"), Some(254);
    /// Time as in systemd's `OnCalendar=`, for the backups.
    BackupTime = "time", concat!("^", plain!(), "+$"), None;
    /// Time as in systemd's `OnCalendar=`, for the updates.
    UpdateTime = "time", "^[^%\\x00-\\x1f\\x7f-\\x9f]+$", None;
    /// Text of `[backup]` that reaches pgBackRest's configuration.
    Plain = "text", concat!("^", plain!(), "+$"), None;
    /// Name of a database or an add-on.
    Identifier = "name", "^[a-z][a-z0-9_]{0,59}$", None;
    /// Odoo's name of a language.
    Language = "language", "^[a-z]{2,3}([_@][A-Za-z0-9]+)?$", None;
    /// Python package with its version.
    Wheel = "package", "^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?==[A-Za-z0-9]([A-Za-z0-9.!+_-]*[A-Za-z0-9])?$", None;
    /// Address of a git repository.
    Repository = "address", "^(https?://|ssh://|git://|file:///|git@)\\S+$", None;
    /// Commit of a git repository.
    Commit = "commit", "^([0-9a-f]{40}|[0-9a-f]{64})$", None;
    /// sha256 of a file.
    Sha256 = "sha256", "^[0-9a-f]{64}$", None;
    /// Mode of a file, octal.
    Mode = "mode", "^[0-7]+$", None;
    /// Path in the image, without a leading `/`.
    ImagePath = "path", "^[^/]", None;
    /// Name of a migration.
    MigrationName = "name", "^[a-z0-9-]+$", None;
    /// Name of a systemd service.
    Service = "unit", "\\.service$", None;
}
