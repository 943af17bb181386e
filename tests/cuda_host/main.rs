//! The CUDA backend on the CPU: its kernels, compiled by the C++ compiler, against the CPU backend.
#![allow(missing_docs)]

#[path = "../common/mod.rs"]
mod common;
mod host;
mod operations;
mod planted;
mod step;
