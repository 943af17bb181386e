//! What the real program does with files and machines that are not as they should be: one clear line, the documented exit
//! code, nothing half-written in place of something whole.
#![allow(missing_docs)]

mod common;
mod program;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use program::*;
use segpeft_native::formats::{
    Adapter, AdapterConfig, HfNames, HostData, HostTensor, StateDict, adapter, checkpoint, read_safetensors,
    write_safetensors,
};
use segpeft_native::segformer::{Module, SegformerConfig, modules};
use serde_json::{Value, json};

// --- Models ---------------------------------------------------------------------------------------------------------

fn config() -> SegformerConfig {
    SegformerConfig {
        hidden_sizes: vec![8, 16, 24, 32],
        num_attention_heads: vec![1, 2, 3, 4],
        depths: vec![1, 1, 1, 1],
        decoder_hidden_size: 32,
        ..SegformerConfig::default()
    }
}

fn weights() -> StateDict {
    let formula = |name: &str, shape: &[usize]| HostTensor {
        shape: shape.to_vec(),
        data: HostData::F32(common::tensor(name, shape)),
    };
    modules(&config()).iter().flat_map(Module::tensors).map(|s| (s.name.clone(), formula(&s.name, &s.shape))).collect()
}

const QUERY: &str = "segformer.encoder.block.0.0.attention.self.query";

fn numbers(shape: &[usize], value: f32) -> HostTensor {
    HostTensor { shape: shape.to_vec(), data: HostData::F32(vec![value; shape.iter().product()]) }
}

/// Writes the model `dir` with its tensors changed.
fn model(dir: &Path, change: impl FnOnce(&mut StateDict)) {
    let mut tensors = weights();
    change(&mut tensors);
    checkpoint::write(dir, &config(), &tensors, 32).expect("model");
}

/// Writes an adapter of rank 2 on the query of the first block, changed.
fn adapted(dir: &Path, change: impl FnOnce(&mut Adapter)) {
    let mut adapter = Adapter {
        config: AdapterConfig {
            r: 2,
            lora_alpha: 4.0,
            lora_dropout: 0.0,
            use_rslora: false,
            target_modules: vec![QUERY.into()],
            modules_to_save: Vec::new(),
            base_model: "model".into(),
        },
        tensors: [("lora_A", [2, 8]), ("lora_B", [8, 2])]
            .map(|(factor, shape)| (format!("{QUERY}.{factor}.weight"), numbers(&shape, 0.01)))
            .into(),
        sidecar: StateDict::new(),
    };
    change(&mut adapter);
    adapter::write(dir, &adapter, HfNames::V4).expect("adapter");
}

fn change(file: &Path, edit: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(file).expect("file");
    edit(&mut bytes);
    fs::write(file, bytes).expect("file");
}

fn change_json(file: &Path, field: &str, value: Value) {
    let mut object: Value = serde_json::from_slice(&fs::read(file).expect("file")).expect("JSON");
    object[field] = value;
    fs::write(file, object.to_string()).expect("file");
}

/// A state dict's file as `torch.save` writes it, with the pickle `data`.
fn torch_file(data: &[u8]) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let options = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    zip.start_file("archive/data.pkl", options).expect("zip");
    zip.write_all(data).expect("zip");
    zip.finish().expect("zip").into_inner()
}

/// Every command that takes a model, or a model and an adapter.
fn commands<'a>(model: &'a str, adapter: Option<&'a str>) -> Vec<Vec<&'a str>> {
    let short = ["--data", "data", "--size", "32", "--epochs", "1", "--batch-size", "4"];
    let given = match adapter {
        None => vec!["--model", model],
        Some(adapter) => vec!["--model", model, "--adapter", adapter],
    };
    let all = [
        [&["train", "--out", "made"], &short[..], &given].concat(),
        [&["eval", "--data", "data", "--size", "32"], &given[..]].concat(),
        [&["predict", "data/images/p00.png", "--size", "32", "--out", "made"], &given[..]].concat(),
        [&["export", "--out", "made"][..], if adapter.is_some() { &["--merge"] } else { &[] }, &given].concat(),
    ];
    all.into_iter().map(|command| [&command[..], &["-q"]].concat()).collect()
}

