//! Whole runs: three epochs against transformers' Trainer and peft, resuming bit for bit, independence of threads.
#![allow(missing_docs)]

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use common::{distance, json, picture, strided, tensors};
use segpeft_native::backend::cpu::Cpu;
use segpeft_native::backend::{Place, Sample};
use segpeft_native::dataset::{Augment, PackedDataset, Split, prepare};
use segpeft_native::error::Kind;
use segpeft_native::formats::{Adapter, AdapterConfig, Checkpoint, HostData, HostTensor, StateDict, read_safetensors};
use segpeft_native::lora;
use segpeft_native::progress::Progress;
use segpeft_native::random::{Philox, Purpose};
use segpeft_native::segformer::{Id, Model, ModelOptions, Module, SegformerConfig, StepRandom, Trainable, modules};
use segpeft_native::train::options::{LoraOptions, Method, TrainOptions};
use segpeft_native::train::record::{HistoryRow, RunRecord};
use segpeft_native::train::{Inputs, Seat, Start, Weights, run};
use serde_json::Value;

/// Packs pictures made by formula; they are stored without loss, and not resized.
fn packed(dir: &Path, count: u64, size: usize) -> PackedDataset {
    for sub in ["images", "masks"] {
        std::fs::create_dir_all(dir.join(sub)).expect("folder");
    }
    for k in 0..count {
        let (pixels, mask) = picture(k, size);
        let side = size as u32;
        let image = image::RgbImage::from_raw(side, side, pixels).expect("picture");
        image.save(dir.join(format!("images/p{k:03}.png"))).expect("saved");
        let mask: Vec<u8> = mask.iter().map(|m| m * 255).collect();
        let mask = image::GrayImage::from_raw(side, side, mask).expect("mask");
        mask.save(dir.join(format!("masks/p{k:03}.png"))).expect("saved");
    }
    let file = dir.join("data.pack");
    prepare(dir, &file, size, &Progress::quiet()).expect("packed");
    PackedDataset::open(&file).expect("opened")
}

fn formula(name: &str, shape: &[usize]) -> HostTensor {
    HostTensor { shape: shape.to_vec(), data: HostData::F32(common::tensor(name, shape)) }
}

/// A start from the formula's weights, for LoRA with its A and B = 0.
fn start(config: &SegformerConfig, lora: Option<&LoraOptions>) -> Start {
    let list = modules(config);
    let specs = list.iter().flat_map(Module::tensors);
    let tensors: StateDict = specs.map(|s| (s.name.clone(), formula(&s.name, &s.shape))).collect();
    let adapter = lora.map(|lora| {
        let (matches, _) = lora::select(&list, &lora.targets, |_| false).expect("targets");
        let mut factors = StateDict::new();
        for m in &matches {
            let (a, b) = (format!("{}.lora_A.weight", m.module.name), format!("{}.lora_B.weight", m.module.name));
            factors.insert(a.clone(), formula(&a, &[lora.rank, m.module.inputs]));
            let zeros = vec![0.0; m.module.outputs * lora.rank];
            factors.insert(b, HostTensor { shape: vec![m.module.outputs, lora.rank], data: HostData::F32(zeros) });
        }
        let config = AdapterConfig {
            r: lora.rank,
            lora_alpha: lora.alpha,
            lora_dropout: 0.0,
            use_rslora: false,
            target_modules: lora.targets.clone(),
            modules_to_save: Vec::new(),
            base_model: String::new(),
        };
        Adapter { config, tensors: factors, sidecar: StateDict::new() }
    });
    let checkpoint = Checkpoint { config: config.clone(), tensors };
    Start { name: "formula".into(), weights: Weights::Checkpoint(checkpoint), adapter, adapter_name: String::new() }
}

fn lora_options(rank: usize, alpha: f64) -> LoraOptions {
    let targets = lora::preset("attention").expect("preset");
    LoraOptions { rank, alpha, dropout: 0.0, targets, train_head: false }
}

fn numbers(tensors: &StateDict) -> BTreeMap<&str, &Vec<f32>> {
    tensors
        .iter()
        .filter_map(|(name, tensor)| match &tensor.data {
            HostData::F32(data) => Some((name.as_str(), data)),
            HostData::I64(_) => None,
        })
        .collect()
}

struct Trained {
    record: RunRecord,
    reference: Value,
    out: PathBuf,
    _scratch: tempfile::TempDir,
}

