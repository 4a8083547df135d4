//! Reads the files of a commit with git, which has the host's settings for proxies, certificates and passwords.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use crate::error::{Error, Result, fail};

/// Size of all files in bytes.
const MAX_BYTES: u64 = 2 << 30;
/// Number of files.
const MAX_FILES: usize = 100_000;

/// Returns the files of a commit below `folder`, by their path below it.
///
/// # Errors
/// If the repository cannot be read, or lacks the commit or the folder, or a file there is a link or a submodule.
pub(super) fn files(url: &str, commit: &str, folder: &str, scratch: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    run(scratch, &["init", "-q", "--bare", "."])?;
    // A server may refuse to send a commit that is not a branch.
    let only = run(scratch, &["fetch", "-q", "--no-tags", "--depth=1", url, commit]);
    if only.is_err() {
        run(scratch, &["fetch", "-q", "--no-tags", url, "+refs/heads/*:refs/heads/*"])?;
    }
    if run(scratch, &["cat-file", "-e", &format!("{commit}^{{commit}}")]).is_err() {
        return fail(format!("no branch of {url} has the commit {commit}\n  help: check `commit`, or push it there"));
    }
    let treeish = if folder.is_empty() { format!("{commit}^{{tree}}") } else { format!("{commit}:{folder}") };
    let listing = run(scratch, &["ls-tree", "-r", "-z", "--full-tree", &treeish])
        .map_err(|_| Error::Failed(format!("{url} has no folder `{folder}` in {commit}\n  help: check `folder`")))?;
    let blobs = blobs(&listing)?;
    read(scratch, &blobs)
}

/// Runs git in a repository, and returns its output.
fn run(dir: &Path, args: &[&str]) -> Result<Vec<u8>> {
    let output = git(dir, args).output().map_err(Error::cannot("run git\n  help: install git"))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let last = text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default();
    fail(format!("git {}: {last}", args[0]))
}

fn git(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new("git");
    // Nothing of the repository runs: it has no work tree, and only these transports.
    command.arg("-C").arg(dir).args(args);
    command
        .env("GIT_TERMINAL_PROMPT", "0")
        .env("LC_ALL", "C.UTF-8")
        .env("GIT_ALLOW_PROTOCOL", "https:http:ssh:git:file");
    command.env_remove("GIT_DIR").env_remove("GIT_WORK_TREE").env_remove("GIT_INDEX_FILE").stdin(Stdio::null());
    command
}

/// Parses `git ls-tree -z`: `MODE blob HASH\tPATH\0`. Returns path and hash of each file.
fn blobs(listing: &[u8]) -> Result<Vec<(String, String)>> {
    let listing = std::str::from_utf8(listing).map_err(Error::cannot("read the names of the files"))?;
    let mut blobs = Vec::new();
    for entry in listing.split('\0').filter(|entry| !entry.is_empty()) {
        let invalid = || Error::Failed(format!("unexpected line in git's output: {}", entry.escape_debug()));
        let (head, path) = entry.split_once('\t').ok_or_else(invalid)?;
        let [mode, kind, hash] = head.split(' ').collect::<Vec<_>>()[..] else { return Err(invalid()) };
        // Links and submodules are no part of add-ons; repositories of the OCA have links in their folder `setup`.
        if kind == "blob" && mode.starts_with("100") {
            blobs.push((path.to_owned(), hash.to_owned()));
        }
    }
    if blobs.len() > MAX_FILES {
        return fail(format!("it has {} files, more than {MAX_FILES}", blobs.len()));
    }
    Ok(blobs)
}

/// Reads the contents of files.
fn read(dir: &Path, blobs: &[(String, String)]) -> Result<BTreeMap<String, Vec<u8>>> {
    let failed = || Error::cannot("read the files from git");
    let mut command = git(dir, &["cat-file", "--batch"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().map_err(failed())?;
    let (Some(mut input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
        return fail("git has no pipes");
    };
    let files = thread::scope(|scope| {
        // git writes each file before it reads on.
        scope.spawn(move || {
            for (_, hash) in blobs {
                if writeln!(input, "{hash}").is_err() {
                    return;
                }
            }
        });
        let mut output = BufReader::new(output);
        let (mut files, mut total) = (BTreeMap::new(), 0);
        for (path, hash) in blobs {
            let mut head = String::new();
            output.read_line(&mut head).map_err(failed())?;
            let size = head.strip_prefix(hash.as_str()).and_then(|rest| rest.trim().strip_prefix("blob "));
            let Some(size) = size.and_then(|size| size.parse::<u64>().ok()) else {
                return fail(format!("git does not have {path}: {}", head.trim().escape_debug()));
            };
            total += size;
            if total > MAX_BYTES {
                return fail(format!("its files have more than {MAX_BYTES} bytes"));
            }
            let mut bytes = Vec::new();
            (&mut output).take(size).read_to_end(&mut bytes).map_err(failed())?;
            let mut newline = [0];
            output.read_exact(&mut newline).map_err(failed())?;
            files.insert(path.clone(), bytes);
        }
        Ok(files)
    });
    if files.is_err() {
        let _ = child.kill();
    }
    child.wait().map_err(failed())?;
    files
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn repository(dir: &Path) -> (String, String) {
        let work = dir.join("work");
        fs::create_dir_all(work.join("addons/a")).unwrap();
        fs::write(work.join("addons/a/__manifest__.py"), "{}").unwrap();
        fs::write(work.join("addons/a/empty.py"), "").unwrap();
        fs::write(work.join("README"), "x").unwrap();
        std::os::unix::fs::symlink("a", work.join("addons/link")).unwrap();
        let git = |args: &[&str]| {
            let identity = ["-c", "user.name=x", "-c", "user.email=x@example.com", "-c", "init.defaultBranch=main"];
            let output = Command::new("git").arg("-C").arg(&work).args(identity).args(args).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).unwrap().trim().to_owned()
        };
        git(&["init", "-q", "."]);
        git(&["add", "."]);
        git(&["commit", "-q", "-m", "x"]);
        let first = git(&["rev-parse", "HEAD"]);
        fs::write(work.join("README"), "y").unwrap();
        git(&["commit", "-q", "-a", "-m", "y"]);
        (format!("file://{}", work.display()), first)
    }

    #[test]
    fn reads_a_commit_that_is_no_branch() {
        let dir = tempfile::tempdir().unwrap();
        let (url, commit) = repository(dir.path());
        let scratch = |name: &str| {
            let path = dir.path().join(name);
            fs::create_dir(&path).unwrap();
            path
        };
        let all = files(&url, &commit, "", &scratch("a")).unwrap();
        let paths: Vec<&String> = all.keys().collect();
        assert_eq!(paths, ["README", "addons/a/__manifest__.py", "addons/a/empty.py"]);
        assert_eq!(all["README"], b"x");
        assert_eq!(files(&url, &commit, "addons", &scratch("b")).unwrap()["a/__manifest__.py"], b"{}");
        let e = files(&url, &commit, "nowhere", &scratch("c")).unwrap_err().to_string();
        assert!(e.contains("no folder `nowhere`"), "{e}");
        let e = files(&url, &"0".repeat(40), "", &scratch("d")).unwrap_err().to_string();
        assert!(e.contains("has the commit 0000"), "{e}");
        let e = files(&format!("{url}x"), &commit, "", &scratch("e")).unwrap_err().to_string();
        assert!(e.contains("git fetch: "), "{e}");
    }
}
