//! The last requests of operators. Another unit of the monitor writes them to a file, because this process may not read
//! journals.

use std::path::Path;

use serde::Deserialize;

use crate::views::{Audit, Request};

/// Longest file, in bytes.
const LONGEST: u64 = 1 << 20;

/// A line of the file: an entry of a journal, as `journalctl --output=json` prints it, with the name of its node.
#[derive(Deserialize)]
struct Line {
    node: String,
    /// Microseconds since 1970.
    #[serde(rename = "__REALTIME_TIMESTAMP")]
    at: String,
    #[serde(rename = "MESSAGE")]
    text: String,
}

/// Reads the file. Lines in another format are left out.
pub(crate) async fn read(path: Option<&Path>) -> Audit {
    let Some(path) = path.map(Path::to_owned) else { return Audit::Absent };
    tokio::task::spawn_blocking(move || read_file(&path)).await.unwrap_or_default()
}

fn read_file(path: &Path) -> Audit {
    let is_short = std::fs::metadata(path).is_ok_and(|file| file.is_file() && file.len() <= LONGEST);
    let Some(text) = is_short.then(|| std::fs::read_to_string(path).ok()).flatten() else { return Audit::Absent };
    let request =
        |line: Line| Some(Request { at: line.at.parse::<u64>().ok()? / 1_000_000, node: line.node, text: line.text });
    let lines = text.lines().filter_map(|line| serde_json::from_str(line).ok());
    let mut requests: Vec<Request> = lines.filter_map(request).collect();
    requests.sort_by_key(|request| std::cmp::Reverse(request.at));
    Audit::Requests(requests)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_newest_request_is_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit");
        assert_eq!(read(Some(&path)).await, Audit::Absent);
        assert_eq!(read(None).await, Audit::Absent);
        let line = |at: u64| {
            format!(
                r#"{{"node":"db-1","__CURSOR":"s=1","__REALTIME_TIMESTAMP":"{at}000000","MESSAGE":"anna: reboot"}}"#
            )
        };
        // Bytes that are no text are an array.
        let binary = r#"{"node":"db-1","__REALTIME_TIMESTAMP":"9000000","MESSAGE":[1,2]}"#;
        std::fs::write(&path, format!("{}\nnot JSON\n{binary}\n{}\n", line(1), line(2))).unwrap();
        let Audit::Requests(requests) = read(Some(&path)).await else { panic!() };
        assert_eq!(requests.iter().map(|request| request.at).collect::<Vec<_>>(), [2, 1]);
    }
}
