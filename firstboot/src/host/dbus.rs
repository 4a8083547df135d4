//! The agent's D-Bus service: its state, for `firstboot status` and other programs, and the method `Leave`.

use tokio::sync::{Mutex, mpsc, oneshot, watch};
use zbus::object_server::InterfaceRef;

use crate::error::Result;
use crate::host::console::said;

/// Name on the system bus.
pub const BUS_NAME: &str = "org.bakehouse.Agent1";
/// Path of the object.
pub const PATH: &str = "/org/bakehouse/Agent1";

/// Phase of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The node has no slot yet.
    Joining,
    /// The node has a slot, and its roles are starting.
    Starting,
    /// The node's roles run.
    Ready,
}

impl Phase {
    /// Returns the value of the property.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Joining => "joining",
            Self::Starting => "starting",
            Self::Ready => "ready",
        }
    }
}

/// The object. It emits a signal for each change of a property.
struct Agent {
    fleet: String,
    node: String,
    epoch: u64,
    phase: Phase,
    message: String,
    leave_requests: mpsc::Sender<LeaveRequest>,
}

/// A call of `Leave`: the channel for a hub's reply.
type LeaveRequest = oneshot::Sender<Result<()>>;

#[zbus::interface(name = "org.bakehouse.Agent1")]
impl Agent {
    /// Makes this node leave the fleet: it hands over its work, stops, and frees its slot. Returns when a hub has
    /// recorded the departure. Only root may call it.
    async fn leave(&self) -> zbus::fdo::Result<()> {
        let (request, reply) = oneshot::channel();
        let failed = |why: &dyn std::fmt::Display| zbus::fdo::Error::Failed(why.to_string());
        self.leave_requests.send(request).await.map_err(|e| failed(&e))?;
        reply.await.map_err(|e| failed(&e))?.map_err(|e| failed(&e.chain()))
    }

    /// Name of the fleet.
    #[zbus(property)]
    fn fleet(&self) -> &str {
        &self.fleet
    }

    /// Name of the slot; empty before the node has one.
    #[zbus(property)]
    fn node(&self) -> &str {
        &self.node
    }

    /// Epoch of the slot.
    #[zbus(property)]
    fn epoch(&self) -> u64 {
        self.epoch
    }

    /// `joining`, `starting` or `ready`.
    #[zbus(property)]
    fn phase(&self) -> &str {
        self.phase.as_str()
    }

    /// The last message on the console.
    #[zbus(property)]
    fn message(&self) -> &str {
        &self.message
    }
}

/// The published object.
pub struct Status {
    object: InterfaceRef<Agent>,
    leave_requests: Mutex<mpsc::Receiver<LeaveRequest>>,
    phase: watch::Sender<Phase>,
}

impl Status {
    /// Publishes the state of a node without a slot.
    ///
    /// # Errors
    /// If the bus refuses the object or the name.
    pub async fn publish(bus: &zbus::Connection, fleet: &str) -> Result<Self> {
        let message = said().borrow().clone();
        let (sender, leave_requests) = mpsc::channel(1);
        let agent = Agent {
            fleet: fleet.to_owned(),
            node: String::new(),
            epoch: 0,
            phase: Phase::Joining,
            message,
            leave_requests: sender,
        };
        bus.object_server().at(PATH, agent).await?;
        bus.request_name(BUS_NAME).await?;
        let published = Self {
            object: bus.object_server().interface(PATH).await?,
            leave_requests: Mutex::new(leave_requests),
            phase: watch::Sender::new(Phase::Joining),
        };
        let object = published.object.clone();
        tokio::spawn(async move {
            let mut messages = said();
            while messages.changed().await.is_ok() {
                let mut agent = object.get_mut().await;
                agent.message.clone_from(&messages.borrow_and_update());
                let _ = agent.message_changed(object.signal_emitter()).await;
            }
        });
        Ok(published)
    }

    /// Publishes the node's slot and epoch.
    ///
    /// # Errors
    /// If the connection to the bus is closed.
    pub async fn is(&self, node: &str, epoch: u64) -> Result<()> {
        let mut agent = self.object.get_mut().await;
        (agent.node, agent.epoch) = (node.to_owned(), epoch);
        agent.node_changed(self.object.signal_emitter()).await?;
        Ok(agent.epoch_changed(self.object.signal_emitter()).await?)
    }

