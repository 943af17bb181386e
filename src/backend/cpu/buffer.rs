//! Memory of the CPU backend.

use std::ops::{Deref, DerefMut};

use super::Real;

/// Bytes of a cache line, which is also the longest vector.
pub(super) const LINE: usize = 64;

/// Numbers that begin at a cache line, so that vectors of them do not lie across two.
pub struct Buffer<T> {
    room: Vec<T>,
    start: usize,
    len: usize,
}

impl<T: Real> Buffer<T> {
    /// `len` zeros. Memory that is never written is never touched.
    pub fn zeros(len: usize) -> Self {
        let spare = LINE / size_of::<T>();
        let room = vec![T::ZERO; len + spare];
        let start = room.as_ptr().align_offset(LINE).min(spare);
        Self { room, start, len }
    }
}

impl<T: Real> From<&[T]> for Buffer<T> {
    fn from(numbers: &[T]) -> Self {
        let mut buffer = Self::zeros(numbers.len());
        buffer.copy_from_slice(numbers);
        buffer
    }
}

impl<T: Real> FromIterator<T> for Buffer<T> {
    fn from_iter<I: IntoIterator<Item = T>>(numbers: I) -> Self {
        Self::from(&numbers.into_iter().collect::<Vec<T>>()[..])
    }
}

impl<T: Real> Clone for Buffer<T> {
    fn clone(&self) -> Self {
        Self::from(&self[..])
    }
}

impl<T> Deref for Buffer<T> {
    type Target = [T];

    #[inline(always)]
    fn deref(&self) -> &[T] {
        &self.room[self.start..][..self.len]
    }
}

impl<T> DerefMut for Buffer<T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.room[self.start..][..self.len]
    }
}
