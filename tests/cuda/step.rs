//! Whole training steps on the host-run CUDA path against the CPU backend in f32.

use std::sync::atomic::{AtomicUsize, Ordering};

use half::bf16;
use host_kernels::Order;
use segpeft_native::backend::cpu::Cpu;
use segpeft_native::backend::cuda::{Cuda, Device, Joint};
use segpeft_native::backend::{AdamW, Backend, Grid, Memory, Sample};
use segpeft_native::error::Kind;
use segpeft_native::lora;
use segpeft_native::segformer::{Id, Model, ModelOptions, SegformerConfig, StepRandom, Trainable, modules};

use crate::common::{self, Pictures, json, norm};
use crate::gpu;
use crate::host::{Host, Lost};

/// Tensors whose true gradient is zero: what is left is rounding, of no direction. Key biases (softmax ignores a
/// constant), and shifts that training-mode BatchNorm removes.
fn true_gradient_is_zero(name: &str, stages: usize) -> bool {
    name.ends_with("attention.self.key.bias")
        || (name.contains("linear_c") && name.ends_with("bias"))
        || name == format!("segformer.encoder.layer_norm.{}.bias", stages - 1)
}

/// Ways to round weights to bf16 of which none is better than another: they are scaled by 2^(way / WAYS) before, and back after.
const WAYS: usize = 8;

/// The model with weights by formula; with `rounded`, rounded to bf16 in that way.
pub fn model<B: Backend>(
    backend: B,
    config: &SegformerConfig,
    size: ModelOptions,
    trainable: &Trainable,
    rounded: Option<usize>,
) -> Model<B> {
    let mut model = Model::new(backend, config, size, trainable);
    fill(&mut model, rounded);
    model
}

/// Sets weights by formula; with `rounded`, rounded to bf16 in that way.
pub fn fill<B: Backend>(model: &mut Model<B>, rounded: Option<usize>) {
    let specs = model.plan().specs.clone();
    for (i, spec) in specs.iter().enumerate() {
        if !spec.name.contains(".folded.") && !spec.name.ends_with(".scaled") {
            let mut values = common::tensor(&spec.name, &spec.shape);
            if let Some(way) = rounded {
                let scale = 2f32.powf(way as f32 / WAYS as f32);
                values.iter_mut().for_each(|x| *x = bf16::from_f32(*x * scale).to_f32() / scale);
            }
            model.set(Id(i), &values);
        }
    }
    model.refresh();
}

/// The cosine that gradients reach, unless they are so sensitive that rounding the weights alone turns them nearly as far.
const LOWEST: f64 = 0.999;
/// What a product rounds, its weight, its input and the gradient of its output, where on the CPU the weight alone is rounded. Of
/// independent roundings squares add up, and so does 1 - cosine.
const ROUNDED: f64 = 3.0;

/// What a step left: loss, norm, and the gradients by name.
struct Step {
    loss: f64,
    norm: f64,
    gradients: Vec<(String, Vec<f32>)>,
}

fn step<B: Backend>(model: &mut Model<B>, pictures: &Pictures, number: u32) -> Step {
    let samples = pictures.samples();
    let labels = model.config().num_labels();
    model.clear_gradients();
    model.train_micro_batch(&samples, 1.0 / pictures.valid(labels) as f64, StepRandom { seed: 3, step: number });
    model.finish_gradients();
    let gradients =
        model.trained().map(|(name, id)| (name.to_string(), model.gradient(id).expect("trained"))).collect();
    Step { loss: model.take_loss(), norm: model.gradient_norm(), gradients }
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot: f64 = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
    dot / (norm(a) * norm(b))
}

/// The tiny model, and the side of its pictures.
pub fn config() -> (SegformerConfig, usize) {
    let numbers = json("tiny.json");
    let config = serde_json::from_value(numbers["config"].clone()).expect("config");
    (config, numbers["image_size"].as_u64().expect("size") as usize)
}

