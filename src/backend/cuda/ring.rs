//! Page-locked host memory through which everything goes to a device: copies from it need not wait for the device.

use crate::Result;

/// Bytes of a block.
const BLOCK: usize = 1 << 20;
/// Blocks for which nobody need ask.
const FEW: usize = 4;

/// What a ring needs of a device, which does what it is asked for in order, but later.
pub(super) trait Side {
    /// Page-locked memory.
    type Room: AsMut<[u8]>;
    /// A mark behind what was asked for so far.
    type Mark;

    /// Page-locked memory of so many bytes.
    fn lock_memory(&self, bytes: usize) -> Result<Self::Room>;
    /// Copies to an address on the device.
    ///
    /// # Safety
    /// `from` must stay as it is until the copy is done, `to` lie in a living block with so many bytes.
    unsafe fn copy(&self, from: &[u8], to: u64) -> Result<()>;
    /// Sets a mark.
    fn mark(&self) -> Result<Self::Mark>;
    /// Whether everything before a mark is done.
    fn is_done(&self, mark: &Self::Mark) -> Result<bool>;
    /// Waits until everything before a mark is done.
    fn wait(&self, mark: &Self::Mark) -> Result<()>;
}

struct Block<S: Side> {
    room: S::Room,
    /// Behind the last copy from it.
    copied: Option<S::Mark>,
}

/// Blocks of page-locked memory, used one after the other. A block is used again when the copies from it are done; while they
/// are not, another is made, up to a limit, and beyond that the host waits.
pub(super) struct Ring<S: Side> {
    blocks: Vec<Block<S>>,
    /// The block in use, and how much of it was.
    current: usize,
    used: usize,
    limit: usize,
}

impl<S: Side> Ring<S> {
    /// A ring without memory.
    pub fn new() -> Self {
        Self { blocks: Vec::new(), current: 0, used: BLOCK, limit: FEW }
    }

    /// Allows for so many bytes at a time, while as many are on their way.
    pub fn expect(&mut self, bytes: usize) {
        self.limit = self.limit.max(2 * bytes.div_ceil(BLOCK) + 1);
    }

    /// Copies to the device; `from` may change afterwards.
    ///
    /// # Errors
    /// When the device fails, or there is no page-locked memory at all.
    ///
    /// # Safety
    /// `to` must lie in a living block that has `from.len()` bytes there.
    pub unsafe fn write(&mut self, side: &S, mut from: &[u8], mut to: u64) -> Result<()> {
        while !from.is_empty() {
            if self.used == BLOCK {
                self.turn(side)?;
            }
            let room = self.blocks[self.current].room.as_mut();
            let n = from.len().min(BLOCK - self.used);
            let room = &mut room[self.used..][..n];
            room.copy_from_slice(&from[..n]);
            // SAFETY: this part of the block is not written again before a mark behind the copy is reached; the rest is
            // the caller's.
            unsafe { side.copy(room, to)? };
            self.used += n;
            from = &from[n..];
            to += n as u64;
        }
        Ok(())
    }

    /// Goes on to a block from which nothing is being copied.
    fn turn(&mut self, side: &S) -> Result<()> {
        if let Some(block) = self.blocks.get_mut(self.current) {
            block.copied = Some(side.mark()?);
        }
        let next = if self.blocks.is_empty() { 0 } else { (self.current + 1) % self.blocks.len() };
        let oldest = self.blocks.get(next).and_then(|block| block.copied.as_ref());
        let free = match oldest {
            Some(mark) => side.is_done(mark)?,
            None => false,
        };
        if free || !self.grow(side)? {
            if let Some(mark) = self.blocks[next].copied.take() {
                side.wait(&mark)?;
            }
            self.current = next;
        }
        self.used = 0;
        Ok(())
    }