/// Every command refuses the model or adapter with a line that names it and holds `words`, and makes no result.
fn refused(folder: &Path, model: &str, adapter: Option<&str>, words: &[&str]) {
    for command in commands(model, adapter) {
        fails(folder, &command, INPUT, &[&[adapter.unwrap_or(model)], words].concat());
        for result in ["final", "all_metrics.json", "config.json", "masks/p00.png"] {
            assert!(!folder.join("made").join(result).exists(), "{command:?} left {result}");
        }
        let _ = fs::remove_dir_all(folder.join("made"));
    }
}

#[test]
fn models_that_are_not_whole_are_refused_by_every_command() {
    let folder = scratch();
    let at = |name: &str| folder.path().join(name);
    let query = format!("{QUERY}.weight");
    model(&at("whole"), |_| ());
    for command in commands("whole", None) {
        succeeds(folder.path(), &command);
        let _ = fs::remove_dir_all(at("made"));
    }

    model(&at("shape"), |t| drop(t.insert(query.clone(), numbers(&[8, 9], 0.5))));
    refused(folder.path(), "shape", None, &[&query, "[8, 9]", "[8, 8]"]);
    model(&at("lacks"), |t| drop(t.remove(&query)));
    refused(folder.path(), "lacks", None, &["lacks", &query]);
    model(&at("integers"), |t| {
        t.insert(query.clone(), HostTensor { shape: vec![8, 8], data: HostData::I64(vec![1; 64]) });
    });
    refused(folder.path(), "integers", None, &[&query, "integers"]);
    for (name, value) in [("nan", f32::NAN), ("infinite", f32::INFINITY)] {
        model(&at(name), |t| drop(t.insert(query.clone(), numbers(&[8, 8], value))));
        refused(folder.path(), name, None, &["model.safetensors", &query]);
    }

    for (name, length) in [("hostile", u64::MAX), ("long", 7 << 20)] {
        model(&at(name), |_| ());
        change(&at(name).join("model.safetensors"), |b| b[..8].copy_from_slice(&length.to_le_bytes()));
        refused(folder.path(), name, None, &["model.safetensors", "header"]);
    }
    model(&at("cut"), |_| ());
    change(&at("cut").join("model.safetensors"), |b| b.truncate(b.len() / 2));
    refused(folder.path(), "cut", None, &["truncated", "fetch it again"]);

    for (name, field, value) in [
        ("deep", "depths", json!([1_000_000, 1, 1, 1])),
        ("wide", "hidden_sizes", json!([8, 16, 24, 1u64 << 40])),
        ("still", "strides", json!([0, 2, 2, 2])),
        ("other", "model_type", json!("vit")),
        ("act", "hidden_act", json!("relu")),
        ("ignores", "semantic_loss_ignore_index", json!(1)),
    ] {
        model(&at(name), |_| ());
        change_json(&at(name).join("config.json"), field, value);
        refused(folder.path(), name, None, &["config.json", field]);
    }
    model(&at("deeper"), |_| ());
    change_json(&at("deeper/config.json"), "depths", json!([1, 1, 1, 2]));
    refused(folder.path(), "deeper", None, &["lacks", "block.3.1"]);
    // Of other strides than the published models', but in order: logits are as large as the first stage.
    model(&at("finer"), |_| ());
    change_json(&at("finer/config.json"), "strides", json!([2, 2, 2, 2]));
    let mut predict = commands("finer", None).swap_remove(2);
    predict.extend(["--save-logits", "made.safetensors"]);
    succeeds(folder.path(), &predict);
    let logits = read_safetensors(&at("made.safetensors")).expect("logits");
    assert_eq!(logits["p00"].shape, [2, 16, 16]);
    let _ = fs::remove_dir_all(at("made"));
    model(&at("coarse"), |_| ());
    change_json(&at("coarse/config.json"), "strides", json!([8, 2, 2, 2]));
    for command in &commands("coarse", None)[..3] {
        fails(folder.path(), command, USAGE, &["--size", "sr_ratios[0] = 8", "32 x 32"]);
        let _ = fs::remove_dir_all(at("made"));
    }

    model(&at("bare"), |_| ());
    fs::remove_file(at("bare/config.json")).unwrap();
    refused(folder.path(), "bare", None, &["config.json", "no such file"]);
}

