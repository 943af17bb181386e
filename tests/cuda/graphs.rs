//! Work that is recorded and replayed leaves the bits of work that is not.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use host_kernels::Order;
use segpeft_native::backend::cuda::{self, Arena, Cuda, Device, Dry};
use segpeft_native::backend::{AdamW, Batch, Dropout, Inputs, Matrix, Memory, Patches, Residual, Sample, Window};
use segpeft_native::dataset::Augment;
use segpeft_native::error::Kind;
use segpeft_native::random::{Philox, Purpose};
use segpeft_native::segformer::{Id, Model, ModelOptions, Moments, SegformerConfig, Step, StepRandom, Trainable};

use crate::common::Pictures;
use crate::gpu;
use crate::host::{Host, Lost};
use crate::step::{adapters, config, fill, model, scaled_adapters};

/// Epochs of a history: in the first, work is done as it comes, in the second it is recorded, then replayed.
const EPOCHS: u32 = 4;
/// Pictures of an epoch: a step of whole micro-batches, and one of a smaller.
const PICTURES: usize = 5;
const BATCH: usize = 2;
/// Micro-batches of a step.
const GROUP: usize = 2;

fn bits(numbers: impl IntoIterator<Item = f32>) -> impl Iterator<Item = u64> {
    numbers.into_iter().map(|x| u64::from(x.to_bits()))
}

/// The tiny model with everything that is drawn at random, and its sizes.
fn drawing() -> (SegformerConfig, ModelOptions) {
    let (config, size) = config();
    let config = SegformerConfig { drop_path_rate: 0.2, classifier_dropout_prob: 0.1, ..config };
    (config, ModelOptions { size, batch: BATCH })
}

/// What some epochs of a model of its own leave, smaller steps being updated with other moments.
fn history<D: Device>(backend: Cuda<D>, trainable: &Trainable, pictures: &Pictures) -> (Vec<u64>, Model<Cuda<D>>) {
    let (config, options) = drawing();
    let mut model = model(backend, &config, options, trainable, None);
    let mut moments = [model.moments(), model.moments()];
    (epochs(&mut model, &mut moments, 1e-3, pictures), model)
}

/// Everything that some epochs leave, as bits: losses, norms and evaluations, then weights and moments. The last moments are
/// those of smaller steps.
fn epochs<D: Device>(
    model: &mut Model<Cuda<D>>,
    moments: &mut [Moments<Cuda<D>>],
    rate: f64,
    pictures: &Pictures,
) -> Vec<u64> {
    let decays: Vec<bool> = (0..moments[0].first.len()).map(|i| i % 2 == 0).collect();
    let (mut found, mut step) = (Vec::new(), 0);
    for epoch in 0..EPOCHS {
        let all = pictures.samples();
        let order = Philox::new(7, Purpose::Shuffle, 0, epoch).permutation(PICTURES);
        let drawn = |&i: &usize| Sample { augment: Augment::draw(7, epoch, i), ..all[i] };
        let samples: Vec<Sample<'_>> = order.iter().map(drawn).collect();
        for group in samples.chunks(BATCH).collect::<Vec<_>>().chunks(GROUP) {
            let random = StepRandom { seed: 7, step };
            step += group.len() as u32;
            let update = AdamW {
                lr: rate / f64::from(step),
                betas: [0.9, 0.999],
                epsilon: 1e-8,
                weight_decay: 0.1,
                step: step.into(),
                max_norm: 1.0,
            };
            let which = if group.len() == GROUP { 0 } else { moments.len() - 1 };
            let mut told = Vec::new();
            let whole = Step { micro_batches: group, random, update, decays: &decays };
            let tell = |images| {
                told.push(images);
                true
            };
            assert!(model.train_step(&whole, &mut moments[which], tell));
            assert_eq!(told, group.iter().map(|batch| batch.len()).collect::<Vec<_>>());
            found.push(model.gradient_norm().to_bits());
        }
        found.push(model.take_loss().to_bits());
        model.begin_evaluation();
        all.chunks(BATCH).for_each(|batch| model.measure(batch));
        let evaluated = model.end_evaluation();
        assert_eq!(evaluated.loss.len(), PICTURES);
        found.extend(evaluated.loss.iter().map(|x| x.to_bits()));
        found.extend(evaluated.counts);
        // Without labels, as in prediction.
        found.extend(bits(model.logits(&[Sample { labels: &[], ..all[epoch as usize] }]).concat()));
    }
    let backend = model.backend();
    backend.check().expect("the device works");
    for i in 0..model.plan().specs.len() {
        found.extend(bits(model.get(Id(i))));
    }
    for moment in moments.iter().flat_map(|moments| moments.first.iter().chain(&moments.second)) {
        found.extend(bits(backend.download(moment)));
    }
    found.push(model.batches_tracked());
    found
}

