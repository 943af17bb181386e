//! Whole training steps on the host-run CUDA path against the CPU backend in f32.

use host_kernels::Order;
use segpeft_native::backend::Backend;
use segpeft_native::backend::cpu::Cpu;
use segpeft_native::backend::cuda::Cuda;
use segpeft_native::lora;
use segpeft_native::segformer::{Id, Model, ModelOptions, SegformerConfig, StepRandom, Trainable, modules};

use crate::common::{self, Pictures, json, norm};
use crate::host::Host;

/// Tensors whose true gradient is zero: what is left is rounding, of no direction. Key biases (softmax ignores a
/// constant), and shifts that training-mode BatchNorm removes.
fn true_gradient_is_zero(name: &str, stages: usize) -> bool {
    name.ends_with("attention.self.key.bias")
        || (name.contains("linear_c") && name.ends_with("bias"))
        || name == format!("segformer.encoder.layer_norm.{}.bias", stages - 1)
}

fn model<B: Backend>(backend: B, config: &SegformerConfig, size: ModelOptions, trainable: &Trainable) -> Model<B> {
    let mut model = Model::new(backend, config, size, trainable);
    let specs = model.plan().specs.clone();
    for (i, spec) in specs.iter().enumerate() {
        if !spec.name.contains(".folded.") && !spec.name.ends_with(".scaled") {
            model.set(Id(i), &common::tensor(&spec.name, &spec.shape));
        }
    }
    model.refresh();
    model
}

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

fn config() -> (SegformerConfig, usize) {
    let numbers = json("tiny.json");
    let config = serde_json::from_value(numbers["config"].clone()).expect("config");
    (config, numbers["image_size"].as_u64().expect("size") as usize)
}

fn adapters(config: &SegformerConfig, dropout: f32) -> Trainable {
    let patterns = lora::preset("attention").expect("preset");
    let (matches, _) = lora::select(&modules(config), &patterns, |_| false).expect("targets");
    Trainable::Adapters { matches, rank: 4, scale: 2.0, dropout, head: true }
}

fn compare(what: &str, trainable: &Trainable) {
    let (config, size) = config();
    let pictures = Pictures::new(0..3, size, config.num_labels() == 3);
    let options = ModelOptions { size, batch: 3 };
    let mut cpu = model(Cpu::<f32>::new(None).expect("threads"), &config, options, trainable);
    let mut cuda = model(Cuda::new(Host(Order::Forward)), &config, options, trainable);

    let samples = pictures.samples();
    let (ours, theirs) = (cuda.evaluate(&samples), cpu.evaluate(&samples));
    for (a, b) in ours.loss.iter().zip(&theirs.loss) {
        assert!((a - b).abs() <= 0.01 * b, "{what}: evaluation loss {a}, on the CPU {b}");
    }
    let pixels = theirs.counts.iter().sum::<u64>();
    let moved: u64 = ours.counts.iter().zip(&theirs.counts).map(|(a, b)| a.abs_diff(*b)).sum();
    assert_eq!(ours.counts.iter().sum::<u64>(), pixels);
    assert!(moved as f64 <= 0.04 * pixels as f64, "{what}: {moved} of {pixels} counts differ");

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
    let mut worst = (1.0, "");
    for ((name, a), (_, b)) in found.gradients.iter().zip(&expected.gradients) {
        if true_gradient_is_zero(name, config.num_encoder_blocks) {
            let small = 0.01 * expected.norm;
            assert!(norm(a) < small, "{what}: gradient of {name} should vanish, is {}", norm(a));
            continue;
        }
        let similarity = cosine(a, b);
        if similarity < worst.0 {
            worst = (similarity, name);
        }
        println!("{what}: {similarity:.6} {name}");
    }
    println!("{what}: lowest cosine {:.6} ({})", worst.0, worst.1);
    assert!(worst.0 > 0.999, "{what}: cosine of {} is {}", worst.1, worst.0);
}

#[test]
fn full_fine_tuning() {
    compare("full", &Trainable::Everything);
}

#[test]
fn merged_adapters() {
    compare("merged", &adapters(&config().0, 0.0));
}

#[test]
fn adapters_with_dropout() {
    compare("separate", &adapters(&config().0, 0.1));
}