/// The fixture's three epochs, run here.
fn three_epochs(case: &str) -> Trained {
    let reference = json("training.json");
    let config: SegformerConfig = serde_json::from_value(reference["config"].clone()).expect("config");
    let size = reference["image_size"].as_u64().expect("size") as usize;
    let scratch = tempfile::tempdir().expect("scratch");
    let data = packed(scratch.path(), 18, size);
    let given = &reference["options"];
    let integer = |key: &str| given[key].as_u64().expect("integer") as usize;
    let number = |key: &str| given[key].as_f64().expect("number");
    let spec = &reference["cases"][case];
    let lora = spec["rank"].as_u64().map(|rank| lora_options(rank as usize, spec["alpha"].as_f64().expect("alpha")));
    let start = start(&config, lora.as_ref());
    let options = TrainOptions {
        method: lora.map_or(Method::Fft, Method::Lora),
        epochs: integer("epochs"),
        lr: number("lr"),
        batch_size: integer("batch_size"),
        grad_accum: integer("grad_accum"),
        eval_batch_size: integer("eval_batch_size"),
        warmup_ratio: number("warmup_ratio"),
        max_grad_norm: number("max_grad_norm"),
        augment: false,
        shuffle: false,
        keep_checkpoints: 9,
        ..TrainOptions::default()
    };
    let split = Split { train: (0..13).collect(), val: (13..18).collect() };
    let out = scratch.path().join("run");
    let inputs = Inputs { data: &data, split: &split, model: &start };
    let record = run("run", &options, &inputs, &mut Seat::new(&Place::Cpu), &out, &Progress::quiet()).expect("trained");
    Trained { record, reference: reference["numbers"][case].clone(), out, _scratch: scratch }
}

/// Compares the histories: the bounds are relative for losses, absolute for metrics.
fn compare_histories(trained: &Trained, train_bound: f64, eval_bound: f64, metric_bound: f64) {
    let reference = trained.reference["history"].as_array().expect("history");
    let ours = &trained.record.training_history;
    let mut compared = 0;
    for (row, reference) in ours.iter().zip(reference) {
        let value = |key: &str| reference[key].as_f64();
        let row: &HistoryRow = row;
        let close = |what: &str, ours: Option<f64>, bound: f64, scale: f64| {
            let Some(reference) = value(what) else { return 0 };
            let ours = ours.unwrap_or(f64::NAN);
            println!("{what}: {ours:.7} reference {reference:.7}");
            assert!((ours - reference).abs() <= bound * scale, "{what}: {ours}, reference {reference}");
            1
        };
        compared += close("loss", row.loss, train_bound, value("loss").unwrap_or(0.0));
        compared += close("grad_norm", row.grad_norm, train_bound, value("grad_norm").unwrap_or(0.0));
        compared += close("learning_rate", row.learning_rate, 1e-12, 1.0);
        compared += close("eval_loss", row.eval_loss, eval_bound, value("eval_loss").unwrap_or(0.0));
        compared += close("eval_mean_dice", row.eval_mean_dice, metric_bound, 1.0);
        compared += close("eval_mean_iou", row.eval_mean_iou, metric_bound, 1.0);
        compared += close("eval_accuracy", row.eval_accuracy, metric_bound, 1.0);
        if let Some(extra) = &row.extra {
            compared += close("eval_image_mean_dice", Some(extra.eval_image_mean_dice), metric_bound, 1.0);
            compared += close("eval_notebook_mean_iou", extra.eval_notebook_mean_iou, metric_bound, 1.0);
            compared += close("eval_notebook_accuracy", extra.eval_notebook_accuracy, metric_bound, 1.0);
        }
        if let Some(epoch) = value("epoch") {
            assert_eq!(row.epoch, epoch);
            assert_eq!(Some(row.step), reference["step"].as_u64());
        }
    }
    assert!(compared >= 3 * 10, "only {compared} numbers were compared");
}