/// Runs one after the other on one model leave the bits of runs with models of their own, within the memory of one, and nothing
/// of their work is recorded anew; the pictures are `kept` on the device or brought.
fn take_over(what: &str, first: &Trainable, second: &Trainable, kept: bool) {
    let (config, options) = drawing();
    let pictures = &Pictures::new(0..PICTURES as u64, options.size, config.num_labels() == 3);
    // The memory of one run.
    let run = |backend: Cuda<Dry>| {
        let mut model = model(backend, &config, options, first, None);
        let moments = model.moments();
        epochs(&mut model, &mut [moments], 1e-3, pictures);
        model.backend().device().bytes()
    };
    let bytes = run(Cuda::new(Dry::default()));
    match gpu() {
        Some(driver) => {
            let held = || cuda::Pictures::new(driver, &pictures.samples(), options.size).expect("memory");
            let held = kept.then(held).map(Arc::new);
            let new = || Cuda::new(Arena::new(driver.clone(), bytes).expect("memory")).with_pictures(held.clone());
            take_over_on(what, [first, second], pictures, new, |_| None);
        }
        None => {
            let host = || Host::new(Order::Forward);
            let held = || cuda::Pictures::new(&host(), &pictures.samples(), options.size).expect("memory");
            let held = kept.then(held).map(Arc::new);
            let new = || Cuda::new(Arena::new(host(), bytes).expect("memory")).with_pictures(held.clone());
            // Two steps, two sizes of evaluations, logits; of the larger step, if pictures are brought, one micro-batch, the
            // end of the gradients, the update.
            let all = if kept { 5 } else { 7 };
            let recordings = |arena: &Arena<Host>| Some((arena.device().recordings.load(Ordering::Relaxed), all));
            take_over_on(what, [first, second], pictures, new, recordings);
        }
    }
}

fn take_over_on<D: Device>(
    what: &str,
    [first, second]: [&Trainable; 2],
    pictures: &Pictures,
    new: impl Fn() -> Cuda<D>,
    recordings: impl Fn(&D) -> Option<(usize, usize)>,
) {
    let (config, options) = drawing();
    let alone = |trainable: &Trainable, rate: f64| {
        let mut model = model(new(), &config, options, trainable, None);
        let mut moments = [model.moments()];
        let found = epochs(&mut model, &mut moments, rate, pictures);
        (found, model, moments)
    };
    let (expected, mut model, mut moments) = alone(first, 1e-3);
    let other = alone(second, 2e-3).0;
    assert!(expected != other, "{what}");
    for (trainable, rate, expected) in [(second, 2e-3, &other), (first, 1e-3, &expected), (first, 1e-3, &expected)] {
        assert!(model.renew(&mut moments[0], &config, options, trainable), "{what}: of equal shape");
        fill(&mut model, None);
        let found = epochs(&mut model, &mut moments, rate, pictures);
        assert!(found == *expected, "{what}: other bits than with a model of its own");
        if let Some((recordings, all)) = recordings(model.backend().device()) {
            assert_eq!(recordings, all, "{what}");
        }
    }

    let mut larger = first.clone();
    match &mut larger {
        Trainable::Adapters { rank, .. } => *rank += 1,
        _ => larger = Trainable::Nothing,
    }
    let dropping = SegformerConfig { drop_path_rate: 0.3, ..config.clone() };
    let fewer = ModelOptions { batch: BATCH - 1, ..options };
    for (config, options, trainable) in
        [(&config, options, &larger), (&dropping, options, first), (&config, fewer, first)]
    {
        assert!(!model.renew(&mut moments[0], config, options, trainable), "{what}: of another shape");
    }
}

#[test]
fn a_run_on_the_model_of_another_leaves_the_same_bits_full() {
    take_over("full", &Trainable::Everything, &Trainable::Everything, true);
}

#[test]
fn a_run_on_the_model_of_another_leaves_the_same_bits_merged() {
    let config = config().0;
    for kept in [false, true] {
        take_over("merged", &adapters(&config, 0.0), &scaled_adapters(&config, 0.0, 0.5), kept);
    }
}

