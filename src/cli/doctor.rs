//! `doctor`: what this machine and this build can do.

use clap::{Args, ValueEnum};
use serde::Serialize;
use serde_json::json;

use super::args::DeviceArgs;
use super::{Context, args, output};
use crate::backend::cpu::{has_matrix_units, simd_level};
use crate::backend::cuda::{self, Cuda, Driver, Joint, Work};
use crate::backend::{Choice, Place};
use crate::error::{Error, Result};
use crate::progress::{Progress, byte_size};
use crate::system::{available_memory, proc_bytes};
use crate::train::{self, Demand, Measured, MemoryPlan, StepKind};

/// Times that each measurement of `--apart` is taken, in turns; the middle one is told.
const ROUNDS: usize = 3;

/// Say what this machine and this build can do, or time training steps
#[derive(Args)]
#[command(after_help = "\
Examples:
  segpeft-native doctor
  segpeft-native doctor --device cuda:1
  segpeft-native doctor --step lora --size 512 --batch-size 4 --steps 5 --json
  segpeft-native doctor --step fft --batch-size 64 --device cuda --profile
  segpeft-native doctor --step fft --batch-size 64 --device cuda --eager
  segpeft-native doctor --step fft --batch-size 64 --device cuda --apart
  segpeft-native doctor --step fft --batch-size 64 --traffic --max-memory 5")]
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
    /// Steps to time, after one, or two on a GPU, that are not counted
    #[arg(long, value_name = "N", default_value = "5", value_parser = args::count, requires = "step")]
    steps: usize,
    /// On a GPU: run the steps once more and say how long each kernel and product took
    #[arg(long, requires = "step")]
    profile: bool,
    /// On a GPU: launch the steps kernel by kernel, not as CUDA graphs, to tell what those save
    #[arg(long, requires = "step")]
    eager: bool,
    /// Do not time, but say what a step asks of a GPU, within --max-memory: memory, launches, bytes moved, multiply-adds. Needs
    /// no GPU
    #[arg(long, requires = "step", conflicts_with_all = ["profile", "eager", "steps", "device"])]
    traffic: bool,
    /// Also without each of the kernels that do several operations in one: what a step takes then, in time on a GPU (in turns
    /// with the whole), or with --traffic in bytes
    #[arg(long, requires = "step")]
    apart: bool,
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
    /// Whether the GPU can be used; none where none was to be.
    cuda_backend: Option<bool>,
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
    /// The CPU, or the GPU's name.
    device: String,
    /// Memory that a run takes on a GPU, its dataset aside.
    device_bytes: Option<usize>,
    /// That, and the CPU's, in parts.
    memory: MemoryPlan,
    /// Whether products were made in the processor's matrix units, with an f32 as two bf16.
    matrix_units: bool,
    /// Whether steps were launched kernel by kernel because that was asked for.
    eager: bool,
    /// What to know of how the device worked.
    remark: Option<String>,
    profile: Vec<Share>,
    apart: Vec<Apart>,
}

/// A step without one of the kernels that do several operations in one.
#[derive(Serialize)]
struct Apart {
    /// The kernel.
    without: &'static str,
    /// Bytes that the step moves then.
    bytes: usize,
    launches: usize,
    /// Median seconds of a step, and by how much longer that is than the whole step's in the turns before; of the middle round.
    median_seconds: Option<f64>,
    ratio: Option<f64>,
}

impl Apart {
    /// A table of a step over so many images without each of the kernels; empty if there are none.
    fn table(parts: &[Self], images: usize) -> String {
        let Some(first) = parts.first() else { return String::new() };
        let times = if first.ratio.is_some() { "         ms    ratio" } else { "" };
        let header = format!("\n{:<32} {:>12} {:>8}{times}\n", "without", "MB per image", "launches");
        parts.iter().fold(header, |text, part| text + &part.text(images))
    }

    fn text(&self, images: usize) -> String {
        let times = match (self.median_seconds, self.ratio) {
            (Some(seconds), Some(ratio)) => format!(" {:>10.2} {ratio:>8.3}", 1e3 * seconds),
            _ => String::new(),
        };
        let each = self.bytes as f64 / 1e6 / images as f64;
        format!("{:<32} {each:>12.1} {:>8}{times}\n", self.without, self.launches)
    }
}

