//! Requests of the node API: the role that each one needs, and the log of all of them.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use fleet::OperatorRole;
use fleet::node_api::{
    ACTION_PATH, ActionRequest, BACKUP_PATH, BackupRequest, DISK_PATH, DRAIN_PATH, EXEC_PATH, ExecRequest,
    JOURNAL_PATH, KEPT_JOURNAL_PATH, LONGEST_NODE_REQUEST, LONGEST_SCRIPT, MAIL_TEST_PATH, MailTestRequest, NET_PATH,
    ODOO_SHELL_PATH, OPEN_PREFIX, OdooShellRequest, PCAP_PATH, POWEROFF_PATH, PcapRequest, REBOOT_PATH, RESTART_PATH,
    SQL_PATH, STATUS_PATH, SWITCHOVER_PATH, SqlRequest, UNDRAIN_PATH, UNITS_PATH,
};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;
use hyper::{Method, Request, Response, StatusCode};
use serde::de::DeserializeOwned;
use tokio::time::{Instant, timeout};

use super::actions::{self, Action};
use super::listener::Client;
use super::reply::{Body, Refusal, json};
use super::{audit, backup, disk, exec, journal, mail, net, odoo_shell, open, page, pcap, sql, status};

/// Time limit of a request's body.
const BODY: Duration = Duration::from_secs(5);
/// Longest body of a request with a script, in bytes. JSON may escape each of its bytes.
const LONGEST_SCRIPT_REQUEST: usize = 2 * LONGEST_SCRIPT;

/// A request by method and path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Route {
    Status,
    Units,
    Journal,
    KeptJournal,
    Net,
    Disk,
    Backups,
    LastAction,
    /// A part of the fleet's page.
    Page(&'static str),
    Act(Action),
    Backup,
    MailTest,
    Exec,
    Pcap,
    Sql,
    OdooShell,
    Open(open::Service),
}

impl Route {
    /// Returns the route of a request; `None` for an unknown path or another method.
    fn new(method: &Method, path: &str) -> Option<Self> {
        Some(match (method.as_str(), path) {
            ("GET", STATUS_PATH) => Self::Status,
            ("GET", UNITS_PATH) => Self::Units,
            ("GET", JOURNAL_PATH) => Self::Journal,
            ("GET", KEPT_JOURNAL_PATH) => Self::KeptJournal,
            ("GET", NET_PATH) => Self::Net,
            ("GET", DISK_PATH) => Self::Disk,
            ("GET", BACKUP_PATH) => Self::Backups,
            ("GET", ACTION_PATH) => Self::LastAction,
            ("GET", path) if page::PATHS.contains(&path) => Self::Page(page::PATHS.into_iter().find(|of| *of == path)?),
            ("POST", REBOOT_PATH) => Self::Act(Action::Reboot),
            ("POST", POWEROFF_PATH) => Self::Act(Action::Poweroff),
            ("POST", RESTART_PATH) => Self::Act(Action::Restart),
            ("POST", SWITCHOVER_PATH) => Self::Act(Action::Switchover),
            ("POST", DRAIN_PATH) => Self::Act(Action::Drain),
            ("POST", UNDRAIN_PATH) => Self::Act(Action::Undrain),
            ("POST", BACKUP_PATH) => Self::Backup,
            ("POST", MAIL_TEST_PATH) => Self::MailTest,
            ("POST", EXEC_PATH) => Self::Exec,
            ("POST", PCAP_PATH) => Self::Pcap,
            ("POST", SQL_PATH) => Self::Sql,
            ("POST", ODOO_SHELL_PATH) => Self::OdooShell,
            ("CONNECT", path) => Self::Open(open::Service::new(path.strip_prefix(OPEN_PREFIX)?)?),
            _ => return None,
        })
    }

    /// Returns the role that the request needs.
    fn role(self) -> OperatorRole {
        match self {
            Self::Status
            | Self::Units
            | Self::Journal
            | Self::KeptJournal
            | Self::Net
            | Self::Disk
            | Self::Backups
            | Self::LastAction
            | Self::Page(_) => OperatorRole::Viewer,
            Self::Act(_) | Self::Backup | Self::MailTest => OperatorRole::Operator,
            Self::Exec | Self::Pcap | Self::Sql | Self::OdooShell => OperatorRole::Admin,
            Self::Open(service) => service.role(),
        }
    }

