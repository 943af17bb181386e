//! Which device a model runs on.

use std::sync::Arc;

use super::cuda::{Cuda, Driver};
use crate::Result;

/// What the user asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// The first GPU, if it can be used, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU of this number.
    Cuda(usize),
}

/// Where models run.
#[derive(Clone)]
pub enum Place {
    /// On the CPU, in f32.
    Cpu,
    /// On a GPU, in bf16 with f32 parameters.
    Gpu(Arc<Driver>),
}

impl Place {
    /// Opens what `choice` names. With [`Choice::Auto`] a GPU that cannot be used is passed over; the second value says why.
    ///
    /// # Errors
    /// [`crate::error::Kind::Device`] when a GPU is asked for and cannot be used, with the remedy.
    pub fn open(choice: Choice) -> Result<(Self, Option<String>)> {
        let gpu = |number| Driver::open(number).map(|driver| Self::Gpu(Arc::new(driver)));
        match choice {
            Choice::Cpu => Ok((Self::Cpu, None)),
            Choice::Cuda(number) => Ok((gpu(number)?, None)),
            Choice::Auto => Ok(gpu(0).map_or_else(|e| (Self::Cpu, Some(e.to_string())), |place| (place, None))),
        }
    }

    /// The device in words: `cpu`, or the GPU's name.
    ///
    /// # Errors
    /// When the driver does not say.
    pub fn name(&self) -> Result<String> {
        match self {
            Self::Cpu => Ok("cpu".into()),
            Self::Gpu(driver) => Ok(driver.describe()?.name),
        }
    }
}

/// A backend on a GPU that may be shared.
pub type Gpu = Cuda<Arc<Driver>>;