/// The tiny model with first stages as wide as SegFormer-B0's and two classes, where operations are joined, and with stochastic depth.
pub fn joint_config() -> (SegformerConfig, usize) {
    let (tiny, size) = config();
    let (hidden_sizes, num_attention_heads) = (vec![32, 64, 160, 48], vec![1, 2, 5, 4]);
    let (id2label, drop_path_rate) = (SegformerConfig::default().id2label, 0.2);
    (SegformerConfig { hidden_sizes, num_attention_heads, id2label, drop_path_rate, ..tiny }, size)
}

/// Adapters on the attention of a model, whose head is trained too.
pub fn adapters(config: &SegformerConfig, dropout: f32) -> Trainable {
    scaled_adapters(config, dropout, 2.0)
}

/// The same at a scale, alpha / r.
pub fn scaled_adapters(config: &SegformerConfig, dropout: f32, scale: f64) -> Trainable {
    let patterns = lora::preset("attention").expect("preset");
    let (matches, _) = lora::select(&modules(config), &patterns, |_| false).expect("targets");
    Trainable::Adapters { matches, rank: 4, scale, dropout, head: true }
}

fn compare(what: &str, model: (SegformerConfig, usize), trainable: &Trainable) {
    match gpu() {
        Some(driver) => compare_on(Cuda::new(driver.clone()), what, model, trainable),
        None => compare_on(Cuda::new(Host::new(Order::Forward)), what, model, trainable),
    }
}