    /// Returns the path of a request that only reads, and that programs repeat.
    fn repeats(self) -> Option<&'static str> {
        match self {
            Self::Status => Some(STATUS_PATH),
            Self::Units => Some(UNITS_PATH),
            Self::Net => Some(NET_PATH),
            Self::Disk => Some(DISK_PATH),
            Self::Backups => Some(BACKUP_PATH),
            Self::LastAction => Some(ACTION_PATH),
            Self::Page(path) => Some(path),
            Self::Journal
            | Self::KeptJournal
            | Self::Act(_)
            | Self::Backup
            | Self::MailTest
            | Self::Exec
            | Self::Pcap
            | Self::Sql
            | Self::OdooShell
            | Self::Open(_) => None,
        }
    }
}

/// Handles one request. The log has each action before it begins, and its result, also if the client disconnects.
pub(super) async fn answer(client: &Arc<Client>, request: Request<Incoming>) -> Response<Body> {
    let begun = Instant::now();
    let what = audit::request_line(&request);
    let Some(route) = Route::new(request.method(), request.uri().path()) else {
        return refused(client, &what, &Refusal::new(StatusCode::NOT_FOUND, "unknown path or method"));
    };
    let operator = &client.certificate.operator;
    if operator.role < route.role() {
        let text = format!(
            "{} has the role {}, and this request needs the role {}",
            operator.name,
            operator.role,
            route.role()
        );
        let help = format!("bakehouse operator add NAME --role {}", route.role());
        return refused(client, &what, &Refusal::new(StatusCode::FORBIDDEN, text).help(help));
    }
    let api = &client.shared().api;
    let answered = match route {
        Route::Status => Ok(json(StatusCode::OK, &Box::pin(status::status(api)).await)),
        Route::Units => status::units(api).await.map(|units| json(StatusCode::OK, &units)),
        Route::Journal => journal::entries(api, request.uri().query().unwrap_or_default()).await,
        Route::KeptJournal => journal::kept(api, request.uri().query().unwrap_or_default()).await,
        Route::Net => Ok(json(StatusCode::OK, &Box::pin(net::status(api)).await)),
        Route::Disk => Ok(json(StatusCode::OK, &Box::pin(disk::status(api)).await)),
        Route::Backups => backup::list(api).await,
        Route::LastAction => actions::last(api),
        Route::Page(_) => page::forward(client, &request).await,
        Route::Act(_)
        | Route::Backup
        | Route::MailTest
        | Route::Exec
        | Route::Pcap
        | Route::Sql
        | Route::OdooShell
        | Route::Open(_) => {
            let (client, what) = (client.clone(), what.clone());
            // hyper drops the future of a request whose client disconnects. The action and its log must not end there.
            let acting = tokio::spawn(async move { change(&client, route, request, &what, begun).await });
            return acting.await.unwrap_or_else(|_| {
                Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "the node's agent has failed").response()
            });
        }
    };
    match answered {
        Ok(response) => {
            audit::read(client, &what, route.repeats());
            response
        }
        Err(refusal) => refused(client, &what, &refusal),
    }
}

/// Handles a request that changes the node, or opens a service of the node.
async fn change(
    client: &Arc<Client>,
    route: Route,
    request: Request<Incoming>,
    what: &str,
    begun: Instant,
) -> Response<Body> {
    let answered = match route {
        Route::Act(action) => match read::<ActionRequest>(request).await {
            Ok(asked) => actions::act(client, action, &asked, begun).await,
            Err(refusal) => Err(refusal),
        },
        Route::Backup => match read::<BackupRequest>(request).await {
            Ok(asked) => backup::begin(client, asked).await,
            Err(refusal) => Err(refusal),
        },
        Route::MailTest => match read::<MailTestRequest>(request).await {
            Ok(asked) => mail::test(client, &asked).await,
            Err(refusal) => Err(refusal),
        },
        Route::Exec => match read::<ExecRequest>(request).await {
            Ok(asked) => exec::run(client, &asked).await,
            Err(refusal) => Err(refusal),
        },
        Route::Pcap => match read::<PcapRequest>(request).await {
            Ok(asked) => pcap::run(client, &asked).await,
            Err(refusal) => Err(refusal),
        },
        Route::Sql => match read_within::<SqlRequest>(request, LONGEST_SCRIPT_REQUEST).await {
            Ok(asked) => sql::run(client, asked).await,
            Err(refusal) => Err(refusal),
        },
        Route::OdooShell => match read_within::<OdooShellRequest>(request, LONGEST_SCRIPT_REQUEST).await {
            Ok(asked) => odoo_shell::run(client, &asked).await,
            Err(refusal) => Err(refusal),
        },
        Route::Open(service) => match open::open(client, service, request).await {
            Ok(response) => {
                audit::opened(client, what, service.name());
                Ok(response)
            }
            Err(refusal) => Err(refusal),
        },
        Route::Status
        | Route::Units
        | Route::Journal
        | Route::KeptJournal
        | Route::Net
        | Route::Disk
        | Route::Backups
        | Route::LastAction
        | Route::Page(_) => {
            unreachable!("it changes nothing")
        }
    };
    answered.unwrap_or_else(|refusal| refused(client, what, &refusal))
}