#[test]
fn a_model_without_a_head_can_be_trained_but_not_used() {
    let folder = scratch();
    model(&folder.path().join("encoder"), |t| t.retain(|name, _| !name.starts_with("decode_head.")));
    for command in &commands("encoder", None)[1..] {
        fails(folder.path(), command, INPUT, &["encoder", "fine-tune it first"]);
        assert!(!folder.path().join("made").exists());
    }
    succeeds(folder.path(), &commands("encoder", None)[0]);
}

#[test]
fn a_pickle_that_wants_to_run_something_does_not() {
    let folder = scratch();
    model(&folder.path().join("pickle"), |_| ());
    fs::remove_file(folder.path().join("pickle/model.safetensors")).unwrap();
    let file = folder.path().join("pickle/pytorch_model.bin");
    for (data, words) in [
        (&b"\x80\x02cos\nsystem\nX\x0b\x00\x00\x00touch pwned\x85R."[..], "\"os.system\""),
        (b"\x80\x02cbuiltins\nexec\nX\x14\x00\x00\x00open('pwned','w')    \x85R.", "\"builtins.exec\""),
        (b"\x80\x02X\x01\x00\x00\x00aX\x02\x00\x00\x00bc", "the file ends"),
    ] {
        fs::write(&file, torch_file(data)).unwrap();
        let words = if words.starts_with('"') { vec!["pytorch_model.bin", words] } else { vec!["pytorch_model.bin"] };
        refused(folder.path(), "pickle", None, &words);
        assert!(!folder.path().join("pwned").exists());
    }
    for bytes in [&b"PK\x03\x04 and no more"[..], b"\x80\x02}q\x00.", b""] {
        fs::write(&file, bytes).unwrap();
        refused(folder.path(), "pickle", None, &["pytorch_model.bin"]);
    }
}

#[test]
fn adapters_that_do_not_fit_are_refused_by_every_command() {
    let folder = scratch();
    let at = |name: &str| folder.path().join(name);
    model(&at("model"), |_| ());
    let (a, b) = (format!("{QUERY}.lora_A.weight"), format!("{QUERY}.lora_B.weight"));
    adapted(&at("whole"), |_| ());
    for command in commands("model", Some("whole")) {
        succeeds(folder.path(), &command);
        let _ = fs::remove_dir_all(at("made"));
    }

    let refused = |name: &str, words: &[&str]| refused(folder.path(), "model", Some(name), words);
    adapted(&at("shape"), |x| drop(x.tensors.insert(a.clone(), numbers(&[2, 9], 0.1))));
    refused("shape", &[QUERY]);
    adapted(&at("rank"), |x| drop(x.tensors.insert(a.clone(), numbers(&[3, 8], 0.1))));
    refused("rank", &["adapter_model.safetensors", "rank 2"]);
    adapted(&at("half"), |x| drop(x.tensors.remove(&b)));
    refused("half", &["lora_A but no lora_B"]);
    adapted(&at("nan"), |x| drop(x.tensors.insert(b.clone(), numbers(&[8, 2], f32::NAN))));
    refused("nan", &["adapter_model.safetensors", "NaN"]);
    adapted(&at("stranger"), |x| {
        let there = |name: &String| name.replace("block.0.0", "block.0.7");
        x.tensors.extend(x.tensors.clone().iter().map(|(name, t)| (there(name), t.clone())));
    });
    refused("stranger", &["block.0.7", "belongs to another"]);
    adapted(&at("sidecar"), |x| {
        x.sidecar.insert("decode_head.batch_norm.running_mean".into(), numbers(&[7], 0.0));
    });
    refused("sidecar", &["decode_head.batch_norm.running_mean", "[7]", "[32]"]);
    for (name, field, value) in [
        ("zero", "r", json!(0)),
        ("huge", "r", json!(1u64 << 40)),
        ("minus", "r", json!(-4)),
        ("alpha", "lora_alpha", json!("16")),
        ("dora", "use_dora", json!(true)),
        ("prefix", "peft_type", json!("PREFIX_TUNING")),
    ] {
        adapted(&at(name), |_| ());
        change_json(&at(name).join("adapter_config.json"), field, value);
        refused(name, &["adapter_config.json", field]);
    }
    adapted(&at("hostile"), |_| ());
    change(&at("hostile/adapter_model.safetensors"), |b| b[..8].fill(0xFF));
    refused("hostile", &["adapter_model.safetensors", "header"]);
    adapted(&at("side"), |x| drop(x.sidecar.insert("decode_head.classifier.bias".into(), numbers(&[2], 0.0))));
    change(&at("side/segpeft_sidecar.safetensors"), |b| b.truncate(20));
    refused("side", &["segpeft_sidecar.safetensors"]);
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        adapted(&at("missing"), |_| ());
        fs::remove_file(at("missing").join(file)).unwrap();
        refused("missing", &[file, "no such file"]);
    }
}

