//! Memory for an operation: what goes no further than the second-level cache, and packed weights, keys and values.

use std::cell::RefCell;

use super::Real;
use super::buffer::LINE;
use crate::backend::Grid;

/// Tokens of a strip, where a line has no more.
const TOKENS: usize = 256;

/// Lines of a strip: at most half a picture, so that there is something to divide. It does not depend on the threads, since the size
/// of a product may decide in which order it is summed.
pub(super) fn strip(grid: Grid) -> usize {
    (TOKENS / grid.width).clamp(1, grid.height.div_ceil(2))
}

thread_local! {
    /// Rooms of this thread that nobody is in, kept from call to call, as raw 8-byte words so that one store serves every number
    /// type. There are as many as calls stand within one another; the last serves the outermost.
    static ROOMS: RefCell<Vec<Vec<u64>>> = const { RefCell::new(Vec::new()) };
}

/// Calls `work` with rooms for so many numbers each, which begin at cache lines and hold whatever was left there. They live as
/// long as the thread.
pub(super) fn with_room<T: Real, R, const N: usize>(lens: [usize; N], work: impl FnOnce([&mut [T]; N]) -> R) -> R {
    let line = LINE / size_of::<T>();
    let whole = lens.map(|len| len.next_multiple_of(line));
    let needed = (whole.iter().sum::<usize>() + line) * size_of::<T>() / size_of::<u64>();
    let mut words = ROOMS.with_borrow_mut(Vec::pop).unwrap_or_default();
    if words.len() < needed {
        words.resize(needed, 0);
    }
    let numbers: &mut [T] = bytemuck::cast_slice_mut(&mut words);
    let start = numbers.as_ptr().align_offset(LINE).min(line);
    let mut rest = &mut numbers[start..];
    let result = work(std::array::from_fn(|i| {
        let (room, others) = std::mem::take(&mut rest).split_at_mut(whole[i]);
        rest = others;
        &mut room[..lens[i]]
    }));
    ROOMS.with_borrow_mut(|rooms| rooms.push(words));
    result
}

/// The first `len` numbers, which are left out from then on.
pub(super) fn take<'a, T>(rest: &mut &'a mut [T], len: usize) -> &'a mut [T] {
    let (first, others) = std::mem::take(rest).split_at_mut(len);
    *rest = others;
    first
}
