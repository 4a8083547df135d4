//! The agent's state on D-Bus, for `firstboot status` and whoever else wants to know; and the one
//! thing that may be asked of it there.

use tokio::sync::{Mutex, mpsc, oneshot};
use zbus::object_server::InterfaceRef;

use crate::error::Result;
use crate::host::console::said;

/// Name on the system bus.
pub const BUS_NAME: &str = "org.bakehouse.Agent1";
/// Path of the one object.
pub const PATH: &str = "/org/bakehouse/Agent1";

/// How far a node has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It has no slot yet.
    Joining,
    /// It has one; its roles are starting.
    Starting,
    /// Its roles run.
    Ready,
}

impl Phase {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Joining => "joining",
            Self::Starting => "starting",
            Self::Ready => "ready",
        }
    }
}

/// The object: properties that tell when they change.
struct Agent {
    fleet: String,
    node: String,
    epoch: u64,
    phase: Phase,
    message: String,
    leave_requests: mpsc::Sender<LeaveRequest>,
}

/// Somebody wants this node to leave; he is told what a hub says.
type LeaveRequest = oneshot::Sender<Result<()>>;

#[zbus::interface(name = "org.bakehouse.Agent1")]
impl Agent {
    /// Has this node hand over what it does, stop, and give its slot back: returns when a hub
    /// has noted it. Root may ask it.
    async fn leave(&self) -> zbus::fdo::Result<()> {
        let (wish, answer) = oneshot::channel();
        let failed = |why: &dyn std::fmt::Display| zbus::fdo::Error::Failed(why.to_string());
        self.leave_requests.send(wish).await.map_err(|e| failed(&e))?;
        answer.await.map_err(|e| failed(&e))?.map_err(|e| failed(&e))
    }

    /// The fleet's name.
    #[zbus(property)]
    fn fleet(&self) -> &str {
        &self.fleet
    }

    /// The slot; empty as long as there is none.
    #[zbus(property)]
    fn node(&self) -> &str {
        &self.node
    }

    /// Counts the owners the slot has had.
    #[zbus(property)]
    fn epoch(&self) -> u64 {
        self.epoch
    }

    /// `joining`, `starting` or `ready`.
    #[zbus(property)]
    fn phase(&self) -> &str {
        self.phase.as_str()
    }

    /// What the console says.
    #[zbus(property)]
    fn message(&self) -> &str {
        &self.message
    }
}

/// The published state.
pub struct Status {
    object: InterfaceRef<Agent>,
    leave_requests: Mutex<mpsc::Receiver<LeaveRequest>>,
}

impl Status {
    /// Publishes the state of a node that has no slot yet.
    ///
    /// # Errors
    /// The bus says no.
    pub async fn publish(bus: &zbus::Connection, fleet: &str) -> Result<Self> {
        let message = said().borrow().clone();
        let (wish, leave_requests) = mpsc::channel(1);
        let agent = Agent {
            fleet: fleet.to_owned(),
            node: String::new(),
            epoch: 0,
            phase: Phase::Joining,
            message,
            leave_requests: wish,
        };
        bus.object_server().at(PATH, agent).await?;
        bus.request_name(BUS_NAME).await?;
        let published =
            Self { object: bus.object_server().interface(PATH).await?, leave_requests: Mutex::new(leave_requests) };
        let object = published.object.clone();
        tokio::spawn(async move {
            let mut said = said();
            while said.changed().await.is_ok() {
                let mut agent = object.get_mut().await;
                agent.message.clone_from(&said.borrow_and_update());
                let _ = agent.message_changed(object.signal_emitter()).await;
            }
        });
        Ok(published)
    }

    /// The node has its slot.
    ///
    /// # Errors
    /// The bus is gone.
    pub async fn is(&self, node: &str, epoch: u64) -> Result<()> {
        let mut agent = self.object.get_mut().await;
        (agent.node, agent.epoch) = (node.to_owned(), epoch);
        agent.node_changed(self.object.signal_emitter()).await?;
        Ok(agent.epoch_changed(self.object.signal_emitter()).await?)
    }

    /// Answers for ever those who want this node to leave, with what `ask` says.
    ///
    /// # Errors
    /// Never while the object is published.
    pub async fn leave_requests(&self, ask: impl AsyncFn() -> Result<()>) -> Result<()> {
        let mut leave_requests = self.leave_requests.lock().await;
        while let Some(wish) = leave_requests.recv().await {
            // Who has hung up asks again.
            let _ = wish.send(ask().await);
        }
        Ok(())
    }

    /// # Errors
    /// The bus is gone.
    pub async fn enter(&self, phase: Phase) -> Result<()> {
        let mut agent = self.object.get_mut().await;
        agent.phase = phase;
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

/// Asks the agent to leave the fleet.
///
/// # Errors
/// The agent does not run, or this is not root.
pub async fn leave(bus: &zbus::Connection) -> Result<()> {
    Ok(Agent1Proxy::new(bus).await?.leave().await?)
}

/// What `firstboot status` prints: one line for people, or JSON.
///
/// # Errors
/// The agent does not run.
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
    use crate::host::console::say;
    use tokio::net::UnixStream;

    /// A bus of two: names are not asked for there.
    async fn pair() -> (zbus::Connection, zbus::Connection) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server =
            zbus::connection::Builder::unix_stream(theirs).server(zbus::Guid::generate()).unwrap().p2p().build();
        let client = zbus::connection::Builder::unix_stream(ours).p2p().build();
        tokio::try_join!(server, client).unwrap()
    }

    #[tokio::test]
    async fn what_is_published_is_what_is_read() {
        let (agent, reader) = pair().await;
        let (wish, leave_requests) = mpsc::channel(1);
        let object = Agent {
            fleet: "acme".into(),
            node: String::new(),
            epoch: 0,
            phase: Phase::Joining,
            message: "m".into(),
            leave_requests: wish,
        };
        agent.object_server().at(PATH, object).await.unwrap();
        let status = Status {
            object: agent.object_server().interface(PATH).await.unwrap(),
            leave_requests: Mutex::new(leave_requests),
        };
        assert_eq!(describe(&reader, false).await.unwrap(), "a node of acme to be: m");
        status.is("db-1", 2).await.unwrap();
        status.enter(Phase::Ready).await.unwrap();
        let text = describe(&reader, true).await.unwrap();
        let read: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            (read["node"].as_str(), read["epoch"].as_u64(), read["phase"].as_str()),
            (Some("db-1"), Some(2), Some("ready"))
        );
        let refused = async || Err(crate::error::Error::Failed("the only vote".to_owned()));
        let answer = tokio::select! {
            answer = leave(&reader) => answer,
            _ = status.leave_requests(refused) => panic!("nobody can ask any more"),
        };
        assert!(answer.unwrap_err().to_string().contains("the only vote"));
        say(crate::host::journal::Event::Ready, "something");
        assert_eq!(*said().borrow(), "something");
    }
}
