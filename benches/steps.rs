//! Training steps and evaluation of SegFormer-B0 on all threads (RAYON_NUM_THREADS), images per second.
//!
//! `cargo bench --bench steps -- 512` runs those whose name contains a word.
#![allow(missing_docs)]

use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use segpeft_native::backend::Place;
use segpeft_native::train::{StepKind, measure_step};

fn steps(c: &mut Criterion) {
    let mut group = c.benchmark_group("step");
    for (name, kind) in [("fft", StepKind::Fft), ("lora", StepKind::Lora), ("eval", StepKind::Eval)] {
        for (size, batch) in [(128, 8), (256, 4), (512, 1), (512, 4), (1024, 2)] {
            group.throughput(Throughput::Elements(batch as u64));
            group.bench_function(format!("{name} {size}x{size} batch {batch}"), |t| {
                t.iter_custom(|n| {
                    let measured = measure_step(&Place::Cpu, kind, size, batch, n as usize).expect("threads");
                    Duration::from_secs_f64(measured.seconds.iter().sum())
                });
            });
        }
    }
}

fn quick() -> Criterion {
    Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_secs(1))
}

criterion_group! {
    name = benches;
    config = quick();
    targets = steps
}
criterion_main!(benches);
