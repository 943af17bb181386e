//! What the user sees while work goes on: bars on a terminal, plain lines elsewhere, nothing when quiet.
//! Everything goes to standard error; standard output belongs to results.

use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use console::Term;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle, TermLike};

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

/// Characters of a bar.
const BAR: usize = 10;

impl Progress {
    /// Progress on standard error, with bars if that is a terminal.
    pub fn new(verbosity: Verbosity) -> Self {
        let live = verbosity >= Verbosity::Normal && std::io::stderr().is_terminal() && !console::is_dumb();
        let target = match live {
            true => ProgressDrawTarget::term_like_with_hz(Box::new(Screen(Term::buffered_stderr())), 10),
            false => ProgressDrawTarget::hidden(),
        };
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

    /// Takes the bars away for good: the work is being stopped.
    pub fn end_bars(&self) {
        // What cannot be cleared stays.
        let _ = self.bars.clear();
        self.bars.set_draw_target(ProgressDrawTarget::hidden());
    }

    /// A bar over `total` items called `unit`, with time left and rate. Hidden unless on a terminal.
    pub fn bar(&self, label: &str, total: u64, unit: &'static str) -> Bar {
        self.bar_noting(label, total, unit, String::new())
    }

    /// As [`Progress::bar`], with `note` behind it.
    pub fn bar_noting(&self, label: &str, total: u64, unit: &'static str, note: String) -> Bar {
        let label = self.part.as_ref().map_or_else(|| label.to_string(), |part| format!("{part} {label}"));
        let digits = total.to_string().len();
        // Beside the bar, the numbers, and 13 characters for the time left.
        let room = move || columns().saturating_sub(BAR + 5 + 2 * digits + 13);
        let length = label.chars().count();
        let name = move |_: &ProgressState, out: &mut dyn std::fmt::Write| {
            // Writing to a terminal's buffer; a failure shows an empty field.
            let _ = out.write_str(&shortened(&label, room()));
        };
        let rest = move |state: &ProgressState, out: &mut dyn std::fmt::Write| {
            let mut parts = vec![note.clone()];
            if state.pos() > 0 {
                parts.insert(0, format!("{} left", brief(state.eta())));
                parts.push(format!("{:.1} {unit}/s", state.per_sec()));
            }
            let taken = length.min(room()) + BAR + 5 + digits + state.pos().to_string().len();
            let _ = out.write_str(&fitting(&parts, columns().saturating_sub(taken)));
        };
        let style = format!("{{name}} [{{bar:{BAR}}}] {{pos}}/{{len}}{{rest}}");
        let bar = ProgressBar::new(total).with_style(
            ProgressStyle::with_template(&style)
                .unwrap_or_else(|_| ProgressStyle::default_bar())
                .with_key("name", name)
                .with_key("rest", rest)
                .progress_chars("=> "),
        );
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
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// The terminal, with the cursor at the start of the bars' last line rather than behind its end: what the terminal echoes
/// there, as the `^C` of an interruption, does not move the bars, and is cleared with them.
#[derive(Debug)]
struct Screen(Term);

impl TermLike for Screen {
    fn width(&self) -> u16 {
        self.0.size().1
    }

    fn height(&self) -> u16 {
        self.0.size().0
    }

    fn move_cursor_up(&self, n: usize) -> std::io::Result<()> {
        self.0.move_cursor_up(n)
    }

    fn move_cursor_down(&self, n: usize) -> std::io::Result<()> {
        self.0.move_cursor_down(n)
    }

    fn move_cursor_right(&self, n: usize) -> std::io::Result<()> {
        self.0.move_cursor_right(n)
    }

    fn move_cursor_left(&self, n: usize) -> std::io::Result<()> {
        self.0.move_cursor_left(n)
    }

    fn write_line(&self, text: &str) -> std::io::Result<()> {
        self.0.write_line(text)
    }

    fn write_str(&self, text: &str) -> std::io::Result<()> {
        self.0.write_str(text)
    }

    fn clear_line(&self) -> std::io::Result<()> {
        self.0.clear_line()
    }

    fn flush(&self) -> std::io::Result<()> {
        self.0.write_str("\r")?;
        self.0.flush()
    }
}

/// Characters that a line of the terminal holds.
fn columns() -> usize {
    usize::from(Term::stderr().size().1)
}

/// `text`, or as much of its end as `room` characters hold: what changes stands there.
fn shortened(text: &str, room: usize) -> String {
    match text.chars().count().checked_sub(room) {
        None | Some(0) => text.into(),
        Some(more) => format!("…{}", text.chars().skip(more + 1).collect::<String>()),
    }
}

/// The first of `parts` that fit into `room` characters together, each with two blanks before it; empty ones are none.
fn fitting(parts: &[String], mut room: usize) -> String {
    let fits = |part: &&String| {
        let left = room.checked_sub(part.chars().count() + 2);
        room = left.unwrap_or(0);
        left.is_some()
    };
    parts.iter().filter(|part| !part.is_empty()).take_while(fits).map(|part| format!("  {part}")).collect()
}

/// A time span in few characters: `12 s`, `4 min`, `2.5 h`.
fn brief(span: Duration) -> String {
    match span.as_secs() {
        s @ 0..60 => format!("{s} s"),
        s @ 60..6000 => format!("{} min", s.div_ceil(60)),
        _ => format!("{:.1} h", span.as_secs_f64() / 3600.0),
    }
}

/// A number of things for people: `1 image`, `2 images`.
pub fn count(n: usize, thing: &str) -> String {
    format!("{n} {thing}{}", if n == 1 { "" } else { "s" })
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
    fn what_does_not_fit_is_left_out() {
        let parts = ["4 min left", "", "Dice 0.9", "1 image/s"].map(String::from);
        let all = "  4 min left  Dice 0.9  1 image/s";
        assert_eq!(fitting(&parts, all.len()), all);
        assert_eq!(fitting(&parts, all.len() - 1), "  4 min left  Dice 0.9");
        assert_eq!(fitting(&parts, 12), "  4 min left");
        assert_eq!(fitting(&parts, 11), "");
        assert_eq!(shortened("a run epoch 1/2", 15), "a run epoch 1/2");
        assert_eq!(shortened("a run epoch 1/2", 10), "…epoch 1/2");
        assert_eq!((shortened("ab", 0), shortened("", 0)), ("…".into(), String::new()));
    }

    #[test]
    fn counts_and_brief_spans_read_well() {
        assert_eq!([0, 1, 2].map(|n| count(n, "image")), ["0 images", "1 image", "2 images"]);
        let spans = [(59, "59 s"), (60, "1 min"), (5999, "100 min"), (6000, "1.7 h"), (360_000, "100.0 h")];
        for (seconds, text) in spans {
            assert_eq!(brief(Duration::from_secs(seconds)), text);
        }
    }

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
