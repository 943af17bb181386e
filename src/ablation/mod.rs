//! The grid, its runner, its records.
