//! The tasks of a sandbox, by the names that [`sandbox::run`] sends.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::bake::{checks, generate};
use crate::{compose, sandbox};

/// Does the task on standard input, and writes the answer to standard output. Returns the exit code.
pub fn inner() -> u8 {
    sandbox::inner(|task, job, files| match task {
        compose::TASK => answer(job, |job| compose::work(job, files)),
        checks::TASK => answer(job, |job| checks::work(job, files)),
        generate::TASK => answer(job, |job| generate::work(job, files)),
        _ => Err(format!("the sandbox has no task `{task}`")),
    })
}

/// The answer of `work` to the job, as JSON.
fn answer<J: DeserializeOwned, A: Serialize>(
    job: Value,
    work: impl FnOnce(&J) -> Result<A, String>,
) -> Result<String, String> {
    let job = serde_json::from_value(job).map_err(|e| format!("cannot read the job: {e}"))?;
    serde_json::to_string(&work(&job)?).map_err(|e| e.to_string())
}