/// Errors of the final tensors as shares of the distance travelled: of all together, and of the worst. Over strided
/// elements, as the fixture keeps them.
///
/// The worst tensor is bounded more loosely: rounding moves some of the decoder's ReLU inputs across zero (half a million
/// of them a micro-batch, none of which can be kept clear of zero over a whole training), and one such step changes the
/// gradients of its micro-batch by up to 2e-3, in any f32 implementation.
fn compare_weights(case: &str, trained: &Trained, weights: &StateDict, bound: f64, skip: impl Fn(&str) -> bool) {
    let fixture = tensors("training.safetensors");
    let ours = numbers(weights);
    let mut worst = (0.0, String::new());
    let (mut errors, mut distances, mut compared) = (0.0f64, 0.0f64, 0);
    for (key, reference) in &fixture {
        let Some(name) = key.strip_prefix(&format!("{case}/weights/")) else { continue };
        if skip(name) {
            continue;
        }
        compared += 1;
        let travelled = trained.reference["distance_strided"][name].as_f64().expect("distance");
        let error = distance(&strided(ours[name]), reference);
        errors += error * error;
        distances += travelled * travelled;
        if error / travelled > worst.0 {
            worst = (error / travelled, name.to_string());
        }
    }
    let together = (errors / distances).sqrt();
    println!(
        "{case}: {compared} tensors, off by {together:.2e} of the distance travelled, worst {:.2e} ({})",
        worst.0, worst.1
    );
    assert!(compared > 50, "only {compared} tensors were compared");
    assert!(together <= bound, "{case}: off by {together} of the distance travelled");
    assert!(worst.0 <= 3.0 * bound, "{case}: {} is off by {} of the distance travelled", worst.1, worst.0);
}

/// The weights after the last epoch, not the best one's.
fn last_checkpoint(trained: &Trained) -> PathBuf {
    let steps = trained.record.training_history.iter().map(|row| row.step).max().expect("steps");
    trained.out.join(format!("checkpoint-{steps}"))
}

#[test]
fn lora_follows_the_reference_over_three_epochs() {
    let trained = three_epochs("lora");
    compare_histories(&trained, 2e-4, 2e-4, 1e-3);
    let adapter = segpeft_native::formats::adapter::read(&last_checkpoint(&trained)).expect("adapter");
    compare_weights("lora", &trained, &adapter.tensors, 1e-3, |_| false);
}

#[test]
fn full_fine_tuning_follows_the_reference_over_three_epochs() {
    let trained = three_epochs("fft");
    compare_histories(&trained, 1e-3, 3e-3, 3e-3);
    let weights = read_safetensors(&last_checkpoint(&trained).join("model.safetensors")).expect("weights");
    // Tensors whose true gradient is zero receive rounding noise, which Adam makes into full-size steps.
    let noise = |name: &str| {
        name.ends_with("attention.self.key.bias")
            || (name.contains("linear_c") && name.ends_with("bias"))
            || name == "segformer.encoder.layer_norm.3.bias"
    };
    compare_weights("fft", &trained, &weights, 5e-3, noise);
}

/// A small model, and options with everything random switched on.
fn small() -> (SegformerConfig, TrainOptions) {
    let config = SegformerConfig {
        hidden_sizes: vec![8, 16, 24, 32],
        num_attention_heads: vec![1, 2, 3, 4],
        depths: vec![1, 1, 1, 1],
        decoder_hidden_size: 32,
        ..SegformerConfig::default()
    };
    let options = TrainOptions {
        epochs: 4,
        lr: 2e-3,
        batch_size: 3,
        grad_accum: 2,
        eval_batch_size: 4,
        ..TrainOptions::default()
    };
    (config, options)
}

/// Rows without what a clock decides.
fn timeless(history: &[HistoryRow]) -> Vec<HistoryRow> {
    let strip = |row: &HistoryRow| HistoryRow {
        eval_runtime: None,
        eval_samples_per_second: None,
        eval_steps_per_second: None,
        train_runtime: None,
        train_samples_per_second: None,
        train_steps_per_second: None,
        ..row.clone()
    };
    history.iter().map(strip).collect()
}

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    std::fs::read_dir(dir)
        .expect("folder")
        .map(|entry| {
            let path = entry.expect("entry").path();
            (path.file_name().expect("name").to_string_lossy().into(), std::fs::read(&path).expect("file"))
        })
        .collect()
}