fn compare_evaluation<D: Device>(
    what: &str,
    cuda: &mut Model<Cuda<D>>,
    cpu: &mut Model<Cpu<f32>>,
    samples: &[Sample<'_>],
) {
    let (ours, theirs) = (cuda.evaluate(samples), cpu.evaluate(samples));
    cuda.backend().check().expect("the device works");
    for (a, b) in ours.loss.iter().zip(&theirs.loss) {
        assert!((a - b).abs() <= 0.01 * b, "{what}: evaluation loss {a}, on the CPU {b}");
    }
    let pixels = theirs.counts.iter().sum::<u64>();
    let moved: u64 = ours.counts.iter().zip(&theirs.counts).map(|(a, b)| a.abs_diff(*b)).sum();
    assert_eq!(ours.counts.iter().sum::<u64>(), pixels);
    assert!(moved as f64 <= 0.04 * pixels as f64, "{what}: {moved} of {pixels} counts differ");
}

fn compare_on<D: Device>(
    backend: Cuda<D>,
    what: &str,
    (config, size): (SegformerConfig, usize),
    trainable: &Trainable,
) {
    let pictures = Pictures::new(0..3, size, config.num_labels() == 3);
    let options = ModelOptions { size, batch: 3 };
    let mut cpu = model(Cpu::<f32>::new(None).expect("threads"), &config, options, trainable, None);
    let mut cuda = model(backend, &config, options, trainable, None);

    compare_evaluation(what, &mut cuda, &mut cpu, &pictures.samples());
    let expected = step(&mut cpu, &pictures, 0);
    let found = step(&mut cuda, &pictures, 0);
    cuda.backend().check().expect("the device works");
    assert!(
        (found.loss - expected.loss).abs() <= 0.01 * expected.loss,
        "{what}: loss {} {}",
        found.loss,
        expected.loss
    );
    assert!(
        (found.norm - expected.norm).abs() <= 0.02 * expected.norm,
        "{what}: norm {} {}",
        found.norm,
        expected.norm
    );

    // How far rounding the weights alone turns each gradient on the CPU, small tensors being touchy: on average over the ways to
    // round, and how far a way may be above the average of the others.
    let way = |way| {
        let mut rounded = model(Cpu::<f32>::new(None).expect("threads"), &config, options, trainable, Some(way));
        step(&mut rounded, &pictures, 0)
    };
    let ways: Vec<Step> = (0..WAYS).map(way).collect();
    let (mut all, mut turns, mut outlier) = ([Vec::new(), Vec::new()], Vec::new(), 0.0f64);
    for (i, ((name, a), (_, b))) in found.gradients.iter().zip(&expected.gradients).enumerate() {
        if true_gradient_is_zero(name, config.num_encoder_blocks) {
            let small = 0.01 * expected.norm;
            assert!(norm(a) < small, "{what}: gradient of {name} should vanish, is {}", norm(a));
            continue;
        }
        all[0].extend(a);
        all[1].extend(b);
        let rounded: Vec<f64> = ways.iter().map(|way| 1.0 - cosine(&way.gradients[i].1, b)).collect();
        let sum: f64 = rounded.iter().sum();
        outlier = rounded.iter().fold(outlier, |most, turn| most.max(turn * (WAYS - 1) as f64 / (sum - turn)));
        turns.push((name, 1.0 - cosine(a, b), sum / WAYS as f64));
    }
    let ratio = turns.iter().map(|(_, turn, usual)| turn / usual).sum::<f64>() / turns.len() as f64;
    println!(
        "{what}: gradients turn {ratio:.2} times as far as by rounded weights; one way is {outlier:.2} times the others"
    );
    assert!(ratio < ROUNDED, "{what}: gradients turn {ratio} times as far as by rounded weights");
    let mut below = 0;
    for (name, turn, usual) in turns {
        if turn >= 1.0 - LOWEST {
            below += 1;
            println!("{what}: cosine {:.6} of {name}; rounded weights alone {:.6}", 1.0 - turn, 1.0 - usual);
        }
        let allowed = (1.0 - LOWEST).max(ratio * outlier * usual);
        assert!(turn < allowed, "{what}: 1 - cosine of {name} is {turn}, allowed {allowed}");
    }
    let whole = cosine(&all[0], &all[1]);
    println!(
        "{what}: cosine of the whole gradient {whole:.6}; {LOWEST} or less in {below} of {}",
        found.gradients.len()
    );
    assert!(whole > LOWEST, "{what}: cosine of the whole gradient {whole}");
}

/// Losses of `STEPS` updates on the same pictures, with the masks of `seed` at the rates SegFormers are trained with.
fn curve<B: Backend>(backend: B, trainable: &Trainable, seed: u64) -> Vec<f64> {
    let (config, size) = config();
    let config = SegformerConfig { drop_path_rate: 0.1, classifier_dropout_prob: 0.1, ..config };
    let pictures = Pictures::new(0..3, size, config.num_labels() == 3);
    let mut model = model(backend, &config, ModelOptions { size, batch: 3 }, trainable, None);
    let (samples, mut moments) = (pictures.samples(), model.moments());
    let decays = vec![false; moments.first.len()];
    let scale = 1.0 / pictures.valid(config.num_labels()) as f64;
    let losses = (0..STEPS)
        .map(|step| {
            model.clear_gradients();
            model.train_micro_batch(&samples, scale, StepRandom { seed, step });
            model.finish_gradients();
            let update = AdamW {
                lr: 1e-3,
                betas: [0.9, 0.999],
                epsilon: 1e-8,
                weight_decay: 0.0,
                step: u64::from(step) + 1,
                max_norm: 1.0,
            };
            model.update(&update, &decays, &mut moments);
            model.take_loss()
        })
        .collect();
    model.backend().check().expect("the device works");
    losses
}

/// Updates of a curve.
const STEPS: u32 = 30;

/// Training follows the CPU's curve more closely than two seeds follow each other on the CPU.
fn follow(what: &str, trainable: &Trainable) {
    let cpu = |seed| curve(Cpu::<f32>::new(None).expect("threads"), trainable, seed);
    let found = match gpu() {
        Some(driver) => curve(Cuda::new(driver.clone()), trainable, 3),
        None => curve(Cuda::new(Host::new(Order::Forward)), trainable, 3),
    };
    let curves = [3, 4, 5].map(cpu);
    let apart = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).sum::<f64>() / a.len() as f64;
    let pairs = [(0, 1), (0, 2), (1, 2)].map(|(i, j)| apart(&curves[i], &curves[j]));
    let spread = pairs.into_iter().fold(f64::INFINITY, f64::min);
    let distance = apart(&found, &curves[0]);
    println!("{what}: {distance:.5} from the CPU's curve on average, seeds {spread:.5} apart or more; {found:.4?}");
    let (first, last) = (curves[0][0], curves[0][curves[0].len() - 1]);
    assert!(last < 0.8 * first, "{what}: the CPU does not learn: {first} to {last}");
    assert!(distance < spread, "{what}: {distance} from the CPU's curve, seeds are {spread} apart");
}

