//! Which device a model runs on.

use std::sync::Arc;

use super::cuda::{Arena, Cuda, Driver, Dry, Joint, Pictures};
use super::{Memory, Sample};
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
    Gpu(GpuPlace),
}

/// A GPU, with a dataset that may stay on it.
#[derive(Clone)]
pub struct GpuPlace {
    /// The GPU.
    pub driver: Arc<Driver>,
    pictures: Option<Arc<Pictures>>,
    /// Bytes that a run may take beside the dataset, if not all that is free.
    limit: Option<usize>,
    /// An operation to do in parts though there is a kernel for all of it.
    pub(crate) apart: Option<Joint>,
}

/// Memory that a run may take beside its dataset.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// Bytes.
    pub bytes: usize,
    /// Whether more is there, but the user allows no more.
    pub limited: bool,
}

/// Bytes that a run leaves free: a driver loads code when it is first used, and keeps graphs.
const LEFT_FREE: usize = 256 << 20;

/// A backend on a GPU.
pub type Gpu = Cuda<Arena<Arc<Driver>>>;

impl Place {
    /// Opens what `choice` names. With [`Choice::Auto`] a GPU that cannot be used is passed over; the second value says why.
    ///
    /// # Errors
    /// [`crate::error::Kind::Device`] when a GPU is asked for and cannot be used, with the remedy.
    pub fn open(choice: Choice) -> Result<(Self, Option<String>)> {
        let gpu = |number| {
            let driver = Arc::new(Driver::open(number)?);
            Ok(Self::Gpu(GpuPlace { driver, pictures: None, limit: None, apart: None }))
        };
        match choice {
            Choice::Cpu => Ok((Self::Cpu, None)),
            Choice::Cuda(number) => Ok((gpu(number)?, None)),
            Choice::Auto => Ok(match gpu(0) {
                Ok(place) => (place, None),
                Err(error) => (Self::Cpu, Some(error.to_string())),
            }),
        }
    }

    /// The kind of device: `cpu`, or the GPU's name. Devices of one kind give the same bits.
    pub fn kind(&self) -> &str {
        match self {
            Self::Cpu => "cpu",
            Self::Gpu(gpu) => gpu.driver.name(),
        }
    }

    /// Bounds the device memory that a run takes beside the dataset; the CPU's is not bounded.
    pub fn limit_memory(&mut self, bytes: usize) {
        if let Self::Gpu(gpu) = self {
            gpu.limit = Some(bytes);
        }
    }

    /// Does an operation's parts one by one from now on, though a GPU has a kernel for all of it; none means no such operation.
    pub fn take_apart(&mut self, apart: Option<Joint>) {
        if let Self::Gpu(gpu) = self {
            gpu.apart = apart;
        }
    }

    /// Copies a dataset to the device, to stay there for all runs, unless that would take more than half of what is free
    /// (batches are then brought as they come). `samples` are all its pictures of `size`², in order. Returns whether it stays.
    ///
    /// # Errors
    /// When the device fails.
    pub fn hold(&mut self, samples: &[Sample<'_>], size: usize) -> Result<bool> {
        let Self::Gpu(gpu) = self else { return Ok(false) };
        if Pictures::bytes(samples.len(), size) > gpu.driver.free_memory()? / 2 {
            return Ok(false);
        }
        gpu.pictures = Some(Arc::new(Pictures::new(&gpu.driver, samples, size)?));
        Ok(true)
    }
}

impl GpuPlace {
    /// What a run may take.
    ///
    /// # Errors
    /// When the device fails.
    pub fn room(&self) -> Result<Room> {
        let free = self.driver.free_memory()?.saturating_sub(LEFT_FREE);
        Ok(match self.limit {
            Some(bytes) if bytes < free => Room { bytes, limited: true },
            _ => Room { bytes: free, limited: false },
        })
    }

    /// A backend with one block of memory for everything that the work planned in `dry` allocates.
    ///
    /// # Errors
    /// When there is not so much.
    pub fn backend(&self, dry: &Cuda<Dry>) -> Result<Gpu> {
        let arena = Arena::new(Arc::clone(&self.driver), dry.device().bytes())?;
        let backend = Cuda::new(arena).with_pictures(self.pictures.clone());
        let backend = backend.saving_memory(!dry.remembers()).taking_apart(dry.apart());
        backend.reserve(dry.rooms());
        Ok(backend)
    }
}