/// A run that is cut off after its second epoch and continued ends as one that was not: history, final weights and all.
#[test]
fn a_resumed_run_is_bit_equal() {
    let scratch = tempfile::tempdir().expect("scratch");
    let data = packed(scratch.path(), 12, 64);
    let split = Split::seeded(data.len(), 0.75, 3);
    let (config, fft) = small();
    let lora = LoraOptions { dropout: 0.1, train_head: true, ..lora_options(4, 8.0) };
    for (name, method) in [("fft", Method::Fft), ("lora", Method::Lora(lora))] {
        let options = TrainOptions { method, ..fft.clone() };
        let start = Start {
            name: "random".into(),
            weights: Weights::Random(config.clone()),
            adapter: None,
            adapter_name: String::new(),
        };
        let inputs = Inputs { data: &data, split: &split, model: &start };
        // Each on the model of the one before.
        let mut seat = Seat::new(&Place::Cpu);
        let whole = scratch.path().join(format!("{name}-whole"));
        let record = run(name, &options, &inputs, &mut seat, &whole, &Progress::quiet()).expect("trained");

        // What a kill after epoch 2 leaves: that epoch's checkpoint, and a later one half written.
        let cut = scratch.path().join(format!("{name}-cut"));
        let all = TrainOptions { keep_checkpoints: 99, ..options.clone() };
        run(name, &all, &inputs, &mut seat, &cut, &Progress::quiet()).expect("trained");
        let per_epoch = record.training_history[0].step;
        for entry in std::fs::read_dir(&cut).expect("folder") {
            let path = entry.expect("entry").path();
            let file = path.file_name().expect("name").to_string_lossy().into_owned();
            let step = file.strip_prefix("checkpoint-").and_then(|s| s.parse::<u64>().ok());
            match step {
                Some(step) if step <= 2 * per_epoch => {}
                _ if path.is_dir() => std::fs::remove_dir_all(&path).expect("removed"),
                _ => std::fs::remove_file(&path).expect("removed"),
            }
        }
        let half = cut.join(format!(".checkpoint-{}.unfinished", 3 * per_epoch));
        std::fs::create_dir(&half).expect("folder");
        std::fs::write(half.join("model.safetensors"), b"half").expect("file");

        let resumed = run(name, &options, &inputs, &mut seat, &cut, &Progress::quiet()).expect("resumed");
        assert_eq!(timeless(&resumed.training_history), timeless(&record.training_history), "{name}");
        assert_eq!(files(&cut.join("final")), files(&whole.join("final")), "{name}");
    }
}

/// Runs one after the other in one seat, some of equal shape and some not, one of which diverges, end as runs in seats of their own.
#[test]
fn runs_on_the_model_of_the_run_before_are_bit_equal() {
    let scratch = tempfile::tempdir().expect("scratch");
    let data = packed(scratch.path(), 10, 64);
    let split = Split::seeded(data.len(), 0.8, 3);
    let (config, small) = small();
    let start =
        Start { name: "random".into(), weights: Weights::Random(config), adapter: None, adapter_name: String::new() };
    let inputs = Inputs { data: &data, split: &split, model: &start };
    let lora = |rank, alpha, dropout| Method::Lora(LoraOptions { dropout, ..lora_options(rank, alpha) });
    let wild = TrainOptions { method: lora(4, 4.0, 0.0), lr: 1e30, warmup_ratio: 0.0, ..small.clone() };
    let seeded = TrainOptions { method: Method::Fft, seed: 5, ..small.clone() };
    let with = |method| TrainOptions { method, epochs: 2, ..small.clone() };
    let cases = [
        with(Method::Fft),
        seeded,
        with(lora(4, 4.0, 0.0)),
        with(lora(4, 16.0, 0.0)),
        wild,
        with(lora(4, 4.0, 0.0)),
        with(lora(8, 8.0, 0.0)),
        with(lora(8, 8.0, 0.1)),
        with(lora(8, 32.0, 0.1)),
    ];
    let mut seat = Seat::new(&Place::Cpu);
    for (i, options) in cases.iter().enumerate() {
        let out = |seat: &str| scratch.path().join(format!("{seat}-{i}"));
        let train = |seat: &mut Seat<'_>, out: PathBuf| {
            let record = run("run", options, &inputs, seat, &out, &Progress::quiet()).map_err(|e| e.kind)?;
            Ok::<_, Kind>((timeless(&record.training_history), files(&out.join("final"))))
        };
        let shared = train(&mut seat, out("shared"));
        let own = train(&mut Seat::new(&Place::Cpu), out("own"));
        assert_eq!(shared.as_ref().err(), (options.lr > 1.0).then_some(&Kind::Diverged), "run {i}");
        assert!(shared == own, "run {i}");
    }
}