#[test]
fn an_adapter_without_its_sidecar_brings_a_warning() {
    let folder = scratch();
    model(&folder.path().join("model"), |_| ());
    adapted(&folder.path().join("bare"), |_| ());
    for command in commands("model", Some("bare")) {
        let text = stderr(&succeeds(folder.path(), &command));
        assert!(text.starts_with("warning: bare: ") && text.contains("segpeft_sidecar.safetensors"), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
        if command[0] == "train" {
            fs::rename(folder.path().join("made"), folder.path().join("trained")).unwrap();
        }
        let _ = fs::remove_dir_all(folder.path().join("made"));
    }
    // What is trained here has one.
    for command in commands("model", Some("trained/final")) {
        assert_eq!(stderr(&succeeds(folder.path(), &command)), "");
        let _ = fs::remove_dir_all(folder.path().join("made"));
    }
}

// --- Data -----------------------------------------------------------------------------------------------------------

#[test]
fn bad_sources_end_prepare_and_train_alike() {
    let folder = scratch();
    let at = |name: &str| folder.path().join(name);
    let picture = fs::read(at("data/images/p00.png")).unwrap();
    let fresh = |name: &str| {
        for part in ["images", "masks"] {
            fs::create_dir_all(at(name).join(part)).unwrap();
            for i in 0..3 {
                let file = format!("{part}/p{i:02}.png");
                fs::copy(at("data").join(&file), at(name).join(&file)).unwrap();
            }
        }
    };
    for name in ["mask", "cut", "text", "unequal", "empty"] {
        fresh(name);
    }
    fs::remove_file(at("mask/masks/p01.png")).unwrap();
    fs::write(at("cut/images/p01.png"), &picture[..picture.len() / 2]).unwrap();
    fs::write(at("text/images/p01.png"), "hello").unwrap();
    let small = image::GrayImage::from_pixel(20, 40, image::Luma([255]));
    small.save(at("unequal/masks/p01.png")).unwrap();
    fs::remove_dir_all(at("empty/images")).unwrap();
    fs::create_dir(at("empty/images")).unwrap();
    fs::create_dir(at("nothing")).unwrap();
    fs::write(at("wrong.zip"), torch_file(b"no pictures")).unwrap();
    fs::write(at("cut.zip"), &torch_file(b"no pictures")[..40]).unwrap();
    for (source, words) in [
        ("mask", "images/p01.png"),
        ("cut", "images/p01.png"),
        ("text", "images/p01.png"),
        ("unequal", "masks/p01.png"),
        ("empty", "empty"),
        ("nothing", "images/ and masks/"),
        ("wrong.zip", "no pictures in images/ and masks/"),
        ("cut.zip", "not a zip archive"),
        ("nowhere", "nowhere"),
    ] {
        fails(folder.path(), &["prepare", source, "--out", "x.pack", "--size", "32", "-q"], INPUT, &[source, words]);
        let train = ["train", "--data", source, "--model", "random", "--size", "32", "--out", "runs/x", "-q"];
        fails(folder.path(), &train, INPUT, &[source, words]);
        let text = stderr(&run(folder.path(), &["prepare", source, "--out", "x.pack", "--size", "32", "-q"]));
        assert!(!text.contains("packed file"), "prepare takes none: {text}");
        assert!(!at("x.pack").exists());
        let left = |name: &str| name.ends_with(".pack") || name.ends_with(".tmp");
        assert!(!names(&at("")).iter().any(|name| left(name)) && !names(&at("runs/cache")).iter().any(|n| left(n)));
    }
}

#[test]
fn splits_that_do_not_fit_are_refused() {
    let folder = scratch();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("split")).unwrap();
    fs::write(at("split/train.txt"), "p01\nstranger\n").unwrap();
    fs::write(at("split/val.txt"), "p02\n").unwrap();
    let train = with("train", &["--split", "split", "--out", "run", "-q"]);
    fails(folder.path(), &train, INPUT, &["split/train.txt: line 2", "stranger", "split is of another dataset"]);
    for i in 1..12 {
        for part in ["images", "masks"] {
            fs::remove_file(at("data").join(part).join(format!("p{i:02}.png"))).unwrap();
        }
    }
    fails(folder.path(), &with("train", &["--out", "run", "-q"]), INPUT, &["1 image in the dataset, 1 for training"]);
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten();
    entries.map(|entry| entry.expect("entry").file_name().to_string_lossy().into_owned()).collect()
}