    /// Puts a new block behind the one in use, if one may and can be had.
    fn grow(&mut self, side: &S) -> Result<bool> {
        if self.blocks.len() >= self.limit {
            return Ok(false);
        }
        match side.lock_memory(BLOCK) {
            Ok(room) => {
                self.current = if self.blocks.is_empty() { 0 } else { self.current + 1 };
                self.blocks.insert(self.current, Block { room, copied: None });
                Ok(true)
            }
            Err(error) if self.blocks.is_empty() => Err(error),
            // What there is suffices, with more waiting.
            Err(_) => {
                self.limit = self.blocks.len();
                Ok(false)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::collections::VecDeque;

    use super::*;
    use crate::Error;
    use crate::error::Kind;

    /// A device that does nothing before it is waited for.
    struct Lazy {
        memory: RefCell<Vec<u8>>,
        /// Copies still to do: from, bytes, to.
        queue: RefCell<VecDeque<(*const u8, usize, u64)>>,
        asked: Cell<usize>,
        done: Cell<usize>,
        waits: Cell<usize>,
        /// Blocks it may still lock, and has.
        lockable: Cell<usize>,
        locked: Cell<usize>,
    }

    impl Lazy {
        fn new(bytes: usize, lockable: usize) -> Self {
            let [asked, done, waits, locked] = [const { Cell::new(0) }; 4];
            let (memory, queue) = (RefCell::new(vec![0; bytes]), RefCell::default());
            Self { memory, queue, asked, done, waits, lockable: Cell::new(lockable), locked }
        }

        fn catch_up(&self, until: usize) {
            while self.done.get() < until {
                let (from, bytes, to) = self.queue.borrow_mut().pop_front().expect("asked for");
                // SAFETY: as `copy` was promised.
                let from = unsafe { std::slice::from_raw_parts(from, bytes) };
                self.memory.borrow_mut()[to as usize..][..bytes].copy_from_slice(from);
                self.done.set(self.done.get() + 1);
            }
        }
    }

    impl Side for Lazy {
        type Room = Box<[u8]>;
        type Mark = usize;

        fn lock_memory(&self, bytes: usize) -> Result<Box<[u8]>> {
            if self.locked.get() == self.lockable.get() {
                return Err(Error::new(Kind::Device, "no more"));
            }
            self.locked.set(self.locked.get() + 1);
            Ok(vec![0; bytes].into())
        }

        unsafe fn copy(&self, from: &[u8], to: u64) -> Result<()> {
            self.queue.borrow_mut().push_back((from.as_ptr(), from.len(), to));
            self.asked.set(self.asked.get() + 1);
            Ok(())
        }

        fn mark(&self) -> Result<usize> {
            Ok(self.asked.get())
        }

        fn is_done(&self, mark: &usize) -> Result<bool> {
            Ok(self.done.get() >= *mark)
        }

        fn wait(&self, mark: &usize) -> Result<()> {
            if self.done.get() < *mark {
                self.waits.set(self.waits.get() + 1);
                self.catch_up(*mark);
            }
            Ok(())
        }
    }

    /// Writes pieces of odd sizes one behind the other, `bytes` in all; the device keeps up to `behind` copies behind.
    fn write(side: &Lazy, ring: &mut Ring<Lazy>, bytes: usize, behind: usize) {
        let data: Vec<u8> = (0..bytes).map(|i| (i * 31 + i / 997) as u8).collect();
        let (mut at, mut piece) = (0, 0);
        while at < bytes {
            piece += 1;
            let n = [1, 17_000, 786_432, 3 * BLOCK + 5, 262_144][piece % 5].min(bytes - at);
            // From a room that changes right after.
            let mut from = data[at..at + n].to_vec();
            // SAFETY: the memory has room for everything.
            unsafe { ring.write(side, &from, at as u64) }.expect("no failure");
            from.fill(0xee);
            side.catch_up(side.asked.get().saturating_sub(behind));
            at += n;
        }
        side.catch_up(side.asked.get());
        assert!(side.memory.borrow()[..bytes] == data, "{bytes} bytes, {behind} behind");
    }

    #[test]
    fn nothing_is_written_over_before_it_was_copied() {
        for behind in [0, 1, 3, usize::MAX] {
            let bytes = 23 * BLOCK + 12_345;
            let side = Lazy::new(bytes, usize::MAX);
            let mut ring = Ring::new();
            write(&side, &mut ring, bytes, behind);
            assert!(side.locked.get() <= FEW, "{} blocks", side.locked.get());
        }
    }

    #[test]
    fn two_batches_fit_without_waiting() {
        let batch = 6 * BLOCK + 7;
        let side = Lazy::new(2 * batch, usize::MAX);
        let mut ring = Ring::new();
        ring.expect(batch);
        write(&side, &mut ring, 2 * batch, usize::MAX);
        assert_eq!(side.waits.get(), 0);
        let locked = side.locked.get();
        assert!(locked <= 2 * 7 + 1, "{locked} blocks");
        // What is free is used again before more is locked.
        write(&side, &mut ring, 2 * batch, 0);
        assert_eq!(side.locked.get(), locked);
    }

    #[test]
    fn little_page_locked_memory_is_enough() {
        for lockable in [1, 2] {
            let side = Lazy::new(9 * BLOCK, lockable);
            let mut ring = Ring::new();
            ring.expect(3 * BLOCK);
            write(&side, &mut ring, 9 * BLOCK, usize::MAX);
            assert_eq!(side.locked.get(), lockable);
        }
        let error = unsafe { Ring::new().write(&Lazy::new(1, 0), &[1], 0) };
        assert_eq!(error.expect_err("none at all").kind, Kind::Device);
    }
}
