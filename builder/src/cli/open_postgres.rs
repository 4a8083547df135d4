//! `bakehouse open postgres`, and `bakehouse psql` without SQL: PostgreSQL for a client on this host. The client connects
//! to a Unix socket in a folder that only the user can enter, so other users of this host cannot use the operator's
//! rights.

use std::io::{self, IsTerminal as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use fleet::node_api::{OPEN_POSTGRES, OPEN_POSTGRES_WRITE, OPEN_PREFIX, SQL_READER, SQL_WRITER};

use super::access::NodeContext;
use super::node_results::OpenResult;
use super::output::print;
use super::psql::{PsqlArgs, PsqlResult, database_node, named};
use super::results::{CommandResult, Event};
use super::verbs::{AccessArgs, OpenArgs};
use crate::deploy::nodes::{self, PostgresSocket};
use crate::error::{Error, Result};

/// Name of the service in results.
const NAME: &str = "postgres";
/// Program that `bakehouse psql` starts.
const PROGRAM: &str = "psql";
/// The socket's folder, which the command removes at its end.
static FOLDER: Mutex<Option<PathBuf>> = Mutex::new(None);
/// Whether psql runs. Ctrl-C then cancels its query, and does not end the command.
static IN_PSQL: AtomicBool = AtomicBool::new(false);

/// Removes the socket's folder, also if the command ends by a signal.
pub(super) fn clean_up() {
    if let Some(folder) = FOLDER.lock().unwrap_or_else(PoisonError::into_inner).take() {
        let _ = std::fs::remove_dir_all(folder);
    }
}

/// Whether psql handles Ctrl-C.
pub(super) fn is_in_psql() -> bool {
    IN_PSQL.load(Ordering::Relaxed)
}

/// What to open.
struct Wanted<'a> {
    access: &'a AccessArgs,
    node: Option<&'a str>,
    writes: bool,
    database: Option<&'a str>,
}

/// The socket, and what a client of it needs.
struct Opened {
    socket: PostgresSocket,
    node: String,
    user: &'static str,
    /// Odoo's database, if the command knows its name. The node replaces the user's name in its place.
    database: Option<String>,
}

impl Opened {
    fn folder(&self) -> &Path {
        self.socket.folder()
    }

    /// Returns the arguments of psql.
    fn args(&self) -> Vec<String> {
        let mut args =
            vec!["-h".to_owned(), self.folder().display().to_string(), "-U".to_owned(), self.user.to_owned()];
        args.extend(self.database.iter().flat_map(|name| ["-d".to_owned(), name.clone()]));
        args
    }

    fn url(&self) -> String {
        let database = self.database.as_deref().unwrap_or_default();
        format!("postgresql:///{database}?host={}&user={}", self.folder().display(), self.user)
    }
}

/// Forwards clients of PostgreSQL until Ctrl-C.
pub(super) fn open(context: &NodeContext, args: &OpenArgs) -> Result<CommandResult> {
    let node = args.node.as_deref();
    let wanted = Wanted { access: &args.access, node, writes: args.write, database: None };
    with_socket(context, &wanted, |opened| {
        let result = OpenResult { page: NAME.to_owned(), node: opened.node.clone(), url: opened.url() };
        context.output.event(Event::Open(&result))?;
        if !context.output.json {
            print(format!("{PROGRAM} {}\n", opened.args().join(" ")))?;
        }
        context.progress.say("open", &format!("PostgreSQL of {} as {}, until Ctrl-C", opened.node, opened.user));
        Ok(None)
    })
}

/// Starts this host's psql. Without one, prints how to connect, and forwards clients until Ctrl-C.
pub(super) fn psql(context: &NodeContext, args: &PsqlArgs) -> Result<CommandResult> {
    if context.output.json || !io::stdout().is_terminal() {
        return Err(Error::Usage(
            "without a terminal, the command needs SQL\n  help: add `-c SQL` or `-f FILE`".to_owned(),
        ));
    }
    let database = args.database.as_deref();
    let wanted = Wanted { access: &args.access, node: named(args), writes: args.write, database };
    with_socket(context, &wanted, |opened| {
        context.progress.say("psql", &format!("{} as {}", opened.node, opened.user));
        match Command::new(PROGRAM).args(opened.args()).spawn() {
            Ok(child) => {
                IN_PSQL.store(true, Ordering::Relaxed);
                Ok(Some(child))
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                context
                    .progress
                    .say("psql", "this host has no psql: connect with a client of PostgreSQL, until Ctrl-C");
                print(format!("{}\n", opened.url()))?;
                Ok(None)
            }
            Err(e) => Err(Error::io("start", PROGRAM)(e)),
        }
    })
}

/// Opens a socket, and forwards its connections until the program of `start` ends, or without end.
fn with_socket(
    context: &NodeContext,
    wanted: &Wanted,
    start: impl FnOnce(&Opened) -> Result<Option<Child>>,
) -> Result<CommandResult> {
    let reach = context.reach(wanted.access)??;
    let node = database_node(&reach, wanted.node)?;
    let (service, user) = if wanted.writes { (OPEN_POSTGRES_WRITE, SQL_WRITER) } else { (OPEN_POSTGRES, SQL_READER) };
    let path = format!("{OPEN_PREFIX}{service}");
    let of_odoo = || context.project.map(|project| project.topology.odoo.database.clone());
    let database = wanted.database.map(str::to_owned).or_else(of_odoo);
    let done = nodes::run(async {
        // A first connection, so that a refusal is an error here and not in the client.
        drop(reach.client.stream(&node, &path).await?);
        let socket = PostgresSocket::open()?;
        *FOLDER.lock().unwrap_or_else(PoisonError::into_inner) = Some(socket.folder().to_owned());
        let opened = Opened { socket, node, user, database };
        let child = start(&opened)?;
        let ended = async {
            match child {
                Some(mut child) => tokio::task::spawn_blocking(move || child.wait()).await.ok(),
                None => std::future::pending().await,
            }
        };
        let status = tokio::select! {
            status = ended => status.transpose().map_err(Error::io("wait for", PROGRAM))?,
            never = nodes::forward_postgres(&reach.client, &opened.node, &path, &opened.socket) => match never? {},
        };
        let status = status.and_then(|status| status.code()).unwrap_or(1);
        let (node, user) = (opened.node, user.to_owned());
        Ok(CommandResult::Psql(PsqlResult { node, user, statements: Vec::new(), status }))
    });
    IN_PSQL.store(false, Ordering::Relaxed);
    clean_up();
    done?
}