/// Equal bits from one, two and three threads.
#[test]
fn threads_do_not_change_a_bit() {
    let scratch = tempfile::tempdir().expect("scratch");
    let data = packed(scratch.path(), 10, 64);
    let split = Split::seeded(data.len(), 0.8, 3);
    let (config, options) = small();
    let start =
        Start { name: "random".into(), weights: Weights::Random(config), adapter: None, adapter_name: String::new() };
    let inputs = Inputs { data: &data, split: &split, model: &start };
    let results: Vec<_> = (1..=3)
        .map(|threads| {
            let out = scratch.path().join(format!("run-{threads}"));
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("pool");
            let record = pool
                .install(|| run("run", &options, &inputs, &mut Seat::new(&Place::Cpu), &out, &Progress::quiet()))
                .expect("trained");
            (timeless(&record.training_history), files(&out.join("final")))
        })
        .collect();
    assert!(results[0] == results[1] && results[0] == results[2]);
}

/// Where there are more threads than pictures, several work on one.
#[test]
fn threads_that_share_a_picture_do_not_change_a_bit() {
    let config = SegformerConfig::default();
    let trainable = Trainable::Everything;
    let stream = Philox::new(1, Purpose::Demo, 0, 0);
    // The small ones leave a thread products of so few rows that the matrix kernels take another way.
    for (size, threads) in [(160, [1, 2, 5, 7]), (32, [1, 3, 4, 8])] {
        let pictures: Vec<(Vec<u8>, Vec<u8>)> = (0..3)
            .map(|i| {
                let pixels = (0..size * size * 3).map(|at| stream.word((i * 100_000 + at) as u64) as u8).collect();
                (pixels, (0..size * size).map(|at| u8::from(at / 37 % 3 == i % 3)).collect())
            })
            .collect();
        let results: Vec<_> = threads
            .into_iter()
            .map(|threads| {
                let options = ModelOptions { size, batch: 3 };
                let mut model =
                    Model::new(Cpu::<f32>::new(Some(threads)).expect("threads"), &config, options, &trainable);
                for i in 0..model.plan().specs.len() {
                    let n = model.plan().specs[i].len();
                    // Variances must be positive.
                    let shift = if model.plan().specs[i].name.ends_with("running_var") { 1.0 } else { -0.1 };
                    let values: Vec<f32> =
                        (0..n).map(|at| 0.2 * stream.uniform((i * 7919 + at) as u64) + shift).collect();
                    model.set(Id(i), &values);
                }
                model.refresh();
                let mut numbers: Vec<(String, Vec<f32>)> = Vec::new();
                for images in [1, 2, 3] {
                    let samples: Vec<Sample<'_>> = (pictures[..images].iter().enumerate())
                        .map(|(index, (pixels, labels))| Sample { index, pixels, labels, augment: Augment::IDENTITY })
                        .collect();
                    model.clear_gradients();
                    model.train_micro_batch(
                        &samples,
                        1.0 / (size * size) as f64,
                        StepRandom { seed: 3, step: images as u32 },
                    );
                    model.finish_gradients();
                    for logits in model.training_logits(images) {
                        numbers.push((format!("logits in training, {images} pictures"), logits));
                    }
                    for (name, id) in model.trained() {
                        numbers.push((
                            format!("gradient of {name}"),
                            model.gradient(id).expect("a trained tensor has one"),
                        ));
                    }
                    let evaluated = model.evaluate(&samples);
                    numbers.push(("losses".into(), evaluated.loss.iter().map(|&x| x as f32).collect()));
                    numbers.push(("counts".into(), evaluated.counts.iter().map(|&x| x as f32).collect()));
                    numbers.push(("logits".into(), model.logits(&samples).concat()));
                }
                numbers
            })
            .collect();
        for (what, numbers) in &results[0] {
            assert!(numbers.iter().all(|x| x.is_finite()), "{what}");
        }
        for other in &results[1..] {
            for ((what, a), (_, b)) in results[0].iter().zip(other) {
                let different = a.iter().zip(b).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
                assert!(different == 0, "{size}x{size}, {what}: {different} of {} numbers", a.len());
            }
        }
    }
}