#[test]
fn a_run_on_the_model_of_another_leaves_the_same_bits_with_dropout() {
    let config = config().0;
    take_over("separate", &adapters(&config, 0.1), &scaled_adapters(&config, 0.1, 0.5), true);
}

/// A run keeps of the one before what that one did, and nothing of those before it.
#[test]
fn recordings_of_long_ago_are_forgotten() {
    let cuda = Cuda::new(Host::new(Order::Forward));
    let mut x = cuda.full(3);
    let replays = || cuda.device().replays.load(Ordering::Relaxed);
    let mut repeat = |key| cuda.repeat(&[key], &Inputs::default(), || cuda.zero(&mut x));
    (0..3).for_each(|_| repeat(1));
    assert_eq!(replays(), 2);
    cuda.renew();
    (0..3).for_each(|_| repeat(2));
    repeat(1);
    assert_eq!(replays(), 5);
    cuda.renew();
    repeat(1);
    assert_eq!(replays(), 6);
    cuda.renew();
    repeat(2);
    assert_eq!(replays(), 6, "the run before did without it");
    cuda.check().expect("the device works");
}

fn compare(what: &str, trainable: &Trainable) {
    let (config, size) = config();
    let pictures = &Pictures::new(0..PICTURES as u64, size, config.num_labels() == 3);
    let found = match gpu() {
        Some(driver) => {
            let new = || Cuda::new(driver.clone());
            let kept = cuda::Pictures::new(driver, &pictures.samples(), size).expect("memory");
            let (brought, model) = history(new(), trainable, pictures);
            assert_eq!(model.backend().remark(), None, "{what}: the GPU records");
            let (kept, _) = history(new().with_pictures(Some(Arc::new(kept))), trainable, pictures);
            // While a profile is taken, nothing is recorded.
            driver.start_profile();
            let (eager, _) = history(new(), trainable, pictures);
            driver.end_profile().expect("the device works");
            [brought, kept, eager]
        }
        None => {
            let new = || Cuda::new(Host::new(Order::Forward));
            let kept = cuda::Pictures::new(new().device(), &pictures.samples(), size).expect("memory");
            let held = Some(Arc::new(kept));
            let [brought, kept] = [new(), new().with_pictures(held.clone())].map(|backend| {
                let (found, model) = history(backend, trainable, pictures);
                assert_eq!(model.backend().remark(), None, "{what}");
                let device = model.backend().device();
                let [replays, recordings] = [&device.replays, &device.recordings].map(|n| n.load(Ordering::Relaxed));
                (found, replays, recordings)
            });
            // In the middle of a step.
            let refusing = Cuda::new(Host::refusing(Order::Forward, 40)).with_pictures(held);
            let (eager, model) = history(refusing, trainable, pictures);
            assert!(model.backend().remark().expect("it cannot record").contains("cannot record"), "{what}");
            assert_eq!(model.backend().device().replays.load(Ordering::Relaxed), 0);
            // Replayed is all but the first of each kind.
            let once = EPOCHS as usize - 1;
            let twice = 2 * EPOCHS as usize - 1;
            // Two steps, evaluations of whole batches, twice an epoch, and of smaller ones, logits.
            assert_eq!((kept.1, kept.2), (4 * once + twice, 5), "{what}");
            // Of the larger step one micro-batch, twice a step, the end of the gradients, the update.
            assert_eq!((brought.1, brought.2), (5 * once + 2 * twice, 7), "{what}");
            [brought.0, kept.0, eager]
        }
    };
    let [brought, kept, eager] = found;
    assert!(brought == eager, "{what}: replayed steps leave other bits");
    assert!(kept == eager, "{what}: replayed steps on pictures that stay on the device leave other bits");
}

#[test]
fn a_replayed_step_leaves_the_same_bits_full() {
    compare("full", &Trainable::Everything);
}

#[test]
fn a_replayed_step_leaves_the_same_bits_merged() {
    compare("merged", &adapters(&config().0, 0.0));
}

#[test]
fn a_replayed_step_leaves_the_same_bits_with_dropout() {
    compare("separate", &adapters(&config().0, 0.1));
}

