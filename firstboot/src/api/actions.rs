//! Actions of operators: reboot, power off, restart of a unit, switchover, drain and undrain.

use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use fleet::node_api::{ACTION_REPLY_SECONDS, ActionReply, ActionRequest, ActionStatus};
use hyper::StatusCode;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};
use tracing::{error, info};

use super::danger::{self, Stops, database_status, has_sync_standby};
use super::listener::Client;
use super::lock::{self, Held};
use super::reply::{Answer, Refusal, json};
use super::restart::{self, Unit};
use super::{NodeApi, audit, drain, random_id};
use crate::error::Result;
use crate::host::manager;

/// Time from the request to the reply. The action may last longer.
const REPLY: Duration = Duration::from_secs(ACTION_REPLY_SECONDS);

/// An action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Reboot,
    Poweroff,
    Restart,
    Switchover,
    Drain,
    Undrain,
}

impl Action {
    fn as_str(self) -> &'static str {
        match self {
            Self::Reboot => "reboot",
            Self::Poweroff => "power-off",
            Self::Restart => "restart",
            Self::Switchover => "switchover",
            Self::Drain => "drain",
            Self::Undrain => "undrain",
        }
    }
}

/// The only action that runs. Dropping it permits the next one.
struct Acting {
    api: Arc<NodeApi>,
    /// The last action before this one, until this one begins.
    before: Option<ActionStatus>,
    has_begun: bool,
}

impl Acting {
    /// Reserves the node for an action.
    fn new(api: &Arc<NodeApi>, status: ActionStatus) -> Result<Self, Refusal> {
        let mut last = action(api);
        if let Some(other) = last.as_ref().filter(|other| !other.done) {
            let text = format!("a {} of {} runs on {}", other.action, other.operator, api.node.name);
            return Err(Refusal::new(StatusCode::CONFLICT, text).help("retry later"));
        }
        let before = last.replace(status);
        Ok(Self { api: api.clone(), before, has_begun: false })
    }

    /// Notes how the action ended.
    fn end(&self, result: &Result<()>) {
        if let Some(status) = action(&self.api).as_mut() {
            status.done = true;
            status.error = result.as_ref().err().map(|e| fleet::one_line(&e.chain()));
        }
    }
}

impl Drop for Acting {
    fn drop(&mut self) {
        let mut last = action(&self.api);
        if !self.has_begun {
            *last = self.before.take();
        } else if let Some(status) = last.as_mut().filter(|status| !status.done) {
            status.done = true;
            status.error = Some("the node's agent has failed".to_owned());
        }
    }
}

fn action(api: &NodeApi) -> MutexGuard<'_, Option<ActionStatus>> {
    api.tasks.action.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns the last action.
pub(super) fn last(api: &NodeApi) -> Answer {
    let none = || Refusal::new(StatusCode::NOT_FOUND, "there was no action since the node's agent started");
    action(api).as_ref().map(|status| json(StatusCode::OK, status)).ok_or_else(none)
}

