//! The CUDA backend against the CPU backend: on the CPU, where its kernels are compiled by the C++ compiler; or, with
//! SEGPEFT_TEST_GPU=N, on GPU number N.
#![allow(missing_docs)]

#[path = "../common/mod.rs"]
mod common;
mod graphs;
mod host;
mod operations;
mod planted;
mod step;

use std::sync::{Arc, OnceLock};

use segpeft_native::backend::cuda::Driver;

/// The GPU that SEGPEFT_TEST_GPU names, if it does.
pub fn gpu() -> Option<&'static Arc<Driver>> {
    static GPU: OnceLock<Option<Arc<Driver>>> = OnceLock::new();
    let open = || {
        let number = std::env::var("SEGPEFT_TEST_GPU").ok()?.parse().expect("SEGPEFT_TEST_GPU is the number of a GPU");
        Some(Arc::new(Driver::open(number).unwrap_or_else(|e| panic!("{e}"))))
    };
    GPU.get_or_init(open).as_ref()
}