#[test]
fn packed_files_that_are_damaged_are_refused_by_train() {
    let folder = scratch();
    let pack = folder.path().join("x.pack");
    succeeds(folder.path(), &["prepare", "data", "--out", "x.pack", "--size", "32"]);
    let whole = fs::read(&pack).unwrap();
    let refused = |bytes: &[u8], words: &str| {
        fs::write(&pack, bytes).unwrap();
        let train = ["train", "--data", "x.pack", "--model", "random", "--out", "run", "-q"];
        fails(folder.path(), &train, INPUT, &["x.pack", words]);
        assert_eq!(fs::read(&pack).unwrap(), bytes, "the file is left as it is");
        assert!(!folder.path().join("run/run_config.json").exists());
    };
    refused(&whole[..whole.len() - 1], "truncated");
    refused(&whole[..50], "truncated");
    let mut other = whole.clone();
    other[8] = 9;
    refused(&other, "");
    for at in [60, whole.len() / 2, whole.len() - 1] {
        let mut flipped = whole.clone();
        flipped[at] ^= 16;
        refused(&flipped, "prepare");
    }
}

// --- Sizes ----------------------------------------------------------------------------------------------------------

/// No machine that runs tests has the memory; none of it is touched.
#[test]
fn more_than_the_memory_is_refused_before_training() {
    if !cfg!(target_os = "linux") {
        return;
    }
    let folder = scratch();
    let doctor = ["doctor", "--step", "fft", "--size", "4096", "--batch-size", "1024", "--threads", "2"];
    fails(folder.path(), &doctor, DEVICE, &["1024 images at 4096 x 4096", "--batch-size", "GB"]);
    let doctor = ["doctor", "--step", "fft", "--batch-size", "1025"];
    fails(folder.path(), &doctor, USAGE, &["--batch-size"]);
}

// --- Outputs --------------------------------------------------------------------------------------------------------

