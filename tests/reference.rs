//! The model against transformers, peft and torch: fixtures of `tools/reference/`, computed there in f64.
#![allow(missing_docs)]

mod common;

use std::collections::BTreeMap;

use common::{Pictures, distance, json, largest, norm, strided, tensors};
use segpeft_native::backend::AdamW;
use segpeft_native::backend::cpu::{Cpu, Real};
use segpeft_native::lora;
use segpeft_native::segformer::{Id, Model, ModelOptions, Role, SegformerConfig, StepRandom, Trainable, modules};
use serde_json::Value;

/// Largest error of the logits, as a share of the largest logit, and of each gradient tensor, relative L2, in f32.
const BOUND: f64 = 1e-4;

/// Tensors whose true gradient is zero, so that only its size can be compared: key biases (softmax ignores a
/// constant), and what training-mode BatchNorm removes.
fn true_gradient_is_zero(name: &str, stages: usize) -> bool {
    name.ends_with("attention.self.key.bias")
        || (name.contains("linear_c") && name.ends_with("bias"))
        || name == format!("segformer.encoder.layer_norm.{}.bias", stages - 1)
}

fn trainable(config: &SegformerConfig, case: &Value) -> Trainable {
    let Some(rank) = case["rank"].as_u64() else { return Trainable::Everything };
    let patterns = lora::preset(case["targets"].as_str().expect("targets")).expect("preset");
    let head = case["train_head"].as_bool().unwrap_or(false);
    let excluded = |name: &str| head && name.starts_with("decode_head");
    let (matches, unused) = lora::select(&modules(config), &patterns, excluded).expect("targets");
    assert!(unused.is_empty());
    let scale = case["alpha"].as_f64().expect("alpha") / rank as f64;
    Trainable::Adapters { matches, rank: rank as usize, scale, dropout: 0.0, head }
}

fn model<T: Real>(config: &SegformerConfig, size: usize, batch: usize, trainable: &Trainable) -> Model<Cpu<T>> {
    let backend = Cpu::new(None).expect("threads");
    let mut model = Model::new(backend, config, ModelOptions { size, batch }, trainable);
    let specs = model.plan().specs.clone();
    for (i, spec) in specs.iter().enumerate() {
        let derived = spec.name.contains(".folded.") || spec.name.ends_with(".scaled");
        if !derived {
            model.set(Id(i), &common::tensor(&spec.name, &spec.shape));
        }
    }
    model.refresh();
    model
}

fn gradients<T: Real>(model: &Model<Cpu<T>>) -> BTreeMap<String, Vec<f32>> {
    model.trained().map(|(name, id)| (name.to_string(), model.gradient(id).expect("trained"))).collect()
}

fn compare_case<T: Real>(file: &str, case: &str, bound: f64) -> (Model<Cpu<T>>, Value) {
    let numbers = json(&format!("{file}.json"));
    let fixture = tensors(&format!("{file}.safetensors"));
    let config: SegformerConfig = serde_json::from_value(numbers["config"].clone()).expect("config");
    let size = numbers["image_size"].as_u64().expect("size") as usize;
    let list = if numbers["pictures"].is_array() { &numbers["pictures"] } else { &numbers["pictures"][case] };
    let list: Vec<u64> = list.as_array().expect("pictures").iter().map(|k| k.as_u64().expect("number")).collect();
    let labels = config.num_labels();
    let pictures = Pictures::new(list, size, labels == 3);
    let samples = pictures.samples();
    let trainable = trainable(&config, &numbers["cases"][case]);
    let mut model = model::<T>(&config, size, samples.len(), &trainable);
    let expected = &numbers["numbers"][case];

    let logits: Vec<f32> = model.logits(&samples).concat();
    let reference = &fixture[&format!("{case}/logits_eval")];
    let error = logits.iter().zip(reference).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max);
    assert!(error <= bound * largest(reference), "{case}: evaluation logits differ by {error}");
    let valid = pictures.valid(labels) as f64;
    let loss = model.evaluate(&samples).loss.iter().sum::<f64>() / valid;
    let reference = expected["loss_eval"].as_f64().expect("loss");
    assert!((loss - reference).abs() <= bound * reference, "{case}: evaluation loss {loss}, reference {reference}");

    model.train_micro_batch(&samples, 1.0 / valid, StepRandom { seed: 0, step: 0 });
    model.finish_gradients();
    let logits: Vec<f32> = model.training_logits(samples.len()).concat();
    let reference = &fixture[&format!("{case}/logits_train")];
    let error = logits.iter().zip(reference).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max);
    assert!(error <= bound * largest(reference), "{case}: training logits differ by {error}");
    let loss = model.take_loss();
    let reference = expected["loss_train"].as_f64().expect("loss");
    assert!((loss - reference).abs() <= bound * reference, "{case}: training loss {loss}, reference {reference}");
    let reference = expected["grad_norm"].as_f64().expect("norm");
    let ours = model.gradient_norm();
    assert!((ours - reference).abs() <= bound * reference, "{case}: gradient norm {ours}, reference {reference}");

    let full = file == "tiny";
    let ours = gradients(&model);
    let mut worst = (0.0, String::new());
    let mut compared = 0;
    for (key, reference) in &fixture {
        let Some(name) = key.strip_prefix(&format!("{case}/grad/")) else { continue };
        let gradient = ours.get(name).unwrap_or_else(|| panic!("{case}: no gradient of {name}"));
        let gradient = if full { gradient.clone() } else { strided(gradient) };
        compared += 1;
        if true_gradient_is_zero(name, config.num_encoder_blocks) {
            assert!(norm(&gradient) < 1e-5, "{case}: gradient of {name} should vanish, is {}", norm(&gradient));
            continue;
        }
        let error = distance(&gradient, reference) / norm(reference);
        if error > worst.0 {
            worst = (error, name.to_string());
        }
    }
    println!("{file}/{case}: {compared} gradients, largest relative error {:.2e} ({})", worst.0, worst.1);
    assert_eq!(compared, ours.len(), "{case}: every trained tensor is compared");
    assert!(worst.0 <= bound, "{case}: gradient of {} is off by {:.2e}", worst.1, worst.0);

    for name in ["running_mean", "running_var"] {
        let name = format!("decode_head.batch_norm.{name}");
        let id = model.plan().find(&name).expect("statistic");
        let reference = &fixture[&format!("{case}/buffer/{name}")];
        assert!(distance(&model.get(id), reference) <= bound * norm(reference), "{case}: {name}");
    }
    (model, numbers)
}