    /// Serves calls of `Leave` with the result of `ask`, without end.
    ///
    /// # Errors
    /// Never while the object is published.
    pub async fn leave_requests(&self, ask: impl AsyncFn() -> Result<()>) -> Result<()> {
        let mut leave_requests = self.leave_requests.lock().await;
        while let Some(request) = leave_requests.recv().await {
            // A caller that has disconnected has to call again.
            let _ = request.send(ask().await);
        }
        Ok(())
    }

    /// Returns a receiver of the node's phase.
    #[must_use]
    pub fn phase(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    /// Publishes the node's phase.
    ///
    /// # Errors
    /// If the connection to the bus is closed.
    pub async fn enter(&self, phase: Phase) -> Result<()> {
        let mut agent = self.object.get_mut().await;
        agent.phase = phase;
        self.phase.send_replace(phase);
        Ok(agent.phase_changed(self.object.signal_emitter()).await?)
    }
}

#[zbus::proxy(
    interface = "org.bakehouse.Agent1",
    default_service = "org.bakehouse.Agent1",
    default_path = "/org/bakehouse/Agent1"
)]
trait Agent1 {
    fn leave(&self) -> zbus::Result<()>;
    #[zbus(property)]
    fn fleet(&self) -> zbus::Result<String>;
    #[zbus(property)]
    fn node(&self) -> zbus::Result<String>;
    #[zbus(property)]
    fn epoch(&self) -> zbus::Result<u64>;
    #[zbus(property)]
    fn phase(&self) -> zbus::Result<String>;
    #[zbus(property)]
    fn message(&self) -> zbus::Result<String>;
}

/// Calls `Leave` of the agent.
///
/// # Errors
/// If the agent does not run, the caller is not root, or a hub refuses the departure.
pub async fn leave(bus: &zbus::Connection) -> Result<()> {
    Ok(Agent1Proxy::new(bus).await?.leave().await?)
}

/// Returns the output of `firstboot status`: one line of text, or JSON.
///
/// # Errors
/// If the agent does not run.
pub async fn describe(bus: &zbus::Connection, json: bool) -> Result<String> {
    let agent = Agent1Proxy::new(bus).await?;
    let (fleet, node, epoch) = (agent.fleet().await?, agent.node().await?, agent.epoch().await?);
    let (phase, message) = (agent.phase().await?, agent.message().await?);
    Ok(if json {
        serde_json::json!({ "fleet": fleet, "node": node, "epoch": epoch, "phase": phase, "message": message })
            .to_string()
    } else if node.is_empty() {
        format!("a node of {fleet} to be: {message}")
    } else {
        format!("{node} of {fleet} (epoch {epoch}): {message}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::console::log_event;
    use tokio::net::UnixStream;

    /// Returns both ends of a peer-to-peer bus, which has no names.
    async fn pair() -> (zbus::Connection, zbus::Connection) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server =
            zbus::connection::Builder::unix_stream(theirs).server(zbus::Guid::generate()).unwrap().p2p().build();
        let client = zbus::connection::Builder::unix_stream(ours).p2p().build();
        tokio::try_join!(server, client).unwrap()
    }

    #[tokio::test]
    async fn describe_returns_the_published_state() {
        let (agent, reader) = pair().await;
        let (sender, leave_requests) = mpsc::channel(1);
        let object = Agent {
            fleet: "acme".into(),
            node: String::new(),
            epoch: 0,
            phase: Phase::Joining,
            message: "m".into(),
            leave_requests: sender,
        };
        agent.object_server().at(PATH, object).await.unwrap();
        let status = Status {
            object: agent.object_server().interface(PATH).await.unwrap(),
            leave_requests: Mutex::new(leave_requests),
            phase: watch::Sender::new(Phase::Joining),
        };
        let phase = status.phase();
        assert_eq!(describe(&reader, false).await.unwrap(), "a node of acme to be: m");
        status.is("db-1", 2).await.unwrap();
        status.enter(Phase::Ready).await.unwrap();
        assert_eq!(*phase.borrow(), Phase::Ready);
        let text = describe(&reader, true).await.unwrap();
        let read: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            (read["node"].as_str(), read["epoch"].as_u64(), read["phase"].as_str()),
            (Some("db-1"), Some(2), Some("ready"))
        );
        let refused = async || Err(crate::error::Error::Failed("the only vote".to_owned()));
        let answer = tokio::select! {
            answer = leave(&reader) => answer,
            _ = status.leave_requests(refused) => panic!("the object is not published any more"),
        };
        assert!(answer.unwrap_err().chain().contains("the only vote"));
        log_event(crate::host::journal::Event::Ready, "something");
        assert_eq!(*said().borrow(), "something");
    }
}
