//! The CUDA backend: every operation as a launch of a kernel of `kernels/`, or as a matrix product.
//!
//! [`Cuda`] implements the operations over a [`Device`], which allocates, copies, launches kernels by name and multiplies
//! matrices. One device is a GPU; the tests bring another that runs the same kernels, compiled for the CPU, so that
//! launch geometry, argument order and kernels are all exercised on machines without a GPU.
//!
//! A device works asynchronously and operations return nothing, so the first failure is kept, everything after it is
//! skipped, and [`Cuda::check`] reports it.

mod arena;
mod attention;
mod attention_branch;
mod attention_input;
mod attention_output;
mod convolution;
mod depthwise;
mod device;
mod driver;
mod dry;
mod graphs;
mod head;
mod joint;
mod layer_norm;
mod linear;
mod loss;
mod matrix;
mod memory;
mod mix_ffn;
mod mix_ffn_backward;
mod optimizer;
mod patches;
mod pictures;
mod residual;
mod resize;
mod ring;
mod self_test;
mod tables;

pub use arena::Arena;
pub use device::{Argument, Device, Element, MatrixProduct};
pub use driver::{Description, DeviceMemory, Driver, Spent};
pub use dry::{Dry, Work};
pub use joint::Joint;
pub use memory::{Array, Cuda};
pub use pictures::Pictures;
pub use self_test::self_test;
