//! The agent's log: events of [`tracing`], with levels and fields.
//!
//! | level   | meaning                              | priority in the journal |
//! | ------- | ------------------------------------ | ----------------------- |
//! | `error` | an operator has to act               | 3                       |
//! | `warn`  | the agent retries, or continues      | 4                       |
//! | `info`  | the state of the node has changed    | 6                       |
//! | `debug` | details, if `RUST_LOG` enables them  | 7                       |
//!
//! The agent sends its events to journald's socket, so `journalctl SLOT=db-1` finds events with the field `slot`. A
//! short program writes to standard error, because journald cannot find the unit of a process that has ended. Under
//! systemd, an event with a `MESSAGE_ID` goes to the socket, whatever its level. On a terminal the log is text.

use std::env;
use std::fmt;
use std::fs;
use std::io;
use std::os::linux::fs::MetadataExt as _;

use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_journald::{Priority, PriorityMappings};
use tracing_subscriber::Layer as _;
use tracing_subscriber::filter::{Targets, filter_fn};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt as _;

/// How long a program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Process {
    /// The agent, which runs until the machine stops.
    Lasting,
    /// A program that ends after one task.
    Short,
}

/// Starts the log. `RUST_LOG`, such as `debug` or `warn,firstboot=debug`, sets its levels.
pub fn start(process: Process) {
    // Another part of the process may have started the log.
    let _ = subscriber(process, is_in_journal()).try_init();
}

/// Returns the subscriber of the log. `in_journal`: standard error is a stream of journald.
fn subscriber(process: Process, in_journal: bool) -> impl Subscriber + Send + Sync {
    let journal = in_journal.then(journal).flatten();
    let has_socket = journal.is_some();
    let to_socket = move |of: &Metadata| has_socket && (process == Process::Lasting || of.fields().field(ID).is_some());
    let text =
        tracing_subscriber::fmt::layer().with_writer(io::stderr).event_format(Lines { has_priority: in_journal });
    let levels = levels(env::var("RUST_LOG").ok().as_deref());
    // Operators and programs search the events of a node by their MESSAGE_ID.
    let wanted = move |of: &Metadata| of.fields().field(ID).is_some() || levels.would_enable(of.target(), of.level());
    tracing_subscriber::registry()
        .with(filter_fn(wanted))
        .with(journal.with_filter(filter_fn(to_socket)))
        .with(text.with_filter(filter_fn(move |of| !to_socket(of))))
}

/// Field of an event that has a `MESSAGE_ID`.
const ID: &str = "message_id";

/// Returns the levels to log: the usual ones, with the changes of `wanted`. A level without a target replaces all.
fn levels(wanted: Option<&str>) -> Targets {
    // The D-Bus library logs each message as `info`.
    let usual = Targets::new().with_default(LevelFilter::WARN).with_target("firstboot", LevelFilter::INFO);
    let wanted = wanted.filter(|text| !text.trim().is_empty());
    let Some(wanted) = wanted.and_then(|text| text.parse::<Targets>().ok()) else { return usual };
    // A misspelled level is the name of a target without events.
    let base = wanted.default_level().map_or(usual, |level| Targets::new().with_default(level));
    base.with_targets(wanted.iter().map(|(target, level)| (target.to_owned(), level)))
}

/// Returns the sender to journald's socket; `None` if there is no journald.
fn journal() -> Option<tracing_journald::Layer> {
    let priorities = PriorityMappings {
        error: Priority::Error,
        warn: Priority::Warning,
        info: Priority::Informational,
        debug: Priority::Debug,
        trace: Priority::Debug,
    };
    let layer = tracing_journald::layer().ok()?;
    let identifier = "firstboot".to_owned();
    Some(layer.with_field_prefix(None).with_syslog_identifier(identifier).with_priority_mappings(priorities))
}

/// Returns whether standard error is the stream of journald that [`JOURNAL_STREAM`] names.
///
/// [`JOURNAL_STREAM`]: https://www.freedesktop.org/software/systemd/man/latest/systemd.exec.html#%24JOURNAL_STREAM
fn is_in_journal() -> bool {
    let stream = env::var("JOURNAL_STREAM").unwrap_or_default();
    fs::metadata("/proc/self/fd/2").is_ok_and(|own| stream == format!("{}:{}", own.st_dev(), own.st_ino()))
}

/// Format of standard error: `<4>text` for journald ([sd-daemon(3)]), else `WARN text`.
///
/// [sd-daemon(3)]: https://www.freedesktop.org/software/systemd/man/latest/sd-daemon.html
struct Lines {
    has_priority: bool,
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut to: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let level = *event.metadata().level();
        if !self.has_priority {
            write!(to, "{level:>5} ")?;
            context.format_fields(to.by_ref(), event)?;
            return writeln!(to);
        }
        let mut text = String::new();
        context.format_fields(Writer::new(&mut text), event)?;
        // journald makes an entry of each line.
        text.lines().try_for_each(|line| writeln!(to, "<{}>{line}", priority(level)))
    }
}

