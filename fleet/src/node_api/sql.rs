//! SQL on a node's database, and Python in Odoo's shell.

use serde::{Deserialize, Serialize};

/// `POST`, admin, with a [`SqlRequest`]: [`super::ExecEvent`]s, one a line. `stdout` has the bytes that PostgreSQL sends
/// after the query, in its protocol 3 ([`crate::postgres`]). `exit` 0 means that PostgreSQL has answered completely, also
/// if the answer has an error.
pub const SQL_PATH: &str = "/v1/sql";
/// `POST`, admin, with an [`OdooShellRequest`]: [`super::ExecEvent`]s, one a line.
pub const ODOO_SHELL_PATH: &str = "/v1/odoo/shell";
/// Name of the database's service below [`super::OPEN_PREFIX`], for a client of PostgreSQL. The node replaces the user of
/// the start-up message by [`SQL_READER`].
pub const OPEN_POSTGRES: &str = "postgres";
/// As [`OPEN_POSTGRES`], as the user [`SQL_WRITER`].
pub const OPEN_POSTGRES_WRITE: &str = "postgres-write";
/// Longest SQL text and longest script, in bytes with quotes, as the node's journal records them.
pub const LONGEST_SCRIPT: usize = 64 << 10;
/// PostgreSQL user of operators who read. It may read every table, and write none.
pub const SQL_READER: &str = "bakehouse_reader";
/// PostgreSQL user of operators who write. Its sessions have the rights of `odoo`, the owner of Odoo's database.
pub const SQL_WRITER: &str = "bakehouse_writer";

/// SQL to run on a database node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SqlRequest {
    /// One or more statements. Several are one transaction.
    pub sql: String,
    /// Name of the database; that of Odoo without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub database: Option<String>,
    /// Whether to run the statements as [`SQL_WRITER`].
    pub write: bool,
    /// Seconds after which the node cancels the statements, up to [`super::LONGEST_RUN`].
    pub seconds: u32,
}

/// Python to run in Odoo's shell on an app node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct OdooShellRequest {
    /// The script, which is the shell's standard input.
    pub script: String,
    /// Seconds after which the node stops the shell, up to [`super::LONGEST_RUN`].
    pub seconds: u32,
}