/// The loss of a group of micro-batches counts every picture, though the last micro-batch is smaller.
#[test]
fn a_smaller_last_micro_batch_hides_no_loss() {
    let (config, size) = config();
    let pictures = Pictures::new(0..5, size, config.num_labels() == 3);
    let (samples, options) = (pictures.samples(), ModelOptions { size, batch: 3 });
    let mut model = model(Cuda::new(Host::new(Order::Forward)), &config, options, &Trainable::Everything, None);
    let mut losses = |groups: &[&[&[Sample<'_>]]]| -> f64 {
        let loss = |group: &&[&[Sample<'_>]]| {
            for batch in *group {
                model.train_micro_batch(batch, 1e-3, StepRandom { seed: 3, step: 0 });
            }
            model.take_loss()
        };
        groups.iter().map(loss).sum()
    };
    let (large, small) = samples.split_at(3);
    let (apart, together) = (losses(&[&[large], &[small]]), losses(&[&[large, small]]));
    assert!((apart - together).abs() < 1e-6 * apart, "{apart} apart, {together} together");
}

/// Activations that are made again are those that were kept.
#[test]
fn saving_memory_changes_no_bit() {
    let (tiny, size) = config();
    let joint = joint_config().0;
    let cases = [&tiny, &joint].map(|config| [Trainable::Everything, adapters(config, 0.0)].map(|what| (config, what)));
    for (config, trainable) in cases.into_iter().flatten() {
        let pictures = Pictures::new(0..3, size, config.num_labels() == 3);
        let gradients = |saves| {
            let backend = Cuda::new(Host::new(Order::Forward)).saving_memory(saves);
            let mut model = model(backend, config, ModelOptions { size, batch: 3 }, &trainable, None);
            let bytes = model.planned_bytes();
            (bytes, step(&mut model, &pictures, 0).gradients)
        };
        let ((kept_bytes, kept), (saved_bytes, saved)) = (gradients(false), gradients(true));
        assert!(saved_bytes < kept_bytes, "{saved_bytes} of {kept_bytes} bytes");
        for ((name, a), (_, b)) in kept.iter().zip(&saved) {
            assert!(a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits()), "{name} differs");
        }
    }
}

/// A device that is lost in the middle of a step: the first failure is what is reported, and answers that never came are no
/// numbers, so that nothing can be taken for a result.
#[test]
fn a_device_lost_in_mid_step_is_one_clear_error() {
    let (config, size) = config();
    let pictures = Pictures::new(0..3, size, config.num_labels() == 3);
    let samples = pictures.samples();
    let lost = Lost { host: Host::new(Order::Forward), launches: AtomicUsize::new(usize::MAX) };
    let mut model = model(Cuda::new(lost), &config, ModelOptions { size, batch: 3 }, &Trainable::Everything, None);
    model.backend().check().expect("the device works");
    model.backend().device().launches.store(40, Ordering::Relaxed);
    model.train_micro_batch(&samples, 1e-3, StepRandom { seed: 3, step: 0 });
    model.finish_gradients();
    let error = model.backend().check().expect_err("it is lost");
    assert_eq!((error.kind, error.to_string()), (Kind::Device, "the device is lost".to_string()));
    assert!(model.take_loss().is_nan() && model.gradient_norm().is_nan());
    assert!(model.get(Id(0)).iter().all(|x| x.is_nan()), "no weights to write into a checkpoint");
    assert!(model.evaluate(&samples).loss.iter().all(|x| x.is_nan()));
    assert_eq!(model.backend().check().expect_err("it stays so").to_string(), error.to_string());
}

/// In sizes for which the decoder's last kernel makes z itself, so that a model for evaluation has no room for it; and with an
/// adapter of its own path on the first stage, which is added to z.
#[test]
fn evaluation_alone() {
    let (tiny, size) = config();
    let (hidden_sizes, id2label) = (vec![32, 24, 40, 48], SegformerConfig::default().id2label);
    let config = SegformerConfig { hidden_sizes, id2label, ..tiny };
    let patterns = lora::preset("all-linear").expect("preset");
    let (matches, _) = lora::select(&modules(&config), &patterns, |_| false).expect("targets");
    let adapters = Trainable::Adapters { matches, rank: 4, scale: 2.0, dropout: 0.1, head: false };
    let grids = [16, 8, 4, 2].map(|side| Grid { images: 3, height: side, width: side });
    let (pictures, options) = (Pictures::new(0..3, size, false), ModelOptions { size, batch: 3 });
    fn compare<D: Device>(
        backend: Cuda<D>,
        mut cpu: Model<Cpu<f32>>,
        trainable: &Trainable,
        pictures: &Pictures,
        grids: &[Grid],
    ) {
        let (config, options) = (cpu.config().clone(), ModelOptions { size: cpu.size(), batch: cpu.batch() });
        let mut cuda = model(backend, &config, options, trainable, None);
        let own_path = matches!(trainable, Trainable::Adapters { .. });
        assert_eq!(cuda.plan().decoder.writes_z(cuda.backend(), grids), own_path);
        compare_evaluation("evaluation", &mut cuda, &mut cpu, &pictures.samples());
    }
    for trainable in [Trainable::Nothing, adapters] {
        let cpu = model(Cpu::<f32>::new(None).expect("threads"), &config, options, &trainable, None);
        match gpu() {
            Some(driver) => compare(Cuda::new(driver.clone()), cpu, &trainable, &pictures, &grids),
            None => compare(Cuda::new(Host::new(Order::Forward)), cpu, &trainable, &pictures, &grids),
        }
    }
}

#[test]
fn full_fine_tuning_follows_the_curve() {
    follow("full", &Trainable::Everything);
}

#[test]
fn adapters_follow_the_curve() {
    follow("adapters", &adapters(&config().0, 0.0));
}

#[test]
fn full_fine_tuning() {
    compare("full", config(), &Trainable::Everything);
}

#[test]
fn merged_adapters_by_joint_operations() {
    compare("merged, joint", joint_config(), &adapters(&joint_config().0, 0.0));
}

/// With so many keys that all of attention's gradients are made at once.
#[test]
fn full_fine_tuning_by_joint_operations() {
    let (config, _) = joint_config();
    compare("full, joint", (SegformerConfig { sr_ratios: vec![2, 1, 1, 1], ..config }, 96), &Trainable::Everything);
}

/// Without any one of the joint operations, a step is the same within rounding.
#[test]
fn a_step_can_be_taken_apart() {
    let (config, _) = joint_config();
    let (size, batch) = (32, 2);
    let pictures = Pictures::new(0..batch as u64, size, false);
    let run = |apart| {
        let backend = Cuda::new(Host::new(Order::Forward)).taking_apart(apart);
        let mut model = model(backend, &config, ModelOptions { size, batch }, &Trainable::Everything, None);
        let Step { loss, gradients, .. } = step(&mut model, &pictures, 0);
        model.backend().check().expect("no failure");
        (loss, gradients.into_iter().flat_map(|(_, gradient)| gradient).collect::<Vec<f32>>())
    };
    let (loss, gradient) = run(None);
    for joint in Joint::ALL {
        let (loss_apart, gradient_apart) = run(Some(joint));
        let cosine = cosine(&gradient_apart, &gradient);
        // Either may be as far from the exact gradient as the comparison with the CPU allows; of independent roundings squares add
        // up, and so does 1 - cosine.
        let same = (loss_apart / loss - 1.0).abs() < 0.01 && 1.0 - cosine < 2.0 * (1.0 - LOWEST);
        assert!(same, "without {}: loss {loss_apart}, not {loss}; cosine {cosine}", joint.name());
    }
}

#[test]
fn merged_adapters() {
    compare("merged", config(), &adapters(&config().0, 0.0));
}

#[test]
fn adapters_with_dropout() {
    compare("separate", config(), &adapters(&config().0, 0.1));
}