#[test]
fn no_command_writes_where_a_file_is_in_the_way() {
    let folder = scratch();
    model(&folder.path().join("model"), |_| ());
    fs::write(folder.path().join("file"), "precious").unwrap();
    let logits = ["--save-logits", "file/x.safetensors"];
    let predict = ["predict", "data/images", "--size", "32", "--model", "model", "--out"];
    for command in [
        vec!["prepare", "data", "--size", "32", "--out", "file/x.pack"],
        vec!["export", "--model", "model", "--out", "file/x"],
        vec!["export", "--model", "model", "--out", "file"],
        [&predict[..], &["file/x"]].concat(),
        [&predict[..], &["made"], &logits].concat(),
        vec!["eval", "--data", "data", "--size", "32", "--model", "model", "--cache", "file/cache"],
    ] {
        let remedy = if command.contains(&"--cache") { "--cache names another folder" } else { "" };
        fails(folder.path(), &[&command[..], &["-q"]].concat(), IO, &["file", remedy]);
    }
    assert_eq!(fs::read(folder.path().join("file")).unwrap(), b"precious");
}

/// Runs the program where no file may grow beyond `kilobytes`: what a full disk looks like to it.
#[cfg(target_os = "linux")]
fn fails_on_a_full_disk(folder: &Path, kilobytes: usize, arguments: &[&str], words: &[&str]) {
    // Without the signal, which would end the program, the failed write is reported to it.
    let script = format!("trap '' XFSZ; ulimit -f {}; exec \"$@\"", 2 * kilobytes);
    let output = Command::new("sh")
        .current_dir(folder)
        .args(["-c", &script, "sh", env!("CARGO_BIN_EXE_segpeft-native")])
        .args(arguments)
        .output()
        .expect("sh starts");
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(IO), "{arguments:?}: {text}");
    let last = text.lines().last().unwrap_or_default();
    assert!(last.starts_with("error: ") && words.iter().all(|word| last.contains(word)), "{arguments:?}: {text}");
    assert_eq!(text.matches("error: ").count(), 1, "{text}");
}

/// Every file under `dir` by its path there.
fn tree(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    fn walk(dir: &Path, prefix: &str, files: &mut BTreeMap<String, Vec<u8>>) {
        for name in names(dir) {
            let (path, inside) = (dir.join(&name), format!("{prefix}{name}"));
            match path.is_dir() {
                true => walk(&path, &format!("{inside}/"), files),
                false => drop(files.insert(inside, fs::read(&path).expect("file"))),
            }
        }
    }
    let mut files = BTreeMap::new();
    walk(dir, "", &mut files);
    files
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_leaves_nothing_half_written() {
    let folder = scratch();
    let at = |name: &str| folder.path().join(name);
    model(&at("model"), |_| ());
    fails_on_a_full_disk(folder.path(), 16, &["prepare", "data", "--size", "32", "--out", "made/x.pack"], &["x.pack"]);
    assert_eq!(names(&at("made")), [""; 0], "the packed file of 0.1 MB did not fit");
    fails_on_a_full_disk(folder.path(), 16, &["export", "--model", "model", "--out", "made"], &["model.safetensors"]);
    assert_eq!(names(&at("made")), [""; 0], "a second try finds the folder empty");
    let predict = ["predict", "data/images", "--size", "32", "--model", "model", "--out", "seen"];
    fails_on_a_full_disk(folder.path(), 0, &predict, &["seen"]);
    assert_eq!(tree(&at("seen")).len(), 0);

    // A run in progress: its first epoch is kept, and it goes on when there is room.
    let train = ["train", "--data", "data", "--model", "model", "--size", "32", "--epochs", "12", "--patience", "12"];
    let train = [&train[..], &["--batch-size", "2", "--out", "run", "--method", "fft"]].concat();
    let mut child = program(folder.path(), &train).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_until("the first epoch is done", || at("run/training_history.csv").exists());
    interrupt(&child);
    assert_eq!(child.wait().unwrap().code(), Some(INTERRUPTED));
    let before = tree(&at("run"));
    fails_on_a_full_disk(folder.path(), 64, &train, &["run/.checkpoint-", ".safetensors"]);
    let mut after = tree(&at("run"));
    // The lock holds the number of the last process.
    after.retain(|name, _| name != ".lock");
    assert_eq!(after.keys().collect::<Vec<_>>(), before.keys().filter(|n| *n != ".lock").collect::<Vec<_>>());
    assert!(after.iter().all(|(name, bytes)| before[name] == *bytes));
    succeeds(folder.path(), &train);
}

// --- Interruption ---------------------------------------------------------------------------------------------------

#[test]
fn an_interrupted_prepare_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    for part in ["images", "masks"] {
        fs::create_dir_all(at("large").join(part)).unwrap();
    }
    let pixel = |x: u32, y: u32| image::Rgb([(x * y) as u8, (x ^ y) as u8, (x + y) as u8]);
    image::RgbImage::from_fn(1500, 1500, pixel).save(at("large/images/0.png")).unwrap();
    image::GrayImage::from_pixel(1500, 1500, image::Luma([255])).save(at("large/masks/0.png")).unwrap();
    for i in 1..1000 {
        for part in ["images", "masks"] {
            fs::hard_link(at("large").join(part).join("0.png"), at("large").join(part).join(format!("{i}.png")))
                .unwrap();
        }
    }
    for arguments in [
        &["prepare", "large", "--size", "32", "--out", "made/x.pack"][..],
        &["train", "--data", "large", "--model", "random", "--size", "32", "--cache", "made", "--out", "run"],
    ] {
        let child = program(folder.path(), arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        wait_until("packing has begun", || names(&at("made")).iter().any(|name| name.ends_with(".tmp")));
        interrupt(&child);
        let output = child.wait_with_output().unwrap();
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(INTERRUPTED), "{text}");
        assert!(text.lines().last().unwrap().contains("interrupted while packing"), "{text}");
        assert!(!names(&at("made")).iter().any(|name| name.ends_with(".tmp") || name.ends_with(".pack")));
    }
}