fn median(numbers: &[f64]) -> f64 {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// What one kernel at one size, or one product, took in all.
#[derive(Serialize)]
struct Share {
    name: String,
    launches: usize,
    seconds: f64,
    bytes: usize,
    multiply_adds: usize,
}

impl Share {
    fn text(&self) -> String {
        let gigabytes = self.bytes as f64 / self.seconds / 1e9;
        let operations = match self.multiply_adds {
            0 => String::new(),
            n => format!(" {:>6.1} TFLOP/s", 2.0 * n as f64 / self.seconds / 1e12),
        };
        let each = 1e6 * self.seconds / self.launches as f64;
        let total = 1e3 * self.seconds;
        format!(
            "{total:>9.3} ms {:>5} x {each:>8.1} us {gigabytes:>6.0} GB/s  {}{operations}\n",
            self.launches, self.name
        )
    }
}

/// What one kernel moves in a step.
#[derive(Serialize)]
struct Traffic {
    kernel: String,
    launches: usize,
    read_bytes: usize,
    written_bytes: usize,
    multiply_adds: usize,
}

impl Traffic {
    fn new(kernel: &str, work: &Work) -> Self {
        Self {
            kernel: kernel.into(),
            launches: work.calls,
            read_bytes: work.read,
            written_bytes: work.written,
            multiply_adds: work.multiply_adds,
        }
    }
}

impl Step {
    fn kind(self) -> StepKind {
        match self {
            Step::Fft => StepKind::Fft,
            Step::Lora => StepKind::Lora,
            Step::Eval => StepKind::Eval,
        }
    }
}

impl Doctor {
    pub fn run(&self, context: &Context) -> Result<()> {
        match self.step {
            Some(step) if self.traffic => self.traffic(step, context),
            Some(step) => self.time(step, context),
            None if self.device.max_bytes().is_some() => {
                Err(Error::usage("--max-memory bounds what a run takes; give --step too"))
            }
            None => {
                let machine = Machine::look(self.device.choice())?;
                context.result(&machine, || machine.text())
            }
        }
    }

    fn traffic(&self, step: Step, context: &Context) -> Result<()> {
        let demand = self.demand(step, None)?;
        context.progress.details(demand.plan.lines());
        let apart: Vec<Apart> = self.parts(step, &context.progress)?.into_iter().map(|(_, apart)| apart).collect();
        let mut rows: Vec<Traffic> = demand.work.iter().map(|(name, work)| Traffic::new(name, work)).collect();
        rows.sort_by_key(|row| std::cmp::Reverse(row.read_bytes + row.written_bytes));
        let total = demand.work.values().fold(Work::default(), |mut sum, work| {
            sum.add(work);
            sum
        });
        rows.push(Traffic::new("together", &total));
        let document = json!({
            "step": step, "size": self.size, "batch_size": self.batch_size, "memory_bytes": demand.plan.bytes,
            "least_memory_bytes": demand.least_memory, "memory": demand.plan, "work": rows, "apart": apart,
        });
        context.result(&document, || {
            let each = |bytes: usize| bytes as f64 / 1e6 / self.batch_size as f64;
            let mut text = output::fields(&[
                ("memory of a run, its dataset aside", taken(&demand.plan)),
                ("the least it can do with (--max-memory)", byte_size(demand.least_memory as u64)),
                ("moved per image", format!("{:.1} MB", each(total.bytes()))),
                ("multiply-adds in products, per image", format!("{:.0} million", each(total.multiply_adds))),
            ]);
            text += &format!("\n{:<32} {:>8} {:>10} {:>10}  MB per image\n", "kernel", "launches", "read", "written");
            for row in &rows {
                let (read, written) = (each(row.read_bytes), each(row.written_bytes));
                text += &format!("{:<32} {:>8} {read:>10.2} {written:>10.2}\n", row.kernel, row.launches);
            }
            text + &Apart::table(&apart, self.batch_size)
        })
    }

    fn demand(&self, step: Step, apart: Option<Joint>) -> Result<Demand> {
        train::demand(step.kind(), self.size, self.batch_size, self.device.max_bytes(), apart)
    }

    /// What the step takes without each of the joint kernels that it uses, if that is asked for. Without some of them it may not
    /// fit, or only with activations made again, which is told.
    fn parts(&self, step: Step, progress: &Progress) -> Result<Vec<(Joint, Apart)>> {
        if !self.apart {
            return Ok(Vec::new());
        }
        let Demand { work: whole, plan, .. } = self.demand(step, None)?;
        let mut parts = Vec::new();
        for joint in Joint::ALL {
            let Demand { work, plan: taken_apart, .. } = match self.demand(step, Some(joint)) {
                Ok(demand) => demand,
                Err(error) => {
                    progress.info(format!("without {}: {error}", joint.name()));
                    continue;
                }
            };
            if work == whole {
                continue;
            }
            if taken_apart.activations_made_again != plan.activations_made_again {
                progress.info(format!("without {}: fits with some activations made again", joint.name()));
            }
            let sum = |count: fn(&Work) -> usize| work.values().map(count).sum();
            let (bytes, launches) = (sum(Work::bytes), sum(|work| work.calls));
            parts.push((joint, Apart { without: joint.name(), bytes, launches, median_seconds: None, ratio: None }));
        }
        Ok(parts)
    }

    /// Times the step without each of the joint kernels, in turns with the whole.
    fn time_parts(&self, step: Step, place: &Place, progress: &Progress) -> Result<Vec<Apart>> {
        let parts = self.parts(step, progress)?;
        if parts.is_empty() {
            return Ok(Vec::new());
        }
        let bar = progress.bar("without each joint kernel", (parts.len() * ROUNDS) as u64, "measurements");
        let mut timed = Vec::new();
        for (joint, mut apart) in parts {
            let mut rounds = Vec::new();
            let times = || -> Result<(f64, f64)> {
                let [whole, without] = [None, Some(joint)].map(|apart| {
                    let mut place = place.clone();
                    place.take_apart(apart);
                    train::measure_step(&place, step.kind(), self.size, self.batch_size, self.steps)
                });
                let (whole, without) = (median(&whole?.seconds), median(&without?.seconds));
                Ok((without / whole, without))
            };
            for _ in 0..ROUNDS {
                match times() {
                    Ok(both) => rounds.push(both),
                    Err(error) => progress.info(format!("without {}: {error}", joint.name())),
                }
                bar.inc(1);
            }
            rounds.sort_by(|a, b| a.0.total_cmp(&b.0));
            if let Some(&(ratio, seconds)) = rounds.get(rounds.len() / 2) {
                (apart.ratio, apart.median_seconds) = (Some(ratio), Some(seconds));
                timed.push(apart);
            }
        }
        Ok(timed)
    }

    fn time(&self, step: Step, context: &Context) -> Result<()> {
        let kind = step.kind();
        let place = self.device.open(&context.progress)?;
        match &place {
            Place::Gpu(gpu) => gpu.driver.record_steps(!self.eager),
            Place::Cpu if self.profile => return Err(args::gpu_only("--profile")),
            Place::Cpu if self.eager => return Err(args::gpu_only("--eager")),
            Place::Cpu if self.apart => {
                return Err(Error::usage(
                    "--apart times on a GPU, and this would run on the CPU: name a GPU, or add --traffic to count bytes",
                ));
            }
            Place::Cpu => {}
        }
        let Measured { seconds, remark, plan } =
            train::measure_step(&place, kind, self.size, self.batch_size, self.steps)?;
        context.progress.details(plan.lines());
        let profile = match &place {
            Place::Gpu(gpu) if self.profile => {
                gpu.driver.start_profile();
                train::measure_step(&place, kind, self.size, self.batch_size, self.steps)?;
                gpu.driver.end_profile()?
            }
            _ => Vec::new(),
        };
        let median_seconds = median(&seconds);
        let apart = self.time_parts(step, &place, &context.progress)?;
        let timing = Timing {
            step,
            size: self.size,
            batch_size: self.batch_size,
            threads: rayon::current_num_threads(),
            images_per_second: self.batch_size as f64 / median_seconds,
            median_seconds,
            seconds,
            peak_rss_bytes: proc_bytes("/proc/self/status", "VmHWM:"),
            device: place.kind().into(),
            device_bytes: matches!(place, Place::Gpu(_)).then_some(plan.bytes),
            memory: plan,
            matrix_units: matches!(step, Step::Eval) && matches!(place, Place::Cpu) && has_matrix_units(),
            eager: self.eager,
            remark,
            profile: (profile.into_iter())
                .map(|spent| Share {
                    name: spent.name,
                    launches: spent.work.calls,
                    seconds: spent.seconds,
                    bytes: spent.work.bytes(),
                    multiply_adds: spent.work.multiply_adds,
                })
                .collect(),
            apart,
        };
        context.result(&timing, || {
            let mut fields = vec![
                ("device", timing.device.clone()),
                ("median step", format!("{:.4} s", timing.median_seconds)),
                ("images/s", format!("{:.2}", timing.images_per_second)),
            ];
            fields.push(match timing.device_bytes {
                Some(_) => ("device memory", taken(&timing.memory)),
                None => ("peak memory", known(timing.peak_rss_bytes)),
            });
            fields.push(("threads", timing.threads.to_string()));
            fields.extend(timing.remark.clone().map(|remark| ("note", remark)));
            let profile: String = timing.profile.iter().map(Share::text).collect();
            output::fields(&fields) + &profile + &Apart::table(&timing.apart, self.batch_size)
        })
    }
}

impl Machine {
    /// Looks at the machine and the GPU that `choice` names, the first if it names none.
    ///
    /// # Errors
    /// When a GPU is named that cannot be used.
    fn look(choice: Choice) -> Result<Self> {
        let nvidia_gpus = args::nvidia_gpus();
        let optimised_build = !cfg!(debug_assertions);
        let vector_code = simd_level();
        let mut notes = Vec::new();
        let number = match choice {
            Choice::Cpu => None,
            Choice::Auto => Some(0),
            Choice::Cuda(number) => Some(number),
        };
        let gpu = number.map(try_gpu);
        let cuda_backend = gpu.as_ref().map(Result::is_ok);
        match gpu {
            None => {}
            Some(Ok(note)) => notes.push(note),
            Some(Err(error)) if choice != Choice::Auto => return Err(error),
            Some(Err(error)) => notes.push(format!("no GPU in use: {error}")),
        }
        if cuda_backend != Some(true) {
            notes.push("on a CPU, try `ablate --demo`, or --size 128 and fewer epochs".into());
        }
        notes.push(match has_matrix_units() {
            true => "evaluation on the CPU multiplies in matrix units (AMX); SEGPEFT_AMX=0 makes it use vectors".into(),
            false => "evaluation on the CPU multiplies in vectors, without matrix units (AMX)".into(),
        });
        if !optimised_build {
            notes.push("this is a debug build, many times slower: build with `cargo build --release`".into());
        }
        if cfg!(target_arch = "x86_64") && !vector_code.starts_with("AVX") {
            notes.push("this processor has no AVX2: training will be slow".into());
        }
        Ok(Self {
            version: env!("CARGO_PKG_VERSION"),
            target: format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS),
            optimised_build,
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            threads: rayon::current_num_threads(),
            vector_code,
            memory_bytes: proc_bytes("/proc/meminfo", "MemTotal:"),
            memory_available_bytes: available_memory(),
            cuda_backend,
            nvidia_gpus,
            notes,
        })
    }

    fn text(&self) -> String {
        let build = if self.optimised_build { "optimised" } else { "debug" };
        let available = known(self.memory_available_bytes);
        let cuda = match self.cuda_backend {
            Some(true) => "works",
            Some(false) => "not usable, see below",
            None => "not looked for (--device cpu)",
        };
        let mut text = output::fields(&[
            ("version", format!("{} ({}, {build})", self.version, self.target)),
            ("cores", self.cores.to_string()),
            ("threads", format!("{} (--threads N to change)", self.threads)),
            ("vector code", self.vector_code.into()),
            ("memory", format!("{}, {available} available", known(self.memory_bytes))),
            ("CUDA backend", cuda.into()),
            ("NVIDIA GPUs", self.nvidia_gpus.to_string()),
        ]);
        for note in &self.notes {
            text += &format!("note: {note}\n");
        }
        text
    }
}

/// Opens a GPU and tests it; what it is, in words.
fn try_gpu(number: usize) -> Result<String> {
    let driver = Driver::open(number)?;
    let gpu = driver.describe()?;
    cuda::self_test(&Cuda::new(driver))?;
    Ok(format!(
        "GPU {number} ({}, compute capability {}.{}, {} of {} free, cuBLASLt {}) passes its self-test",
        gpu.name,
        gpu.capability.0,
        gpu.capability.1,
        byte_size(gpu.memory.0 as u64),
        byte_size(gpu.memory.1 as u64),
        gpu.cublas
    ))
}

fn known(bytes: Option<u64>) -> String {
    bytes.map_or("unknown".into(), byte_size)
}

/// The memory of a plan, and what was done to stay within it.
fn taken(plan: &MemoryPlan) -> String {
    let again = if plan.activations_made_again { ", some activations made again" } else { "" };
    format!("{}{again}", byte_size(plan.bytes as u64))
}
