use std::process::ExitCode;
use crate::*;
pub fn main() -> ExitCode {
    match go() { Ok(()) => ExitCode::SUCCESS, Err(e) => { eprintln!("error: {e}"); e.exit_code() } }
}
fn go() -> error::Result<()> {
    let project = project::Project::load(std::path::Path::new("."))?;
    let progress = progress::Progress::new(false, true);
    let store = store::Store::open()?;
    let mirror = mirror::Mirror::of(&project, None)?;
    let path = lock::Lock::path(&project);
    if !path.exists() {
        resolve::resolve(&project, &mirror, &store, &progress)?.write(&path)?;
    }
    let lock = lock::Lock::load(&project)?;
    let all: Vec<_> = lock.packages.iter().collect();
    fetch::fetch(&all, &mirror, &store, &progress)?;
    tools::Tools::prepare(&lock, &store, &progress)?;
    for g in project.groups(&["hub".to_owned()])? {
        let l = compose::compose(&project.recipe(g), &lock, &store, &progress)?;
        println!("{}", l.dir.display());
    }
    Ok(())
}