/// A step is taken as a whole if what it brings fits where a batch with its pictures does, it is not too long, and the device
/// records.
#[test]
fn steps_are_taken_as_a_whole_where_there_is_room() {
    let size = 32;
    let pictures = Pictures::new(0..17, size, false);
    let samples = pictures.samples();
    let takes = |cuda: &Cuda<Host>, batch: usize, batches: usize| {
        let parts = samples.chunks(batch).take(batches).zip(0..);
        let batches: Vec<Batch<'_>> = parts.map(|(samples, step)| Batch { samples, step }).collect();
        cuda.takes_all(&Inputs { batches: &batches, size, update: None })
    };
    let brings = Cuda::new(Host::new(Order::Forward));
    assert!(takes(&brings, 4, 1) && !takes(&brings, 4, 2));
    let held = cuda::Pictures::new(brings.device(), &samples, size).expect("memory");
    let held = Some(Arc::new(held));
    let keeps = Cuda::new(Host::new(Order::Forward)).with_pictures(held.clone());
    assert!(takes(&keeps, 4, 4) && takes(&keeps, 1, 16) && !takes(&keeps, 1, 17));
    let refusing = Cuda::new(Host::refusing(Order::Forward, 0)).with_pictures(held);
    assert!(takes(&refusing, 4, 4));
    let mut x = refusing.full(1);
    (0..2).for_each(|_| refusing.repeat(&[1], &Inputs::default(), || refusing.zero(&mut x)));
    assert!(!takes(&refusing, 4, 4));
}

/// Asked to stop behind a micro-batch, a step ends there, without an update.
#[test]
fn a_step_can_be_stopped() {
    let (config, options) = drawing();
    let pictures = Pictures::new(0..PICTURES as u64, options.size, config.num_labels() == 3);
    let mut model = model(Cuda::new(Host::new(Order::Forward)), &config, options, &Trainable::Everything, None);
    let (mut moments, samples) = (model.moments(), pictures.samples());
    let before: Vec<Vec<f32>> = (0..model.plan().stored).map(|i| model.get(Id(i))).collect();
    let update = AdamW { lr: 1.0, betas: [0.9, 0.999], epsilon: 1e-8, weight_decay: 0.1, step: 1, max_norm: 1.0 };
    let (random, decays) = (StepRandom { seed: 7, step: 0 }, vec![true; moments.first.len()]);
    let micro_batches: Vec<_> = samples.chunks(BATCH).collect();
    let step = Step { micro_batches: &micro_batches, random, update, decays: &decays };
    let mut told = Vec::new();
    let stop = |images| {
        told.push(images);
        told.len() < 2
    };
    assert!(!model.train_step(&step, &mut moments, stop));
    assert_eq!(told, [BATCH; 2]);
    let trained: Vec<Id> = model.trained().map(|(_, id)| id).collect();
    assert!(trained.iter().all(|&id| model.get(id) == before[id.0]), "an update was made");
    assert!(model.train_step(&step, &mut moments, |_| true));
    assert!(trained.iter().any(|&id| model.get(id) != before[id.0]));
}

/// A device lost while a recording is replayed is reported as one lost in the middle of other work.
#[test]
fn a_device_lost_in_a_replay_is_one_clear_error() {
    let (config, size) = config();
    let pictures = Pictures::new(0..3, size, config.num_labels() == 3);
    let lost = Lost { host: Host::new(Order::Forward), launches: AtomicUsize::new(usize::MAX) };
    let mut model = model(Cuda::new(lost), &config, ModelOptions { size, batch: 3 }, &Trainable::Everything, None);
    for step in 0..4 {
        if step == 3 {
            model.backend().device().launches.store(40, Ordering::Relaxed);
        }
        model.train_micro_batch(&pictures.samples(), 1e-3, StepRandom { seed: 3, step });
    }
    let error = model.backend().check().expect_err("it is lost");
    assert_eq!((error.kind, error.to_string()), (Kind::Device, "the device is lost".to_string()));
    assert!(model.take_loss().is_nan());
}

/// A dropout of step `step`.
fn drop_at(step: u32) -> Dropout {
    Dropout { rate: 0.5, stream: Philox::new(1, Purpose::LoraDropout, 2, step), first: 0 }
}

fn sample<'a>(pixels: &'a [u8], labels: &'a [u8]) -> Sample<'a> {
    Sample { index: 0, pixels, labels, augment: Augment::IDENTITY }
}