#[test]
fn tiny_full_fine_tuning_in_f32() {
    compare_case::<f32>("tiny", "fft", BOUND);
}

#[test]
fn tiny_lora_on_attention_in_f32() {
    compare_case::<f32>("tiny", "lora_attention", BOUND);
}

#[test]
fn tiny_lora_on_all_linear_modules_in_f32() {
    compare_case::<f32>("tiny", "lora_all_linear", BOUND);
}

#[test]
fn tiny_lora_with_trained_head_in_f32() {
    compare_case::<f32>("tiny", "lora_train_head", BOUND);
}

/// In f64 only the fixtures' own rounding to f32 is left (and f32 pixels' normalisation).
#[test]
fn tiny_in_f64() {
    for case in ["fft", "lora_attention", "lora_all_linear", "lora_train_head"] {
        compare_case::<f64>("tiny", case, 2e-6);
    }
}

fn compare_b0(case: &str) {
    let (mut model, numbers) = compare_case::<f32>("b0", case, BOUND);
    let optimizer = &numbers["optimizer"];
    let number = |key: &str| optimizer[key].as_f64().expect("number");
    let adamw = AdamW {
        lr: number("lr"),
        betas: [0.9, 0.999],
        epsilon: number("epsilon"),
        weight_decay: 0.0,
        step: 1,
        max_norm: number("max_grad_norm"),
    };
    let before: BTreeMap<String, Vec<f32>> =
        model.trained().map(|(name, id)| (name.to_string(), model.get(id))).collect();
    let grads = gradients(&model);
    let decays = vec![false; before.len()];
    let mut moments = model.moments();
    model.update(&adamw, &decays, &mut moments);
    let fixture = tensors("b0.safetensors");
    let after: BTreeMap<String, Vec<f32>> =
        model.trained().map(|(name, id)| (name.to_string(), model.get(id))).collect();
    for (name, weights) in &after {
        if true_gradient_is_zero(name, 4) {
            continue;
        }
        let reference = &fixture[&format!("{case}/updated/{name}")];
        // The first update moves each weight by lr·g/(|g| + eps): compare where g stands clear of its own rounding.
        let clear = 1e-3 * largest(&grads[name]);
        let picked = |x: &[f32]| -> Vec<f32> {
            let (x, g) = (strided(x), strided(&grads[name]));
            x.into_iter().zip(g).filter(|(_, g)| f64::from(g.abs()) > clear).map(|(x, _)| x).collect()
        };
        let reference: Vec<f32> = {
            let g = strided(&grads[name]);
            reference.iter().zip(g).filter(|(_, g)| f64::from(g.abs()) > clear).map(|(x, _)| *x).collect()
        };
        let travelled = distance(&picked(&before[name]), &reference);
        let error = distance(&picked(weights), &reference);
        assert!(error <= 2e-3 * travelled, "{case}: {name} after one update: {error} of {travelled}");
    }
}

#[test]
fn b0_full_fine_tuning_and_one_update() {
    compare_b0("fft");
}