fn refused(client: &Client, what: &str, refusal: &Refusal) -> Response<Body> {
    audit::refused(client, what, refusal.status.as_u16(), refusal.text());
    refusal.response()
}

/// Reads a request's body. An empty body is an empty object.
async fn read<T: DeserializeOwned>(request: Request<Incoming>) -> Result<T, Refusal> {
    read_within(request, LONGEST_NODE_REQUEST).await
}

/// As [`read`], with another limit in bytes.
async fn read_within<T: DeserializeOwned>(request: Request<Incoming>, longest: usize) -> Result<T, Refusal> {
    let refused = |status, text: &str| Err(Refusal::new(status, text));
    let body: Bytes = match timeout(BODY, Limited::new(request.into_body(), longest).collect()).await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(_)) => return refused(StatusCode::PAYLOAD_TOO_LARGE, "the request's body is too long"),
        Err(_) => return refused(StatusCode::REQUEST_TIMEOUT, "the request's body did not arrive in time"),
    };
    let body: &[u8] = if body.is_empty() { b"{}" } else { &body };
    let invalid = |e| Refusal::new(StatusCode::BAD_REQUEST, format!("cannot parse the request: {e}"));
    serde_json::from_slice(body).map_err(invalid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_path_needs_its_role() {
        for (method, path, role) in [
            ("GET", "/v1/status", OperatorRole::Viewer),
            ("GET", "/v1/units", OperatorRole::Viewer),
            ("GET", "/v1/journal", OperatorRole::Viewer),
            ("GET", "/v1/journal/kept", OperatorRole::Viewer),
            ("GET", "/v1/net", OperatorRole::Viewer),
            ("GET", "/v1/disk", OperatorRole::Viewer),
            ("GET", "/v1/backup", OperatorRole::Viewer),
            ("POST", "/v1/backup", OperatorRole::Operator),
            ("POST", "/v1/mail/test", OperatorRole::Operator),
            ("GET", "/v1/action", OperatorRole::Viewer),
            ("POST", "/v1/reboot", OperatorRole::Operator),
            ("POST", "/v1/poweroff", OperatorRole::Operator),
            ("POST", "/v1/restart", OperatorRole::Operator),
            ("POST", "/v1/switchover", OperatorRole::Operator),
            ("POST", "/v1/drain", OperatorRole::Operator),
            ("POST", "/v1/undrain", OperatorRole::Operator),
            ("POST", "/v1/exec", OperatorRole::Admin),
            ("POST", "/v1/pcap", OperatorRole::Admin),
            ("POST", "/v1/sql", OperatorRole::Admin),
            ("POST", "/v1/odoo/shell", OperatorRole::Admin),
            ("CONNECT", "/v1/open/postgres", OperatorRole::Admin),
            ("CONNECT", "/v1/open/postgres-write", OperatorRole::Admin),
            ("CONNECT", "/v1/open/prometheus", OperatorRole::Viewer),
            ("CONNECT", "/v1/open/haproxy", OperatorRole::Viewer),
            ("CONNECT", "/v1/open/alertmanager", OperatorRole::Operator),
        ] {
            let method = method.parse().unwrap();
            assert_eq!(Route::new(&method, path).map(Route::role), Some(role), "{method} {path}");
        }
        for (method, path) in
            [("GET", "/v1/reboot"), ("POST", "/v1/status"), ("CONNECT", "/v1/open/patroni"), ("CONNECT", "db-1:7443")]
        {
            assert_eq!(Route::new(&method.parse().unwrap(), path), None, "{method} {path}");
        }
    }
}
