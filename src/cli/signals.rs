//! Ctrl-C and SIGTERM: the first asks training to stop at its next safe point, the second ends the program at once.

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;
use signal_hook::iterator::Signals;

use crate::error::{Error, Kind, Result};
use crate::progress::{Progress, interrupt_flag};

/// Installs the handlers. Only commands that ask [`crate::progress::interrupted`] may call it; for the others the
/// system's own answer, an immediate end, is the right one.
pub fn install(progress: &Progress) -> Result<()> {
    let refused = |e| Error::new(Kind::Io, format!("cannot install signal handlers: {e}"));
    for signal in [SIGINT, SIGTERM] {
        // In this order: the first signal finds the flag down and raises it, the second finds it up and exits.
        flag::register_conditional_shutdown(signal, i32::from(Kind::Interrupted as u8), interrupt_flag())
            .and_then(|_| flag::register(signal, interrupt_flag()))
            .map_err(refused)?;
    }
    let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(refused)?;
    let progress = progress.clone();
    std::thread::spawn(move || {
        if signals.forever().next().is_some() {
            progress.end_bars();
            progress.warn("stopping at the next safe point; once more to stop at once");
        }
    });
    Ok(())
}
