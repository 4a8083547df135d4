//! `bakehouse pcap`: captures packets of a node.

use std::fs::File;
use std::io::{self, IsTerminal as _, Write};
use std::path::PathBuf;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use clap::{Args, ValueHint};
use fleet::node_api::{ExecEvent, LARGEST_SNAP, LONGEST_CAPTURE, PCAP_PATH, PcapRequest};
use fleet::one_line;
use schemars::JsonSchema;
use serde::Serialize;

use super::access::NodeContext;
use super::results::CommandResult;
use super::verbs::AccessArgs;
use crate::deploy::nodes::{self, NodeLines};
use crate::error::{Error, Result, fail};

pub(super) const PCAP: &str = "\
Examples:
  bakehouse pcap hub-1 -i wg0 -o hub-1.pcap
  bakehouse pcap app-1 --seconds 60 | wireshark -k -i -

The file has the format of tcpdump and Wireshark. It contains what the nodes send to each other: keep it safe. Packets of
this connection on the mesh are left out. On a network card they are not, so with a large --snap the capture has mostly
its own packets. After Ctrl-C, the packets so far are in the file. It needs the role admin.";

/// Longest time between two lines of the reply. Nodes send an empty line at least every 20 s.
const IDLE: Duration = Duration::from_secs(60);
/// Bytes of a megabyte.
const MEGABYTE: u64 = 1_000_000;

#[derive(Args)]
pub(super) struct PcapArgs {
    /// Name of a node, such as `db-2` (group and number)
    pub(super) node: String,
    /// Network interface; default: all (`bakehouse net NODE` lists them)
    #[arg(short, long, value_name = "NAME")]
    pub(super) interface: Option<String>,
    /// End after this time
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=i64::from(LONGEST_CAPTURE)))]
    pub(super) seconds: u32,
    /// End at this size of the file, in MB
    #[arg(long, default_value_t = 50, value_name = "MB", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(super) size: u32,
    /// First bytes of each packet to capture
    #[arg(long, default_value_t = 256, value_name = "BYTES")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=i64::from(LARGEST_SNAP)))]
    pub(super) snap: u32,
    /// File to write, instead of standard output
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(super) output: Option<PathBuf>,
    #[command(flatten)]
    pub(super) access: AccessArgs,
}

/// Result of `pcap`.
#[derive(Serialize, JsonSchema)]
pub(super) struct PcapResult {
    /// Name of the node.
    pub(super) node: String,
    /// The file; `null` for standard output.
    pub(super) path: Option<PathBuf>,
    /// Size of the capture in bytes.
    pub(super) bytes: u64,
}

/// Captures packets of a node.
pub(super) fn pcap(context: &NodeContext, args: &PcapArgs) -> Result<CommandResult> {
    let reach = context.reach(&args.access)??;
    let node = reach.node(&args.node)?.name.clone();
    let mut out: Box<dyn Write> = match &args.output {
        // The request comes first, so that a refused one does not replace a file.
        Some(_) => Box::new(io::sink()),
        None if context.output.json => {
            return Err(Error::Usage("with --json, standard output has the result\n  help: add `-o FILE`".to_owned()));
        }
        None if io::stdout().is_terminal() => {
            return Err(Error::Usage("a capture is no text for a terminal\n  help: add `-o FILE`".to_owned()));
        }
        None => Box::new(io::stdout()),
    };
    let request = PcapRequest {
        interface: args.interface.clone(),
        seconds: args.seconds,
        bytes: u64::from(args.size) * MEGABYTE,
        snap: args.snap,
    };
    let step = context.progress.step("pcap", &format!("{node} captures for up to {} s", args.seconds));
    let bytes = nodes::run(async {
        let body = serde_json::to_vec(&request).map_err(Error::Json)?.into();
        let lines = reach.client.connect(&node).await?.lines("POST", PCAP_PATH, body, IDLE).await?;
        if let Some(path) = &args.output {
            out = Box::new(File::create(path).map_err(Error::io("create", path))?);
        }
        copy(&node, lines, &mut out, |text| context.progress.say("pcap", text)).await
    })??;
    drop(step);
    context.progress.say("pcap", &format!("{node}: {bytes} bytes"));
    Ok(CommandResult::Pcap(PcapResult { node, path: args.output.clone(), bytes }))
}

/// Writes the capture until its end. Returns its size in bytes.
async fn copy(node: &str, mut lines: NodeLines, out: &mut dyn Write, say: impl Fn(&str)) -> Result<u64> {
    let (mut total, mut last) = (0, String::new());
    let invalid = || format!("read the capture of {node}");
    while let Some(line) = lines.next().await? {
        match serde_json::from_slice(&line).map_err(Error::cannot(invalid()))? {
            ExecEvent::Stdout(text) => {
                let bytes = BASE64.decode(text).map_err(Error::cannot(invalid()))?;
                total += bytes.len() as u64;
                write(out, &bytes)?;
            }
            ExecEvent::Stderr(text) => {
                let bytes = BASE64.decode(text).map_err(Error::cannot(invalid()))?;
                last = one_line(&String::from_utf8_lossy(&bytes));
                say(&last);
            }
            ExecEvent::Exit(0) => return Ok(total),
            ExecEvent::Exit(code) => return fail(format!("the capture on {node} has ended with {code}: {last}")),
            ExecEvent::Failed(why) => return fail(format!("{node}: {}", one_line(&why))),
            ExecEvent::Unknown => {}
        }
    }
    fail(format!("the connection to {node} ended before the capture; the file has the packets so far"))
}

/// Writes at once, so that Ctrl-C loses nothing, and a program that reads the capture gets each packet.
fn write(out: &mut dyn Write, bytes: &[u8]) -> Result<()> {
    out.write_all(bytes).and_then(|()| out.flush()).map_err(|e| match e.kind() {
        io::ErrorKind::BrokenPipe => Error::Unread,
        _ => Error::io("write", "the capture")(e),
    })
}
