//! What the operating system says of this machine.

use crate::error::{Error, Kind, Result};
use crate::progress::{byte_size, count};

/// A field of a file such as `/proc/meminfo`, which counts in kB. None on systems without such files.
pub(crate) fn proc_bytes(file: &str, field: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(field))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

/// Memory that can still be had, in bytes, where the system tells.
pub(crate) fn available_memory() -> Option<u64> {
    proc_bytes("/proc/meminfo", "MemAvailable:")
}

/// Refuses work whose buffers, `planned` bytes that nothing has touched yet, will not fit: the system would end the
/// program in the middle of it without a word. `remedy` names the options whose lower values need less.
///
/// # Errors
/// [`Kind::Device`] with both figures.
pub(crate) fn check_memory(planned: usize, batch: usize, size: usize, remedy: &str) -> Result<()> {
    match available_memory() {
        Some(available) if planned as u64 > available => Err(Error::new(
            Kind::Device,
            format!(
                "batches of {} at {size} x {size} need more than {} of memory, {} are available; lower {remedy}",
                count(batch, "image"),
                byte_size(planned as u64),
                byte_size(available)
            ),
        )),
        _ => Ok(()),
    }
}
