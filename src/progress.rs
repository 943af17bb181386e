//! What the user sees while work goes on: bars on a terminal, plain lines elsewhere, nothing when quiet.
//! Everything goes to standard error; standard output belongs to results.

use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};

static INTERRUPT: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

/// Whether the user has asked the program to stop (Ctrl-C, SIGTERM). Long work asks at each safe point and ends with
/// [`Kind::Interrupted`](crate::error::Kind::Interrupted).
pub fn interrupted() -> bool {
    INTERRUPT.load(Ordering::Relaxed)
}

/// The flag behind [`interrupted`], for whoever installs the signal handlers.
pub fn interrupt_flag() -> Arc<AtomicBool> {
    Arc::clone(&INTERRUPT)
}

/// How much is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verbosity {
    /// Nothing at all: the same has been said before.
    Silent,
    /// Warnings only.
    Quiet,
    /// One line per milestone; bars on a terminal.
    Normal,
    /// Also plans, tables, and the milestones of parts.
    Verbose,
}

/// The place where progress is shown. Cheap to clone; clones share one terminal.
#[derive(Clone)]
pub struct Progress {
    bars: MultiProgress,
    verbosity: Verbosity,
    live: bool,
    /// Of the larger work that this is a part of.
    part: Option<String>,
    last_line: Arc<Mutex<Instant>>,
}

/// How long a part of larger work may say nothing.
const SILENCE: Duration = Duration::from_secs(30);

impl Progress {
    /// Progress on standard error, with bars if that is a terminal.
    pub fn new(verbosity: Verbosity) -> Self {
        let live = verbosity >= Verbosity::Normal && std::io::stderr().is_terminal();
        let target = if live { ProgressDrawTarget::stderr_with_hz(10) } else { ProgressDrawTarget::hidden() };
        let bars = MultiProgress::with_draw_target(target);
        Self { bars, verbosity, live, part: None, last_line: Arc::new(Mutex::new(Instant::now())) }
    }

    /// Says nothing but warnings.
    pub fn quiet() -> Self {
        Self::new(Verbosity::Quiet)
    }

    /// Says nothing.
    pub fn silent() -> Self {
        Self::new(Verbosity::Silent)
    }

    /// The same place for a part of larger work: bars carry `part` in front, and milestones are shown with `-v`, or when
    /// nothing was said for half a minute.
    pub fn part(&self, part: String) -> Self {
        Self { part: Some(part), ..self.clone() }
    }

    /// A milestone.
    pub fn info(&self, message: impl AsRef<str>) {
        let silence = || self.last_line.lock().unwrap_or_else(PoisonError::into_inner).elapsed();
        let due = match (self.verbosity, &self.part) {
            (Verbosity::Normal, Some(_)) => silence() >= SILENCE,
            (verbosity, _) => verbosity >= Verbosity::Normal,
        };
        if due {
            self.line(message.as_ref());
        }
    }

    /// A detail, shown with `-v`.
    pub fn detail(&self, message: impl AsRef<str>) {
        if self.verbosity >= Verbosity::Verbose {
            self.line(message.as_ref());
        }
    }

    /// Several details.
    pub fn details(&self, messages: impl IntoIterator<Item = String>) {
        messages.into_iter().for_each(|message| self.detail(message));
    }

    /// Something the user should know even when quiet.
    pub fn warn(&self, message: impl AsRef<str>) {
        if self.verbosity >= Verbosity::Quiet {
            self.line(&format!("warning: {}", message.as_ref()));
        }
    }

    /// A bar over `total` items called `unit`, with rate and time left. Hidden unless on a terminal.
    pub fn bar(&self, label: &str, total: u64, unit: &'static str) -> Bar {
        let style = "{prefix} [{bar:24}] {pos}/{len} {unit}  {rate}  {eta} left  {msg}".replace("{unit}", unit);
        let rate = |state: &ProgressState, out: &mut dyn std::fmt::Write| {
            // Writing to a terminal's buffer; a failure shows an empty field.
            let _ = write!(out, "{:.1}/s", state.per_sec());
        };
        let label = self.part.as_ref().map_or_else(|| label.to_string(), |part| format!("{part} {label}"));
        let bar = ProgressBar::new(total)
            .with_style(
                ProgressStyle::with_template(&style)
                    .unwrap_or_else(|_| ProgressStyle::default_bar())
                    .with_key("rate", rate)
                    .progress_chars("=> "),
            )
            .with_prefix(label);
        let bar = self.bars.add(bar);
        if self.live {
            bar.enable_steady_tick(Duration::from_millis(200));
        }
        Bar { bar }
    }

    fn line(&self, message: &str) {
        *self.last_line.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        // A reader that went away must not end the work: a failed write is let go.
        let write = || drop(writeln!(std::io::stderr(), "{message}"));
        if self.live { self.bars.suspend(write) } else { write() }
    }
}

/// One progress bar; disappears when dropped.
pub struct Bar {
    bar: ProgressBar,
}

impl Bar {
    /// `n` more items are done.
    pub fn inc(&self, n: u64) {
        self.bar.inc(n);
    }

    /// The text behind the numbers.
    pub fn message(&self, message: String) {
        self.bar.set_message(message);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// A time span for people: `0.42 s`, `12.3 s`, `4 min 05 s`, `1 h 02 min`.
pub fn duration(seconds: f64) -> String {
    let whole = seconds.round().max(0.0) as u64;
    match whole {
        0..60 if seconds < 9.995 => format!("{seconds:.2} s"),
        0..60 => format!("{seconds:.1} s"),
        60..3600 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
    }
}

/// A number of bytes for people: `12 kB`, `541 MB`, `5.69 GB`.
pub fn byte_size(bytes: u64) -> String {
    match bytes {
        0..999_500 => format!("{:.0} kB", bytes as f64 / 1e3),
        999_500..999_500_000 => format!("{:.0} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_well() {
        let sizes = [(0, "0 kB"), (999_499, "999 kB"), (999_500, "1 MB"), (541_200_000, "541 MB")];
        for (bytes, text) in sizes.into_iter().chain([(999_500_000, "1.00 GB"), (84_937_000_000, "84.94 GB")]) {
            assert_eq!(byte_size(bytes), text);
        }
    }

    #[test]
    fn durations_read_well() {
        let spans =
            [(0.421, "0.42 s"), (9.999, "10.0 s"), (59.4, "59.4 s"), (59.7, "1 min 00 s"), (245.2, "4 min 05 s")];
        for (seconds, text) in spans {
            assert_eq!(duration(seconds), text);
        }
        assert_eq!(duration(3725.0), "1 h 02 min");
    }
}
