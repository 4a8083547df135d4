//! Progress of a build on standard error: bars on a terminal, else one line for each finished step.

use std::io::{self, IsTerminal as _, Write as _};
use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Prints the progress of steps.
#[derive(Clone)]
pub struct Progress {
    bars: Arc<MultiProgress>,
    terminal: bool,
    quiet: bool,
    verbose: bool,
}

/// A running step. Dropping it before [`Step::done`] removes its bar.
pub struct Step {
    bar: ProgressBar,
    name: String,
    started: Instant,
    terminal: bool,
    quiet: bool,
}

impl Progress {
    /// Prints steps to stderr. `quiet` prints only errors; `verbose` also prints details.
    #[must_use]
    pub fn new(quiet: bool, verbose: bool) -> Self {
        let terminal = io::stderr().is_terminal() && !quiet;
        let target = if terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        Self { bars: Arc::new(MultiProgress::with_draw_target(target)), terminal, quiet, verbose }
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
        let bar = ProgressBar::new(total)
            .with_style(style("{prefix:>12} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} ETA {eta} {msg}"))
            .with_prefix(name.to_owned());
        self.start(bar, name)
    }

    fn start(&self, bar: ProgressBar, name: &str) -> Step {
        let bar = self.bars.add(bar);
        if self.terminal {
            bar.enable_steady_tick(Duration::from_millis(120));
        }
        Step { bar, name: name.to_owned(), started: Instant::now(), terminal: self.terminal, quiet: self.quiet }
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
            self.bars.suspend(|| line(&format!("{name:>12} {text}")));
        }
    }
}

impl Step {
    /// Shows a message beside the step, on a terminal.
    pub fn message(&self, text: &str) {
        self.bar.set_message(text.to_owned());
    }

    /// Moves the bar forward.
    pub fn advance(&self, n: u64) {
        self.bar.inc(n);
    }

    /// Ends the step, and prints its result and duration.
    pub fn done(self, text: &str) {
        let seconds = self.started.elapsed().as_secs_f64();
        let text = format!("{:>12} {text} ({seconds:.1} s)", self.name);
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
        if !self.bar.is_finished() {
            self.bar.finish_and_clear();
        }
    }
}

/// Prints a line on standard error. A closed standard error does not stop the build.
pub fn line(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}
