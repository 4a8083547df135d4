//! Progress of a build on standard error: bars on a terminal, else a line for each finished step, and every 10 s a line
//! about the running ones.

use std::io::{self, IsTerminal as _, Write as _};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use fleet::{one_line, printable};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Interval of the lines about running steps where no terminal shows their bars.
const HEARTBEAT: Duration = Duration::from_secs(10);

/// Prints the progress of steps.
#[derive(Clone)]
pub struct Progress {
    bars: Arc<MultiProgress>,
    running: Arc<Running>,
    terminal: bool,
    quiet: bool,
    verbose: bool,
}

/// A running step. Dropping it before [`Step::done`] removes its bar.
pub struct Step {
    id: u64,
    bar: ProgressBar,
    name: String,
    started: Instant,
    running: Arc<Running>,
    terminal: bool,
    quiet: bool,
}

/// The running steps, for lines about them.
#[derive(Default)]
struct Running(Mutex<Vec<RunningStep>>);

struct RunningStep {
    id: u64,
    bar: ProgressBar,
    name: String,
    started: Instant,
}

impl Progress {
    /// Prints steps to stderr. `quiet` prints only errors; `verbose` also prints details.
    #[must_use]
    pub fn new(quiet: bool, verbose: bool) -> Self {
        let terminal = io::stderr().is_terminal() && !quiet;
        let target = if terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let running = Arc::new(Running::default());
        if !terminal && !quiet {
            let weak = Arc::downgrade(&running);
            std::thread::spawn(move || {
                loop {
                    std::thread::sleep(HEARTBEAT);
                    let Some(running) = weak.upgrade() else { return };
                    running.lines(HEARTBEAT).iter().for_each(|text| line(text));
                }
            });
        }
        Self { bars: Arc::new(MultiProgress::with_draw_target(target)), running, terminal, quiet, verbose }
    }

    /// Whether standard error shows bars while steps run.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.terminal
    }

    /// Starts a step of unknown length.
    #[must_use]
    pub fn step(&self, name: &str, message: &str) -> Step {
        let bar = ProgressBar::new_spinner()
            .with_style(style("{prefix:>12} {spinner} {msg} [{elapsed}]"))
            .with_prefix(name.to_owned())
            .with_message(message.to_owned());
        self.start(bar, name)
    }

    /// Starts a step over `total` bytes. Its bar shows the rate and the remaining time.
    #[must_use]
    pub fn bytes(&self, name: &str, total: u64) -> Step {
        let template = "{prefix:>12} [{bar:30}] {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} ETA {eta} \
                        {wide_msg}";
        let bar = ProgressBar::new(total).with_style(style(template)).with_prefix(name.to_owned());
        self.start(bar, name)
    }

    fn start(&self, bar: ProgressBar, name: &str) -> Step {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let bar = self.bars.add(bar);
        if self.terminal {
            bar.enable_steady_tick(Duration::from_millis(120));
        }
        let (id, name, started) = (NEXT.fetch_add(1, Ordering::Relaxed), name.to_owned(), Instant::now());
        self.running.all().push(RunningStep { id, bar: bar.clone(), name: name.clone(), started });
        let running = self.running.clone();
        Step { id, bar, name, started, running, terminal: self.terminal, quiet: self.quiet }
    }

    /// Prints the line with `-v` only.
    pub fn verbose(&self, name: &str, text: &str) {
        if self.verbose {
            self.say(name, text);
        }
    }

    /// Prints a line, unless `--quiet` is set.
    pub fn say(&self, name: &str, text: &str) {
        if !self.quiet {
            // The text may be that of a node or a hub.
            self.bars.suspend(|| line(&format!("{name:>12} {}", printable(text))));
        }
    }
}

impl Step {
    /// Shows a message beside the step, on a terminal.
    pub fn message(&self, text: &str) {
        self.bar.set_message(one_line(text));
    }

    /// Moves the bar forward.
    pub fn advance(&self, n: u64) {
        self.bar.inc(n);
    }

    /// Ends the step, and prints its result and duration.
    pub fn done(self, text: &str) {
        let seconds = self.started.elapsed().as_secs_f64();
        let text = format!("{:>12} {} ({seconds:.1} s)", self.name, printable(text));
        if self.terminal {
            self.bar.set_style(style("{msg}"));
            self.bar.finish_with_message(text);
        } else if !self.quiet {
            line(&text);
        }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        let mut running = self.running.all();
        running.retain(|step| step.id != self.id);
        drop(running);
        if !self.bar.is_finished() {
            self.bar.finish_and_clear();
        }
    }
}

impl Running {
    fn all(&self) -> MutexGuard<'_, Vec<RunningStep>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns a line for the running steps of each name. Leaves out steps that run for less than `least`.
    fn lines(&self, least: Duration) -> Vec<String> {
        let steps = self.all();
        let mut names: Vec<&str> = Vec::new();
        let long = || steps.iter().filter(move |step| step.started.elapsed() >= least);
        for step in long() {
            if !names.contains(&step.name.as_str()) {
                names.push(&step.name);
            }
        }
        let line = |name: &&str| {
            let steps: Vec<&RunningStep> = long().filter(|step| step.name == **name).collect();
            let texts: Vec<String> = steps.iter().map(|step| step.text()).filter(|text| !text.is_empty()).collect();
            let seconds = steps.iter().map(|step| step.started.elapsed().as_secs()).max().unwrap_or_default();
            format!("{name:>12} {} [{seconds} s]", texts.join("; "))
        };
        names.iter().map(line).collect()
    }
}

impl RunningStep {
    /// Returns the step's message, after the bytes that it has processed.
    fn text(&self) -> String {
        let mb = |bytes: u64| bytes as f64 / 1e6;
        match self.bar.length() {
            Some(total) => format!("{:.1} of {:.1} MB {}", mb(self.bar.position()), mb(total), self.bar.message())
                .trim_end()
                .into(),
            None => self.bar.message(),
        }
    }
}

/// Prints a line on standard error. A closed standard error does not stop the build.
pub(crate) fn line(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_steps_have_plain_lines() {
        let progress = Progress::new(true, false);
        let step = progress.step("compose", "app: 340 packages");
        step.message("app: unpacked 120 of 340 packages");
        let (one, other) = (progress.step("boot", "hub-1: kernel"), progress.step("boot", "db-1: agent"));
        let fetch = progress.bytes("fetch", 421_400_000);
        fetch.advance(87_000_000);
        fetch.message("libpython3.13-stdlib");
        assert_eq!(
            progress.running.lines(Duration::ZERO),
            [
                "     compose app: unpacked 120 of 340 packages [0 s]",
                "        boot hub-1: kernel; db-1: agent [0 s]",
                "       fetch 87.0 of 421.4 MB libpython3.13-stdlib [0 s]",
            ]
        );
        assert!(progress.running.lines(HEARTBEAT).is_empty(), "short steps have none");
        one.done("hub-1 is ready");
        drop((step, fetch));
        assert_eq!(progress.running.lines(Duration::ZERO), ["        boot db-1: agent [0 s]"]);
        drop(other);
        assert!(progress.running.lines(Duration::ZERO).is_empty());
    }
}
