//! What a step of SegFormer-B0 at 512x512 asks of a GPU, counted without one, stays within what `benches/README.md` states.
#![allow(missing_docs)]

use std::collections::BTreeMap;

use segpeft_native::backend::cuda::{Joint, Work};
use segpeft_native::train::{StepKind, demand};

/// The notebook's micro-batch.
const BATCH: usize = 64;

#[test]
fn steps_move_no_more_than_stated() {
    for (kind, megabytes) in [(StepKind::Fft, 349.4), (StepKind::Lora, 289.3), (StepKind::Eval, 69.8)] {
        let demand = demand(kind, 512, BATCH, None, None).expect("fresh weights fit");
        let bytes: usize = demand.work.values().map(|work| work.bytes()).sum();
        let each = bytes as f64 / BATCH as f64 / 1e6;
        println!("{kind:?}: {each:.1} MB per image, {:.2} GB of memory", demand.plan.bytes as f64 / 1e9);
        assert!(each <= megabytes, "{kind:?}: {each:.1} MB per image");
        assert!(each > 0.9 * megabytes, "{kind:?}: {each:.1} MB per image: state the lower figure");
    }
}

#[test]
fn the_notebooks_batch_fits_eight_gigabytes() {
    for kind in [StepKind::Fft, StepKind::Lora, StepKind::Eval] {
        let memory = demand(kind, 512, BATCH, None, None).expect("fresh weights fit").plan.bytes;
        assert!(memory < 8_000_000_000, "{kind:?}: {memory} bytes");
    }
}

/// A decoder far wider than the first stage, with which a stage's contribution outgrows every matrix of tokens.
#[test]
fn a_wide_decoder_finds_room() {
    use segpeft_native::backend::Memory;
    use segpeft_native::backend::cuda::{Cuda, Dry};
    use segpeft_native::dataset::Augment;
    use segpeft_native::segformer::{Model, ModelOptions, SegformerConfig, StepRandom, Trainable};

    let hidden_sizes = vec![8, 16, 40, 64];
    let config = SegformerConfig { hidden_sizes, decoder_hidden_size: 512, ..SegformerConfig::default() };
    let (pixels, labels) = (vec![0; 64 * 64 * 3], vec![0; 64 * 64]);
    let sample =
        segpeft_native::backend::Sample { index: 0, pixels: &pixels, labels: &labels, augment: Augment::IDENTITY };
    let options = ModelOptions { size: 64, batch: 1 };
    let mut model = Model::new(Cuda::new(Dry::default()), &config, options, &Trainable::Everything);
    // Every operand is asserted to be as large as its kernel touches.
    model.train_micro_batch(&[sample], 1.0, StepRandom { seed: 0, step: 0 });
    model.backend().check().expect("a device that only counts does not fail");
}

/// Whatever a batch holds, what a run was planned with suffices: rooms that operations share do not all grow with it.
#[test]
fn the_plan_covers_smaller_batches() {
    use segpeft_native::backend::cuda::{Cuda, Dry};
    use segpeft_native::backend::{Memory, Sample};
    use segpeft_native::dataset::Augment;
    use segpeft_native::segformer::{Model, ModelOptions, SegformerConfig, StepRandom, Trainable};

    let (size, batch) = (512, 59);
    let plan = demand(StepKind::Fft, size, batch, None, None).expect("fits");
    let backend = Cuda::new(Dry::default());
    backend.reserve(plan.rooms);
    let config = SegformerConfig::default();
    let mut model = Model::new(backend, &config, ModelOptions { size, batch }, &Trainable::Everything);
    let (pixels, labels) = (vec![0; size * size * 3], vec![0; size * size]);
    let sample = |index| Sample { index, pixels: &pixels, labels: &labels, augment: Augment::IDENTITY };
    let samples: Vec<Sample<'_>> = (0..batch).map(sample).collect();
    for images in (1..=batch).rev() {
        model.train_micro_batch(&samples[..images], 1.0, StepRandom { seed: 0, step: 0 });
        model.evaluate(&samples[..images]);
        assert_eq!(model.backend().rooms(), plan.rooms, "a batch of {images} needs more than was planned");
    }
    model.backend().check().expect("a device that only counts does not fail");
}

/// Nothing in a step is launched by the thousand: the host must stay ahead of the device.
#[test]
fn launches_are_few() {
    let launches =
        |kind| demand(kind, 512, BATCH, None, None).expect("fits").work.values().map(|work| work.calls).sum::<usize>();
    let (full, adapters, evaluation) = (launches(StepKind::Fft), launches(StepKind::Lora), launches(StepKind::Eval));
    println!("{full}, {adapters} and {evaluation} launches");
    assert!(full <= 331 && adapters <= 207 && evaluation <= 78, "{full}, {adapters}, {evaluation}");
}

/// Each of the kernels that do several operations in one is used, and moves fewer bytes than those operations.
#[test]
fn joint_kernels_save_bytes() {
    let mut unused: Vec<Joint> = Joint::ALL.into();
    for kind in [StepKind::Fft, StepKind::Lora, StepKind::Eval] {
        let demand = |apart| demand(kind, 512, BATCH, None, apart).expect("fits").work;
        let whole = demand(None);
        let bytes = |work: &BTreeMap<String, Work>| work.values().map(Work::bytes).sum::<usize>();
        for joint in Joint::ALL {
            let apart = demand(Some(joint));
            if apart != whole {
                assert!(bytes(&apart) > bytes(&whole), "{kind:?}: {} moves more", joint.name());
                unused.retain(|&other| other != joint);
            }
        }
    }
    assert!(unused.is_empty(), "{unused:?}");
}