/// Evaluation may multiply less precisely than training does, between whose steps it stands.
#[test]
fn evaluation_leaves_training_as_it_was() {
    let size = 64;
    let pixels: Vec<u8> = (0..size * size * 3).map(|at| (at * 31 % 251) as u8).collect();
    let labels: Vec<u8> = (0..size * size).map(|at| u8::from(at % 5 == 0)).collect();
    let samples = [Sample { index: 0, pixels: &pixels, labels: &labels, augment: Augment::IDENTITY }];
    let options = ModelOptions { size, batch: 1 };
    let backend = Cpu::<f32>::new(Some(2)).expect("threads");
    let mut model = Model::new(backend, &SegformerConfig::default(), options, &Trainable::Everything);
    let stream = Philox::new(2, Purpose::Demo, 0, 0);
    for i in 0..model.plan().specs.len() {
        let values = (0..model.plan().specs[i].len()).map(|at| 0.1 + 0.1 * stream.uniform((i * 7919 + at) as u64));
        model.set(Id(i), &values.collect::<Vec<f32>>());
    }
    model.refresh();
    let step = |model: &mut Model<Cpu<f32>>| {
        model.clear_gradients();
        model.train_micro_batch(&samples, 1.0, StepRandom { seed: 3, step: 1 });
        model.finish_gradients();
        let gradients = model.trained().map(|(_, id)| model.gradient(id).expect("a trained tensor has one"));
        (model.training_logits(1).concat(), gradients.collect::<Vec<_>>().concat())
    };
    let before = step(&mut model);
    assert!(before.1.iter().all(|x| x.is_finite()) && before.1.iter().any(|x| *x != 0.0));
    let evaluated = [model.logits(&samples).concat(), model.logits(&samples).concat()];
    assert!(evaluated[0] == evaluated[1]);
    assert!(step(&mut model) == before);
}

/// Every part of the starting point that is wrong is named.
#[test]
fn a_start_that_does_not_fit_is_refused() {
    let scratch = tempfile::tempdir().expect("scratch");
    let data = packed(scratch.path(), 5, 64);
    let split = Split::seeded(data.len(), 0.8, 3);
    let (config, options) = small();
    let good = start(&config, None);
    let attempt = |change: &dyn Fn(&mut StateDict), method: Method| {
        let mut start = good.clone();
        let Weights::Checkpoint(checkpoint) = &mut start.weights else { unreachable!("made from a checkpoint") };
        change(&mut checkpoint.tensors);
        let options = TrainOptions { method, epochs: 1, ..options.clone() };
        let inputs = Inputs { data: &data, split: &split, model: &start };
        run("run", &options, &inputs, &mut Seat::new(&Place::Cpu), &scratch.path().join("out"), &Progress::quiet())
    };
    let query = "segformer.encoder.block.0.0.attention.self.query.weight";
    let missing = attempt(&|t| drop(t.remove(query)), Method::Fft).expect_err("missing tensor");
    assert!(missing.to_string().contains(query), "{missing}");
    let reshape = |t: &mut StateDict| {
        t.insert(query.into(), HostTensor { shape: vec![4, 16], data: HostData::F32(vec![0.0; 64]) });
    };
    let reshaped = attempt(&reshape, Method::Fft).expect_err("wrong shape");
    assert!(reshaped.to_string().contains(query) && reshaped.to_string().contains("[8, 8]"), "{reshaped}");
    let targets = LoraOptions { targets: vec!["qeury".into()], ..lora_options(4, 8.0) };
    let unmatched = attempt(&|_| {}, Method::Lora(targets)).expect_err("no match");
    assert!(unmatched.to_string().contains("qeury"), "{unmatched}");
    let dropout = LoraOptions { targets: vec!["sr".into()], dropout: 0.1, ..lora_options(4, 8.0) };
    let refused = attempt(&|_| {}, Method::Lora(dropout)).expect_err("dropout at a convolution");
    assert!(refused.to_string().contains("--lora-dropout"), "{refused}");
    assert!(!scratch.path().join("out").exists(), "a refused run leaves nothing");
}

/// Diverging ends with an error, not with NaN in the results.
#[test]
fn divergence_is_an_error() {
    let scratch = tempfile::tempdir().expect("scratch");
    let data = packed(scratch.path(), 5, 64);
    let split = Split::seeded(data.len(), 0.8, 3);
    let (config, options) = small();
    let options = TrainOptions { lr: 1e30, warmup_ratio: 0.0, ..options };
    let start =
        Start { name: "random".into(), weights: Weights::Random(config), adapter: None, adapter_name: String::new() };
    let inputs = Inputs { data: &data, split: &split, model: &start };
    let error =
        run("run", &options, &inputs, &mut Seat::new(&Place::Cpu), &scratch.path().join("out"), &Progress::quiet())
            .expect_err("diverged");
    assert_eq!(error.kind, Kind::Diverged, "{error}");
}