/// Checks an action, and carries it out. Replies when it is done, or 8 s after `begun` that it continues.
pub(super) async fn act(client: &Arc<Client>, kind: Action, asked: &ActionRequest, begun: Instant) -> Answer {
    let api = &client.shared().api;
    let name = &api.node.name;
    if asked.force.as_ref().is_some_and(|force| force != name) {
        let text = format!("`force` names another node than {name}");
        return Err(Refusal::new(StatusCode::BAD_REQUEST, text).help(format!("use `--force {name}`")));
    }
    let forced = asked.force.is_some();
    let failed = |e: crate::error::Error| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, e.chain());
    let id = random_id().map_err(failed)?;
    let status = ActionStatus {
        id: id.clone(),
        action: kind.as_str().to_owned(),
        unit: asked.unit.clone().filter(|_| kind == Action::Restart),
        operator: client.certificate.operator.dns_name(),
        done: false,
        error: None,
    };
    let mut acting = Acting::new(api, status)?;
    if matches!(kind, Action::Drain | Action::Undrain)
        && let Some(message) = drain::nothing_to_do(api, kind == Action::Drain)
    {
        audit::ended(client, kind.as_str(), &message);
        return Ok(json(StatusCode::OK, &ActionReply { message, done: true, id: String::new() }));
    }
    let unit = match kind {
        Action::Restart => restart::find(api, asked.unit.as_deref().unwrap_or_default()).await?,
        Action::Switchover => Unit { name: String::new(), stops: Stops::DATABASE },
        Action::Reboot | Action::Poweroff | Action::Drain => Unit { name: String::new(), stops: Stops::ALL },
        Action::Undrain => Unit { name: String::new(), stops: Stops::default() },
    };
    let seconds = if kind == Action::Poweroff { lock::UNTIL_OFF } else { lock::LONGEST };
    // The lock first: the checks must see what the action of its last holder did.
    let held = if unit.stops.needs_lock(api) { lock::take(api, seconds, forced).await? } else { None };
    match kind {
        Action::Switchover => check_switchover(api, forced).await?,
        Action::Drain if !forced => drain::check(api).await?,
        Action::Drain | Action::Undrain => {}
        Action::Reboot | Action::Poweroff | Action::Restart if forced => {}
        Action::Reboot | Action::Poweroff | Action::Restart => {
            let drained = if unit.stops.needs_lock(api) { drain::drained_nodes(api).await } else { Vec::new() };
            danger::check(api, unit.stops, &drained).await?;
        }
    }
    let of_unit = if unit.name.is_empty() { String::new() } else { format!(" of {}", unit.name) };
    let what = format!("{}{of_unit}{}", kind.as_str(), if forced { " (forced)" } else { "" });
    audit::begins(client, &what);
    audit::recorded(client).await;
    acting.has_begun = true;
    let (done, result) = oneshot::channel();
    let task = client.clone();
    tokio::spawn(async move {
        let by = task.certificate.operator.dns_name();
        let ended = carry_out(&task.shared().api, kind, &unit.name, (&by, forced), held).await;
        acting.end(&ended);
        match &ended {
            Ok(()) => audit::ended(&task, &what, "done"),
            Err(e) => audit::ended(&task, &what, &format!("failed: {}", e.chain())),
        }
        drop(acting);
        // The client may have disconnected.
        let _ = done.send(ended);
    });
    let reply = |status, done, message| Ok(json(status, &ActionReply { message, done, id }));
    let kind = kind.as_str();
    match timeout_at(begun + REPLY, result).await {
        Ok(Ok(Ok(()))) => reply(StatusCode::OK, true, format!("{name}: {kind}{of_unit} done")),
        // The log has the action already.
        Ok(Ok(Err(e))) => Ok(failed(e).response()),
        _ => reply(StatusCode::ACCEPTED, false, format!("{name}: {kind}{of_unit} continues")),
    }
}

async fn check_switchover(api: &NodeApi, forced: bool) -> Result<(), Refusal> {
    let name = &api.node.name;
    let conflict = |text: String| Refusal::new(StatusCode::CONFLICT, text);
    match database_status(api).await {
        None => Err(conflict(format!("{name} has no database, or its Patroni does not answer"))),
        Some(status) if !status.primary => Err(conflict(format!("{name} does not have the primary"))),
        Some(status) if !forced && !has_sync_standby(&status) => {
            let text = format!("no synchronous standby replicates from {name}");
            Err(conflict(text).help(format!("wait until one does, or add `--force {name}`")))
        }
        Some(_) => Ok(()),
    }
}

/// Carries out an action of the operator `by`. The node keeps the lock until it is ready again; a drain stops nothing.
async fn carry_out(
    api: &NodeApi,
    kind: Action,
    unit: &str,
    (by, forced): (&str, bool),
    mut held: Option<Held>,
) -> Result<()> {
    if let Some(held) = held.as_mut().filter(|_| kind != Action::Drain) {
        held.stops();
    }
    match kind {
        Action::Drain => drain::drain(api, by, forced).await,
        Action::Undrain => drain::undrain(api).await,
        Action::Switchover => hand_over(api).await,
        Action::Restart => restart::restart(api, unit).await,
        Action::Reboot | Action::Poweroff => {
            // Without a standby, there is no node to hand over to.
            if database_status(api).await.is_some_and(|s| s.primary && !s.standbys.is_empty())
                && let Err(e) = hand_over(api).await
            {
                if !forced {
                    return Err(e);
                }
                error!("switchover failed, and the operator forces the {}: {}", kind.as_str(), e.chain());
            }
            let target = if kind == Action::Reboot { "reboot.target" } else { "poweroff.target" };
            manager::stop_machine(&api.bus().await?, target).await?;
            info!("systemd stops the services of this node, for a {}", kind.as_str());
            if let Some(held) = held {
                held.keep();
            }
            Ok(())
        }
    }
}

async fn hand_over(api: &NodeApi) -> Result<()> {
    match api.patroni() {
        Some(patroni) => patroni.hand_over().await,
        None => Ok(()),
    }
}