/// An operation outside repeated work, or on other inputs than those announced, never sees those announced.
#[test]
fn inputs_are_those_of_the_operation_or_a_defect() {
    let (size, window) = (8, Window { side: 3, stride: 1, padding: 1 });
    let (one, two) = (vec![1; size * size * 3], vec![2; size * size * 3]);
    let [first, second] = [&one, &two].map(|pixels| [sample(pixels, &[])]);
    let (numbers, n) = (1000, size * size * 27);
    let inputs = Inputs { batches: &[Batch { samples: &first, step: 4 }], size, update: None };
    let new = || {
        let cuda = Cuda::new(Host::new(Order::Forward));
        let (mut ones, mut x) = (cuda.full(numbers), cuda.act(numbers));
        cuda.upload(&vec![1.0; numbers], &mut ones);
        cuda.cast(&ones, &mut x);
        let (y, out) = (cuda.act(numbers), cuda.act(n));
        (cuda, x, y, out)
    };
    let (cuda, x, mut y, mut out) = new();
    let mut masks = Vec::new();
    for step in [4, 5, 4] {
        cuda.dropout(&x, drop_at(step), numbers, &mut y);
        masks.push(cuda.download_act(&y, numbers));
    }
    assert!(masks[0] == masks[2] && masks[0] != masks[1], "each step draws its own");
    for _ in 0..3 {
        cuda.repeat(&[1], &inputs, || {
            cuda.pixel_patches(&first, size, window, &mut out);
            cuda.dropout(&x, drop_at(4), numbers, &mut y);
        });
        assert_eq!(cuda.download_act(&y, numbers), masks[0]);
        // In between, others.
        cuda.dropout(&x, drop_at(5), numbers, &mut y);
        assert_eq!(cuda.download_act(&y, numbers), masks[1]);
    }
    assert_eq!(cuda.device().replays.load(Ordering::Relaxed), 2);
    cuda.check().expect("the device works");

    for wrong in ["random numbers", "pictures"] {
        let (cuda, x, mut y, mut out) = new();
        cuda.repeat(&[1], &inputs, || match wrong {
            "pictures" => cuda.pixel_patches(&second, size, window, &mut out),
            _ => cuda.dropout(&x, drop_at(5), numbers, &mut y),
        });
        let error = cuda.check().expect_err("a defect");
        assert_eq!(error.kind, Kind::Internal);
        assert!(error.to_string().contains(wrong), "{error}");
    }
}

#[test]
fn memory_asked_for_while_recording_is_a_defect() {
    let cuda = Cuda::new(Host::new(Order::Forward));
    let ask = || cuda.repeat(&[1], &Inputs::default(), || drop(cuda.full(3)));
    ask();
    cuda.check().expect("the first time, all that is needed is made");
    ask();
    assert_eq!(cuda.check().expect_err("a defect").kind, Kind::Internal);
}

/// A device that refuses to record, at once or in the middle, does everything once all the same.
#[test]
fn work_that_cannot_be_recorded_is_done_once() {
    for after in [0, 1] {
        let cuda = Cuda::new(Host::refusing(Order::Forward, after));
        let (mut one, mut x, mut y, mut sum) = (cuda.full(1), cuda.act(1), cuda.act(1), cuda.full(1));
        cuda.upload(&[1.0], &mut one);
        cuda.cast(&one, &mut x);
        for times in 1..=4u8 {
            cuda.repeat(&[1], &Inputs::default(), || {
                cuda.accumulate(&x, 1, &mut y);
                cuda.add_part(&one, 0, &mut sum);
            });
            let times = f32::from(times);
            assert_eq!((cuda.download_act(&y, 1), cuda.download(&sum)), (vec![times], vec![times]), "after {after}");
        }
        cuda.check().expect("a refusal is no failure");
        assert!(cuda.remark().expect("it cannot record").contains("cannot record"));
    }
}

/// A recording names memory; when some of that may be gone, it is not replayed.
#[test]
fn a_recording_does_not_outlive_what_it_names() {
    let cuda = Cuda::new(Host::new(Order::Forward));
    let ones = || {
        let mut x = cuda.full(3);
        cuda.upload(&[1.0; 3], &mut x);
        x
    };
    let (mut x, mut y) = (ones(), ones());
    for _ in 0..3 {
        cuda.repeat(&[1], &Inputs::default(), || cuda.zero(&mut x));
    }
    assert_eq!(cuda.device().replays.load(Ordering::Relaxed), 2);
    assert_eq!(cuda.download(&y), [1.0; 3]);
    drop(x);
    cuda.repeat(&[1], &Inputs::default(), || cuda.zero(&mut y));
    cuda.check().expect("the device works");
    assert_eq!(cuda.download(&y), [0.0; 3]);
}
