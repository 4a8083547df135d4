//! `bakehouse report` of a real fleet: state, units and the last messages of each node.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use fleet::node_api::{JournalLine, JournalQuery, UNITS_PATH, UnitStatus};

use super::client::Client;
use super::journal::Logs;
use super::spool::{self, SpooledJournal};
use super::status::fleet_status;
use crate::error::Result;
use crate::keys::operator::KnownNode;
use crate::progress::Progress;
use crate::util::terminal::visible;
use crate::util::time::rfc3339_millis;
use crate::vm::report::Archive;

/// Number of messages of each node.
const LINES: u32 = 2000;
const LIMIT: Duration = Duration::from_secs(15);
/// Longest reply in bytes.
const LONGEST: usize = 4 << 20;
/// Number of nodes whose units are in memory.
const PART: usize = 64;
/// Programs whose messages are in the timeline.
const PROGRAMS: [&str; 6] = ["firstboot", "patroni", "keepalived", "etcd", "haproxy", "bird"];

/// Writes the report to a `.tar.gz`. If a node does not answer, its files contain the error. Returns the paths of the
/// files below `report/` in the archive. `secrets` are removed from all texts.
///
/// # Errors
/// If no hub answers, or the archive cannot be written.
pub(crate) async fn collect(
    client: &Client,
    nodes: &[KnownNode],
    secrets: &[String],
    output: &Path,
    progress: &Progress,
) -> Result<Vec<String>> {
    let step = progress.step("report", "asking for the state of the fleet");
    let status = fleet_status(client, nodes).await?;
    let mut archive = Archive::create(output, secrets)?;
    archive.add("board.txt", &status.to_string())?;
    let names: Vec<String> = nodes.iter().map(|node| node.name.clone()).collect();
    step.message("asking for the journals");
    let query = JournalQuery { lines: Some(LINES), ..JournalQuery::default() };
    let logs = Logs { client, nodes: &names, query: &query, kept_by: None, on_break: Arc::new(|_, _| {}) };
    let (journals, ends): (Vec<_>, Vec<_>) = logs.spooled().await?.into_iter().unzip();
    let all: Vec<&SpooledJournal> = journals.iter().collect();
    archive.add_lines("timeline.txt", |write| {
        spool::merge(&all, |index, line| {
            let is_noted = PROGRAMS.iter().any(|program| line.unit.starts_with(program));
            if is_noted { write(&text_of(&names[index], &line)) } else { Ok(()) }
        })
    })?;
    for ((node, journal), end) in names.iter().zip(&journals).zip(ends) {
        let mut text = String::new();
        for line in journal.lines() {
            text += &text_of(node, &line?);
        }
        if let Some(e) = end {
            text += &format!("{}\n", e.chain());
        }
        archive.add(&format!("{node}/journal.txt"), &text)?;
    }
    step.message("asking for the units");
    let units = |client: Client, node: String| async move {
        client.get::<Vec<UnitStatus>>(&node, UNITS_PATH, LONGEST, LIMIT).await
    };
    for part in names.chunks(PART) {
        for (node, units) in part.iter().zip(client.each(part, units).await) {
            let line = |u: &UnitStatus| format!("{} {} {} {}\n", u.name, u.active, u.sub, u.description);
            let text = units.map_or_else(|e| format!("{}\n", e.chain()), |units| units.iter().map(line).collect());
            archive.add(&format!("{node}/units.txt"), &text)?;
        }
    }
    for row in &status.nodes {
        let text = match &row.report {
            Some(report) => serde_json::to_string_pretty(report).unwrap_or_default(),
            None => row.message.clone(),
        };
        archive.add(&format!("{}/agent.json", row.node), &(text + "\n"))?;
    }
    let files = archive.finish()?;
    step.done(&format!("{}: {} files", output.display(), files.len()));
    Ok(files)
}

fn text_of(node: &str, line: &JournalLine) -> String {
    format!("{} {node} {}: {}\n", rfc3339_millis(line.at), visible(&line.unit), visible(&line.message))
}

#[cfg(test)]
mod tests {
    use super::super::test_servers::Fleet;
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn report_has_every_node_and_merges_the_journals() {
        let fleet = Fleet::start(&["hub-1"], &["db-1", "db-2"]).await;
        fleet.node("db-1").write("patroni.service", &[10, 30]);
        fleet.node("db-2").write("etcd.service", &[20]);
        fleet.write("db-2", &[25]);
        let mut nodes = fleet.nodes();
        nodes.push(KnownNode { name: "db-9".to_owned(), ..nodes[0].clone() });
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("report.tar.gz");
        let progress = Progress::new(true, false);
        let files = collect(&fleet.client(), &nodes, &[], &path, &progress).await.unwrap();
        assert_eq!(files.len(), 2 + 3 * 3, "{files:?}");
        let mut tar = tar::Archive::new(flate2::read::GzDecoder::new(std::fs::File::open(&path).unwrap()));
        let texts: std::collections::BTreeMap<String, String> = tar
            .entries()
            .unwrap()
            .map(|entry| {
                let mut entry = entry.unwrap();
                let path = entry.path().unwrap().display().to_string();
                (path, std::io::read_to_string(&mut entry).unwrap())
            })
            .collect();
        let timeline = &texts["report/timeline.txt"];
        let nodes: Vec<&str> = timeline.lines().map(|line| line.split(' ').nth(1).unwrap()).collect();
        assert_eq!(nodes, ["db-1", "db-2", "db-1"], "{timeline}");
        assert!(texts["report/db-9/journal.txt"].contains("404"), "{texts:?}");
        assert!(texts["report/db-2/units.txt"].contains("patroni.service active"), "{texts:?}");
        assert!(texts["report/db-1/agent.json"].contains("\"image\": \"7\""), "{texts:?}");
    }
}
