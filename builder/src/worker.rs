//! The tasks of a sandbox. [`sandbox::run`] sends a task's name.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::bake::{checks, generate};
use crate::error::{Error, Result, fail};
use crate::{compose, sandbox};

/// Runs the task on standard input, and writes its result to standard output. Returns the exit code.
pub fn inner() -> u8 {
    sandbox::inner(|task, job, files| match task {
        compose::TASK => run_task(job, |job| compose::work(job, files)),
        checks::TASK => run_task(job, |job| checks::work(job, files)),
        generate::TASK => run_task(job, |job| generate::work(job, files)),
        _ => fail(format!("the sandbox has no task `{task}`")),
    })
}

/// Runs `work` with the job. Returns its result as JSON.
fn run_task<J: DeserializeOwned, A: Serialize>(job: Value, work: impl FnOnce(&J) -> Result<A>) -> Result<String> {
    let job = serde_json::from_value(job).map_err(Error::cannot("read the job"))?;
    serde_json::to_string(&work(&job)?).map_err(Error::Json)
}