// --- Kill and continue ----------------------------------------------------------------------------------------------

/// The history without what a clock decides.
fn timeless(run: &Path) -> Vec<Value> {
    let record: Value = serde_json::from_slice(&fs::read(run.join("all_metrics.json")).expect("record")).expect("JSON");
    let mut rows = record["training_history"].as_array().expect("history").clone();
    for row in &mut rows {
        let fields = row.as_object_mut().expect("row");
        fields.retain(|name, _| !name.ends_with("_runtime") && !name.ends_with("_per_second"));
    }
    assert!(rows.len() >= 8, "{rows:?}");
    rows
}

enum Stop {
    Kill,
    Interrupt,
}

/// Runs the command, stopping it as soon as each of `moments` has come, then to its end.
fn stopped(folder: &Path, arguments: &[&str], moments: &[(Stop, &dyn Fn() -> bool)]) {
    for (number, (stop, moment)) in moments.iter().enumerate() {
        let mut child = program(folder, arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        wait_until(&format!("moment {number} has come"), || moment() || child.try_wait().unwrap().is_some());
        match stop {
            Stop::Kill => child.kill().unwrap(),
            Stop::Interrupt => interrupt(&child),
        }
        let status = child.wait().unwrap();
        assert!(!status.success(), "the run ended before moment {number}");
    }
    succeeds(folder, arguments);
}

/// Whether a checkpoint after epoch `epoch` of `run` has been begun: half written, or already there.
fn checkpoint_begun(run: &Path, step: usize) -> bool {
    names(run)
        .iter()
        .any(|name| *name == format!(".checkpoint-{step}.unfinished") || *name == format!("checkpoint-{step}"))
}

/// Twelve images make nine or ten for training: five micro-batches of two, three updates an epoch.
const EPOCHS: [&str; 14] = [
    "--data",
    "data",
    "--model",
    "model",
    "--size",
    "32",
    "--epochs",
    "6",
    "--batch-size",
    "2",
    "--grad-accum",
    "2",
    "--lora-dropout",
    "0.1",
];

#[test]
fn a_run_that_was_killed_and_interrupted_ends_bit_equal() {
    let folder = scratch();
    model(&folder.path().join("model"), |_| ());
    let train = |out: &'static str| [&["train", "--train-head", "--out", out], &EPOCHS[..]].concat();
    succeeds(folder.path(), &train("whole"));
    let run = folder.path().join("cut");
    stopped(
        folder.path(),
        &train("cut"),
        &[
            (Stop::Kill, &|| run.join("run_config.json").exists()),
            (Stop::Kill, &|| run.join("training_history.csv").exists()),
            (Stop::Kill, &|| checkpoint_begun(&run, 6)),
            (Stop::Interrupt, &|| checkpoint_begun(&run, 9)),
            (Stop::Kill, &|| checkpoint_begun(&run, 15)),
        ],
    );
    let whole = folder.path().join("whole");
    assert_eq!(timeless(&run), timeless(&whole));
    assert_eq!(tree(&run.join("final")), tree(&whole.join("final")));
    assert_eq!(names(&run).len(), names(&whole).len(), "nothing unfinished is left: {:?}", names(&run));
}

#[test]
fn a_damaged_checkpoint_is_one_clear_error() {
    let folder = scratch();
    model(&folder.path().join("model"), |_| ());
    for (method, file, of) in [
        ("fft", "model.safetensors", "self.query.weight"),
        ("lora", "segpeft_sidecar.safetensors", "classifier.weight"),
    ] {
        let mut train = vec!["train", "--method", method, "--out", method, "--data", "data", "--size", "32"];
        train.extend(["--model", "model", "--epochs", "1", "--batch-size", "4"]);
        succeeds(folder.path(), &train);
        // As if it had ended before its results were written.
        let run = folder.path().join(method);
        fs::remove_file(run.join("all_metrics.json")).expect("removed");
        let last = names(&run).into_iter().find(|name| name.starts_with("checkpoint-")).expect("a checkpoint");
        let file = run.join(last).join(file);
        let whole = fs::read(&file).expect("checkpoint");
        let name = read_safetensors(&file).expect("tensors").into_keys().find(|name| name.contains(of)).expect("one");
        for damage in [Some(numbers(&[3, 3], 0.5)), Some(numbers(&[400, 400], 0.5)), None] {
            let mut tensors = read_safetensors(&file).expect("tensors");
            match damage {
                Some(other) => drop(tensors.insert(name.clone(), other)),
                None => drop(tensors.remove(&name)),
            }
            write_safetensors(&file, &tensors, &[]).expect("written");
            fails(folder.path(), &train, INPUT, &["checkpoint-", of, "delete"]);
            fs::write(&file, &whole).expect("restored");
        }
        succeeds(folder.path(), &train);
    }
}

#[test]
fn a_grid_that_was_killed_and_interrupted_ends_bit_equal() {
    let folder = scratch();
    model(&folder.path().join("model"), |_| ());
    let short: Vec<&str> = EPOCHS.into_iter().map(|a| if a == "6" { "3" } else { a }).collect();
    let grid = |out: &'static str| [&["ablate", "--ranks", "2", "--ratios", "1", "--out", out], &short[..]].concat();
    succeeds(folder.path(), &grid("whole"));
    let run = |name: &str| folder.path().join("cut").join(name);
    let (fft, lora) = (run("segformer_fft_baseline"), run("lora_r2_alpha2"));
    stopped(
        folder.path(),
        &grid("cut"),
        &[
            (Stop::Kill, &|| checkpoint_begun(&fft, 6)),
            (Stop::Kill, &|| lora.join("train.txt").exists()),
            (Stop::Interrupt, &|| checkpoint_begun(&lora, 3)),
        ],
    );
    for name in ["segformer_fft_baseline", "lora_r2_alpha2"] {
        let (cut, whole) = (run(name), folder.path().join("whole").join(name));
        assert_eq!(timeless(&cut), timeless(&whole), "{name}");
        assert_eq!(tree(&cut.join("final")), tree(&whole.join("final")), "{name}");
    }
    let table = |out: &str| -> Vec<String> {
        let text = fs::read_to_string(folder.path().join(out).join("summary.csv")).expect("summary");
        text.lines().map(|line| line.split(',').next().unwrap_or_default().into()).collect()
    };
    assert_eq!(table("cut"), table("whole"));
}