fn priority(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        _ => 7,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::journal::{Event as NodeEvent, record};
    use std::collections::BTreeMap;
    use std::os::unix::net::UnixDatagram;
    use std::process::Command;
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    const SOCKET: &str = "/run/systemd/journal/socket";
    const INSIDE: &str = "BAKEHOUSE_TEST_HAS_OWN_RUN";

    /// Parses an entry of journald's native protocol.
    fn fields(mut entry: &[u8]) -> BTreeMap<String, String> {
        let mut found = BTreeMap::new();
        while !entry.is_empty() {
            let end = entry.iter().position(|b| *b == b'\n').unwrap();
            let line = String::from_utf8(entry[..end].to_vec()).unwrap();
            entry = &entry[end + 1..];
            if let Some((name, value)) = line.split_once('=') {
                found.insert(name.to_owned(), value.to_owned());
                continue;
            }
            let length = u64::from_le_bytes(entry[..8].try_into().unwrap()) as usize;
            found.insert(line, String::from_utf8(entry[8..8 + length].to_vec()).unwrap());
            entry = &entry[8 + length + 1..];
        }
        found
    }

    /// Runs this test again in a mount namespace with its own `/run`, and returns whether this is that run.
    fn has_own_run(test: &str) -> bool {
        if env::var_os(INSIDE).is_some() {
            return true;
        }
        let script = "mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/journal && exec \"$0\" --exact \"$1\"";
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--mount", "sh", "-c", script]).arg(env::current_exe().unwrap());
        let output = command.arg(test).env(INSIDE, "1").output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && text.contains("1 passed"),
            "{text}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        false
    }

    #[test]
    fn journal_has_priority_fields_and_message_id() {
        if !has_own_run("host::log::tests::journal_has_priority_fields_and_message_id") {
            return;
        }
        let journald = UnixDatagram::bind(SOCKET).unwrap();
        journald.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let entry = || {
            let mut bytes = vec![0; 1 << 16];
            let length = journald.recv(&mut bytes).unwrap();
            fields(&bytes[..length])
        };
        let check = |process, expects_logs: bool| {
            tracing::subscriber::with_default(subscriber(process, true), || {
                tracing::warn!(slot = "db-1", epoch = 2_u64, "db-1: {}", "lost");
                tracing::debug!("a detail");
                record(NodeEvent::Stopped, "two\nlines");
            });
            // At its start, the sender sends an empty datagram to test the socket.
            assert_eq!(entry(), BTreeMap::new());
            if expects_logs {
                let log = entry();
                let field = |name: &str| log.get(name).map(String::as_str);
                assert_eq!((field("PRIORITY"), field("MESSAGE")), (Some("4"), Some("db-1: lost")));
                assert_eq!((field("SLOT"), field("EPOCH")), (Some("db-1"), Some("2")));
                assert_eq!(field("SYSLOG_IDENTIFIER"), Some("firstboot"));
            }
            let event = entry();
            let field = |name: &str| event.get(name).map(String::as_str);
            assert_eq!((field("PRIORITY"), field("MESSAGE")), (Some("3"), Some("two\nlines")));
            assert_eq!(field("MESSAGE_ID"), Some(NodeEvent::Stopped.id()));
        };
        check(Process::Lasting, true);
        check(Process::Short, false);
    }

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_begin_with_priority_or_level() {
        for (has_priority, expected) in [
            (true, "<3>two\n<3>lines\n<6>ready slot=\"db-1\"\n"),
            (false, "ERROR two\nlines\n INFO ready slot=\"db-1\"\n"),
        ] {
            let written = Written::default();
            let writer = written.clone();
            let text = tracing_subscriber::fmt::layer()
                .with_writer(move || writer.clone())
                .event_format(Lines { has_priority });
            tracing::subscriber::with_default(tracing_subscriber::registry().with(text), || {
                tracing::error!("two\nlines");
                tracing::info!(slot = "db-1", "ready");
            });
            assert_eq!(String::from_utf8_lossy(&written.0.lock().unwrap()), expected);
        }
    }

    #[test]
    fn invalid_levels_do_not_silence_the_log() {
        for text in [None, Some(""), Some("firstboot=loud"), Some("warning"), Some("zbus=error")] {
            assert!(levels(text).would_enable("firstboot::hub", &Level::INFO), "{text:?}");
            assert!(!levels(text).would_enable("zbus", &Level::INFO), "{text:?}");
        }
        assert!(levels(Some("debug")).would_enable("firstboot", &Level::DEBUG));
        let details = levels(Some("firstboot=debug"));
        assert!(details.would_enable("firstboot::hub", &Level::DEBUG) && details.would_enable("zbus", &Level::WARN));
        assert!(!levels(Some("error")).would_enable("firstboot", &Level::WARN));
    }
}
