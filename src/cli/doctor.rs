//! `doctor`: what this machine and this build can do.

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::args::DeviceArgs;
use super::{Context, args, output};
use crate::backend::Place;
use crate::backend::cpu::simd_level;
use crate::backend::cuda::{self, Cuda, Driver};
use crate::error::Result;
use crate::system::{available_memory, proc_bytes};
use crate::train::{self, StepKind};

/// Say what this machine and this build can do, or time training steps
#[derive(Args)]
#[command(after_help = "\
Examples:
  segpeft-native doctor
  segpeft-native doctor --step lora --size 512 --batch-size 4 --steps 5 --json")]
pub struct Doctor {
    /// Time steps on made-up images: fft or lora (forward, backward, update; B0) or eval (forward, metrics)
    #[arg(long, value_enum, value_name = "KIND", hide_possible_values = true)]
    step: Option<Step>,
    /// Side of the images, a multiple of 32
    #[arg(long, value_name = "PIXELS", default_value = "512", value_parser = args::size, requires = "step")]
    size: usize,
    /// Images per step
    #[arg(long, value_name = "IMAGES", default_value = "4", value_parser = args::images, requires = "step")]
    batch_size: usize,
    /// Steps to time, after one that is not counted
    #[arg(long, value_name = "N", default_value = "5", value_parser = args::count, requires = "step")]
    steps: usize,
    /// On a GPU: run the steps once more and say how long each kernel and product took
    #[arg(long, requires = "step")]
    profile: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

#[derive(Clone, Copy, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Step {
    Fft,
    Lora,
    Eval,
}

#[derive(Serialize)]
struct Machine {
    version: &'static str,
    target: String,
    optimised_build: bool,
    cores: usize,
    threads: usize,
    vector_code: &'static str,
    memory_bytes: Option<u64>,
    memory_available_bytes: Option<u64>,
    cuda_backend: bool,
    nvidia_gpus: usize,
    notes: Vec<String>,
}

#[derive(Serialize)]
struct Timing {
    step: Step,
    size: usize,
    batch_size: usize,
    threads: usize,
    seconds: Vec<f64>,
    median_seconds: f64,
    images_per_second: f64,
    peak_rss_bytes: Option<u64>,
}

impl Doctor {
    pub fn run(&self, context: &Context) -> Result<()> {
        match self.step {
            Some(step) => self.time(step, context),
            None => {
                let machine = Machine::look();
                context.result(&machine, || machine.text())
            }
        }
    }

    fn time(&self, step: Step, context: &Context) -> Result<()> {
        let kind = match step {
            Step::Fft => StepKind::Fft,
            Step::Lora => StepKind::Lora,
            Step::Eval => StepKind::Eval,
        };
        let place = self.device.open(&context.progress)?;
        let seconds = train::measure_step(&place, kind, self.size, self.batch_size, self.steps)?;
        if let (true, Place::Gpu(driver)) = (self.profile, &place) {
            driver.start_profile();
            train::measure_step(&place, kind, self.size, self.batch_size, self.steps)?;
            for spent in driver.end_profile()? {
                let each = 1e6 * spent.seconds / spent.calls as f64;
                eprintln!("{:>9.3} ms {:>6} x {each:>9.1} us  {}", 1e3 * spent.seconds, spent.calls, spent.name);
            }
        }
        let mut sorted = seconds.clone();
        sorted.sort_by(f64::total_cmp);
        let median_seconds = sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN);
        let timing = Timing {
            step,
            size: self.size,
            batch_size: self.batch_size,
            threads: rayon::current_num_threads(),
            images_per_second: self.batch_size as f64 / median_seconds,
            median_seconds,
            seconds,
            peak_rss_bytes: proc_bytes("/proc/self/status", "VmHWM:"),
        };
        context.result(&timing, || {
            output::fields(&[
                ("median step", format!("{:.3} s", timing.median_seconds)),
                ("images/s", format!("{:.2}", timing.images_per_second)),
                ("peak memory", gigabytes(timing.peak_rss_bytes)),
                ("threads", timing.threads.to_string()),
            ])
        })
    }
}

impl Machine {
    fn look() -> Self {
        let nvidia_gpus = args::nvidia_gpus();
        let optimised_build = !cfg!(debug_assertions);
        let vector_code = simd_level();
        let mut notes = Vec::new();
        let gpu = Driver::open(0).and_then(|driver| {
            let description = driver.describe()?;
            cuda::self_test(&Cuda::new(driver))?;
            Ok(description)
        });
        match &gpu {
            Ok(gpu) => notes.push(format!(
                "GPU 0 ({}, compute capability {}.{}, {:.1} of {:.1} GB free, cuBLASLt {}) passes its self-test, but \
                 training runs on the CPU so far",
                gpu.name,
                gpu.capability.0,
                gpu.capability.1,
                gpu.memory.0 as f64 / 1e9,
                gpu.memory.1 as f64 / 1e9,
                gpu.cublas
            )),
            Err(error) => notes.push(format!("no GPU in use: {error}")),
        }
        if nvidia_gpus == 0 {
            notes.push("on a CPU, try `ablate --demo`, or --size 128 and fewer epochs".into());
        }
        if !optimised_build {
            notes.push("this is a debug build, many times slower: build with `cargo build --release`".into());
        }
        if cfg!(target_arch = "x86_64") && !vector_code.starts_with("AVX") {
            notes.push("this processor has no AVX2: training will be slow".into());
        }
        Self {
            version: env!("CARGO_PKG_VERSION"),
            target: format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS),
            optimised_build,
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            threads: rayon::current_num_threads(),
            vector_code,
            memory_bytes: proc_bytes("/proc/meminfo", "MemTotal:"),
            memory_available_bytes: available_memory(),
            cuda_backend: gpu.is_ok(),
            nvidia_gpus,
            notes,
        }
    }

    fn text(&self) -> String {
        let build = if self.optimised_build { "optimised" } else { "debug" };
        let available = gigabytes(self.memory_available_bytes);
        let mut text = output::fields(&[
            ("version", format!("{} ({}, {build})", self.version, self.target)),
            ("cores", self.cores.to_string()),
            ("threads", format!("{} (--threads N to change)", self.threads)),
            ("vector code", self.vector_code.into()),
            ("memory", format!("{}, {available} available", gigabytes(self.memory_bytes))),
            ("CUDA backend", if self.cuda_backend { "works" } else { "not usable, see below" }.into()),
            ("NVIDIA GPUs", self.nvidia_gpus.to_string()),
        ]);
        for note in &self.notes {
            text += &format!("note: {note}\n");
        }
        text
    }
}

fn gigabytes(bytes: Option<u64>) -> String {
    bytes.map_or("unknown".into(), |bytes| format!("{:.1} GB", bytes as f64 / 1e9))
}