#[test]
fn b0_lora_and_one_update() {
    compare_b0("lora");
}

#[test]
fn the_models_tensors_are_the_references() {
    let list = json("formula.json");
    let specs: BTreeMap<String, (Vec<usize>, Role)> = modules(&SegformerConfig::default())
        .iter()
        .flat_map(|m| m.tensors())
        .map(|t| (t.name, (t.shape, t.role)))
        .collect();
    for (name, entry) in list["tensors"].as_object().expect("tensors") {
        let shape: Vec<usize> = serde_json::from_value(entry["shape"].clone()).expect("shape");
        let values = common::tensor(name, &shape);
        let first: Vec<f64> = serde_json::from_value(entry["first"].clone()).expect("numbers");
        for (ours, theirs) in values.iter().zip(first) {
            assert_eq!(f64::from(*ours), theirs, "{name}");
        }
        if !name.contains("lora_") && !name.contains("num_batches") {
            assert_eq!(specs[name].0, shape, "{name}");
        }
    }
}

/// Finite differences through the whole model with everything random on: stochastic depth, dropout before the classifier
/// and at the adapters, which run on their separate path.
#[test]
fn adapters_with_dropout_by_finite_differences() {
    let numbers = json("tiny.json");
    let mut config: SegformerConfig = serde_json::from_value(numbers["config"].clone()).expect("config");
    (config.drop_path_rate, config.classifier_dropout_prob) = (0.2, 0.2);
    let pictures = Pictures::new([33, 34, 35], 64, true);
    let samples = pictures.samples();
    let scale = 1.0 / pictures.valid(3) as f64;
    let random = StepRandom { seed: 5, step: 11 };
    let case = &numbers["cases"]["lora_all_linear"];
    let Trainable::Adapters { matches, rank, scale: s, .. } = trainable(&config, case) else {
        unreachable!("adapters")
    };
    let trainable = Trainable::Adapters { matches, rank, scale: s, dropout: 0.3, head: false };
    let mut model = model::<f64>(&config, 64, 3, &trainable);
    model.train_micro_batch(&samples, scale, random);
    model.finish_gradients();
    model.take_loss();
    let targets: Vec<(String, Id, Vec<f32>)> =
        model.trained().map(|(name, id)| (name.to_string(), id, model.gradient(id).expect("trained"))).collect();
    let mut checked = 0;
    for (k, (name, id, gradient)) in targets.iter().enumerate() {
        let values = model.get(*id);
        let i = k * 31 % values.len();
        let mut loss_at = |x: f32| {
            let mut moved = values.clone();
            moved[i] = x;
            model.set(*id, &moved);
            model.refresh();
            model.train_micro_batch(&samples, scale, random);
            model.take_loss()
        };
        // Small, so that hardly any ReLU changes its side; the difference is that of the rounded numbers.
        let (above, below) = (values[i] + 1.0 / 131_072.0, values[i] - 1.0 / 131_072.0);
        let slope = (loss_at(above) - loss_at(below)) / (f64::from(above) - f64::from(below));
        loss_at(values[i]);
        let error = (f64::from(gradient[i]) - slope).abs();
        assert!(
            error < 2e-5 * (1.0 + slope.abs()) && error < 0.02 * slope.abs().max(1e-4),
            "{name}[{i}]: {} against {slope}",
            gradient[i]
        );
        checked += usize::from(slope.abs() > 1e-4);
    }
    assert!(checked > 20, "only {checked} slopes stand clear of zero");
}

/// The separate path with a dropout too small to drop anything gives what merging gives.
#[test]
fn separate_and_merged_adapters_agree() {
    let numbers = json("tiny.json");
    let config: SegformerConfig = serde_json::from_value(numbers["config"].clone()).expect("config");
    let pictures = Pictures::new([33, 34, 35], 64, true);
    let samples = pictures.samples();
    let case = &numbers["cases"]["lora_all_linear"];
    let run = |rate: f32| {
        let Trainable::Adapters { matches, rank, scale, .. } = trainable(&config, case) else {
            unreachable!("adapters")
        };
        let trainable = Trainable::Adapters { matches, rank, scale, dropout: rate, head: false };
        let mut model = model::<f64>(&config, 64, 3, &trainable);
        model.train_micro_batch(&samples, 1.0 / pictures.valid(3) as f64, StepRandom { seed: 5, step: 11 });
        model.finish_gradients();
        (model.take_loss(), gradients(&model))
    };
    let ((merged_loss, merged), (separate_loss, separate)) = (run(0.0), run(1e-12));
    assert!((merged_loss - separate_loss).abs() < 1e-12);
    for (name, gradient) in &merged {
        assert!(distance(gradient, &separate[name]) <= 1e-6 * norm(gradient), "{name}");
    }
}
