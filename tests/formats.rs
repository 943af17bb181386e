//! Files of the Hugging Face world: what is written reads back, what is hostile is refused in one line.
//!
//! With `SEGPEFT_PUBLISHED` set to the folder of the published adapters, these are read too; with `SEGPEFT_EXCHANGE`, files
//! are exchanged with Python (see `tools/reference/roundtrip.py`).

use std::fs;
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};

use segpeft_native::error::Kind;
use segpeft_native::formats::{
    Adapter, AdapterConfig, HfNames, HostData, HostTensor, PT_METADATA, StateDict, adapter, checkpoint, image_size,
    names, read_safetensors, read_torch, write_safetensors,
};
use segpeft_native::segformer::SegformerConfig;
use segpeft_native::{Error, Result};
use serde_json::{Value, json};
use tempfile::TempDir;
use zip::CompressionMethod;
use zip::write::{SimpleFileOptions, ZipWriter};

/// A tensor of distinct numbers.
fn numbers(shape: &[usize], first: f32) -> HostTensor {
    let data = (0..shape.iter().product::<usize>()).map(|i| first + i as f32 * 0.5).collect();
    HostTensor { shape: shape.to_vec(), data: HostData::F32(data) }
}

fn count(n: i64) -> HostTensor {
    HostTensor { shape: vec![], data: HostData::I64(vec![n]) }
}

fn model() -> StateDict {
    StateDict::from([
        ("segformer.encoder.block.0.0.attention.self.query.weight".into(), numbers(&[4, 4], -1.0)),
        ("segformer.encoder.patch_embeddings.0.proj.weight".into(), numbers(&[4, 3, 7, 7], 0.25)),
        ("decode_head.batch_norm.num_batches_tracked".into(), count(1 << 40)),
        ("decode_head.linear_c.0.proj.bias".into(), numbers(&[0], 0.0)),
    ])
}

/// Asserts that an error is one clear line of bad input that names `path` and contains `part`.
#[track_caller]
fn refused<T>(result: Result<T>, path: &Path, part: &str) {
    let error: Error = result.map(|_| ()).unwrap_err();
    let message = error.to_string();
    assert_eq!(error.kind, Kind::Input, "{message}");
    assert!(message.starts_with(&path.display().to_string()), "{message}");
    assert!(message.contains(part), "{part:?} is not in: {message}");
    assert!(!message.chars().any(char::is_control) && message.len() < 700, "{message}");
}

fn write_json(path: &Path, value: &Value) {
    fs::write(path, value.to_string()).unwrap();
}

// ---- names --------------------------------------------------------------------------------------------------------

#[test]
fn every_module_of_b0_and_b2_has_the_name_transformers_gives_it() {
    for table in [include_str!("fixtures/formats/modules_b0.txt"), include_str!("fixtures/formats/modules_b2.txt")] {
        assert!(table.lines().count() > 100);
        for line in table.lines() {
            let (v4, v5) = line.split_once(' ').unwrap();
            for end in ["", ".weight", ".lora_A.weight"] {
                assert_eq!(names::to_v5(&format!("{v4}{end}")), format!("{v5}{end}"));
                assert_eq!(names::to_v4(&format!("{v5}{end}")), format!("{v4}{end}"));
            }
        }
    }
}

// ---- safetensors --------------------------------------------------------------------------------------------------

/// A safetensors file of the given header and data.
fn safetensors(header: &Value, data: &[u8]) -> Vec<u8> {
    let header = header.to_string();
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

#[test]
fn safetensors_read_back_bit_for_bit() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("a.safetensors");
    write_safetensors(&path, &model(), PT_METADATA).unwrap();
    assert_eq!(read_safetensors(&path).unwrap(), model());
    let first = fs::read(&path).unwrap();
    write_safetensors(&path, &model(), PT_METADATA).unwrap();
    assert_eq!(fs::read(&path).unwrap(), first);
    write_safetensors(&path, &StateDict::new(), &[]).unwrap();
    assert_eq!(read_safetensors(&path).unwrap(), StateDict::new());
}

#[test]
fn hostile_safetensors_are_refused() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("model.safetensors");
    let f32s = |shape: Value, from: u64, to: u64| json!({ "dtype": "F32", "shape": shape, "data_offsets": [from, to] });
    let nan = [1.0f32, f32::NAN].map(f32::to_le_bytes).concat();
    let mut huge = safetensors(&json!({}), &[]);
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let mut long = safetensors(&json!({}), &[]);
    long[..8].copy_from_slice(&100u64.to_le_bytes());
    let big = u64::MAX / 4;
    for (bytes, part) in [
        (vec![], "shorter than a header"),
        (vec![1, 2, 3], "shorter than a header"),
        (huge, "its header claims 18446744073709551615 bytes"),
        (long, "ends within the header"),
        (safetensors(&json!({ "w": f32s(json!([2]), 0, 8) }), &[0; 4]), "truncated or too long"),
        (safetensors(&json!({ "w": f32s(json!([2]), 0, 8) }), &[0; 12]), "truncated or too long"),
        (safetensors(&json!({ "a": f32s(json!([2]), 0, 8), "b": f32s(json!([2]), 4, 12) }), &[0; 12]), "overlap"),
        (safetensors(&json!({ "a": f32s(json!([1]), 0, 4), "b": f32s(json!([1]), 8, 12) }), &[0; 12]), "leave a gap"),
        (safetensors(&json!({ "w": f32s(json!([3]), 0, 8) }), &[0; 8]), "shape does not fit"),
        (safetensors(&json!({ "w": f32s(json!([big, big]), 0, 8) }), &[0; 8]), "overflows"),
        (safetensors(&json!({ "w": f32s(json!([-1]), 0, 4) }), &[0; 4]), "header is not valid"),
        (safetensors(&json!({ "w": f32s(json!(vec![1; 9]), 0, 4) }), &[0; 4]), "9 dimensions"),
        (safetensors(&json!({ "w": { "dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1] } }), &[0]), "F8_E4M3"),
        (safetensors(&json!({ "a\nb": f32s(json!([1]), 0, 4) }), &[0; 4]), "\"a\\nb\""),
        (safetensors(&json!({ "w": f32s(json!([2]), 0, 8) }), &nan), "tensor \"w\" holds NaN at element 1"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0".to_vec(), "git lfs pull"),
        (b"\x0f\0\0\0\0\0\0\0{\"w\":\xff\xff        ".to_vec(), "not UTF-8"),
    ] {
        fs::write(&path, bytes).unwrap();
        refused(read_safetensors(&path), &path, part);
    }
    refused(read_safetensors(dir.path()), dir.path(), "not a regular file");
    refused(read_safetensors(&dir.path().join("none")), &dir.path().join("none"), "no such file");
}

#[test]
fn no_single_fault_in_a_safetensors_file_makes_a_panic() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("model.safetensors");
    write_safetensors(&path, &StateDict::from([("w".into(), numbers(&[2, 2], 1.0))]), PT_METADATA).unwrap();
    let whole = fs::read(&path).unwrap();
    for cut in 0..whole.len() {
        fs::write(&path, &whole[..cut]).unwrap();
        refused(read_safetensors(&path), &path, "");
    }
    for at in 0..whole.len() {
        for bit in 0..8 {
            let mut bad = whole.clone();
            bad[at] ^= 1 << bit;
            fs::write(&path, &bad).unwrap();
            if let Err(e) = read_safetensors(&path) {
                assert!(e.kind == Kind::Input && !e.to_string().chars().any(char::is_control), "{e}");
            }
        }
    }
}

#[test]
fn a_failed_write_leaves_what_was_there() {
    let dir = TempDir::new().unwrap();
    let target = dir.path().join("model.safetensors");
    fs::create_dir(&target).unwrap();
    let error = write_safetensors(&target, &model(), PT_METADATA).unwrap_err();
    assert_eq!(error.kind, Kind::Io);
    assert!(target.is_dir());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "a temporary file is left");
    let occupied = dir.path().join("file");
    fs::write(&occupied, "").unwrap();
    let error = write_safetensors(&occupied.join("model.safetensors"), &model(), PT_METADATA).unwrap_err();
    assert_eq!(error.kind, Kind::Io);
    assert_eq!(checkpoint::write(&occupied, &SegformerConfig::default(), &model(), 64).unwrap_err().kind, Kind::Io);
}

// ---- PyTorch's zip files ------------------------------------------------------------------------------------------

/// What a pickled tensor claims; `storage` is its type's name in torch, its key and its length.
struct Claim<'a> {
    name: &'a str,
    storage: (&'a str, &'a str, u32),
    offset: u32,
    shape: &'a [u32],
    strides: &'a [u32],
}

impl Default for Claim<'_> {
    fn default() -> Self {
        Claim { name: "w", storage: ("FloatStorage", "0", 6), offset: 0, shape: &[2, 3], strides: &[3, 1] }
    }
}

/// The pickle of a state dict, as `torch.save` writes it but for its memo.
fn pickle(claims: &[Claim<'_>]) -> Vec<u8> {
    fn text(out: &mut Vec<u8>, text: &str) {
        out.push(b'X');
        out.extend((text.len() as u32).to_le_bytes());
        out.extend(text.as_bytes());
    }
    fn integer(out: &mut Vec<u8>, n: u32) {
        out.push(b'J');
        out.extend(n.to_le_bytes());
    }
    let mut out = b"\x80\x02ccollections\nOrderedDict\n)R(".to_vec();
    for claim in claims {
        text(&mut out, claim.name);
        out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut out, "storage");
        out.extend(format!("ctorch\n{}\n", claim.storage.0).as_bytes());
        text(&mut out, claim.storage.1);
        text(&mut out, "cpu");
        integer(&mut out, claim.storage.2);
        out.extend(b"tQ");
        integer(&mut out, claim.offset);
        for extents in [claim.shape, claim.strides] {
            out.push(b'(');
            extents.iter().for_each(|&n| integer(&mut out, n));
            out.push(b't');
        }
        out.extend(b"\x89ccollections\nOrderedDict\n)RtR");
    }
    out.extend(b"u.");
    out
}

fn zip(entries: &[(&str, &[u8])], method: CompressionMethod) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, data) in entries {
        zip.start_file(*name, SimpleFileOptions::default().compression_method(method)).unwrap();
        zip.write_all(data).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

fn floats(n: usize) -> Vec<u8> {
    (0..n).flat_map(|i| (i as f32).to_le_bytes()).collect()
}

/// Reads a file of these bytes and expects a refusal.
#[track_caller]
fn torch_refused(bytes: &[u8], part: &str) {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("pytorch_model.bin");
    fs::write(&path, bytes).unwrap();
    refused(read_torch(&path), &path, part);
}

#[test]
fn torch_files_are_read() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("pytorch_model.bin");
    let description = pickle(&[
        Claim::default(),
        Claim { name: "t", shape: &[3, 2], strides: &[1, 3], ..Claim::default() },
        Claim { name: "v", offset: 2, shape: &[2], strides: &[2], ..Claim::default() },
        Claim { name: "n", storage: ("LongStorage", "1", 1), shape: &[], strides: &[], ..Claim::default() },
        Claim { name: "e", shape: &[0, 7], strides: &[7, 1], offset: 6, ..Claim::default() },
    ]);
    let entries: [(&str, &[u8]); 4] = [
        ("archive/data.pkl", &description),
        ("archive/byteorder", b"little"),
        ("archive/data/0", &floats(6)),
        ("archive/data/1", &(-9i64).to_le_bytes()),
    ];
    fs::write(&path, zip(&entries, CompressionMethod::Stored)).unwrap();
    let f32s = |shape: &[usize], v: &[f32]| HostTensor { shape: shape.to_vec(), data: HostData::F32(v.to_vec()) };
    let expected = StateDict::from([
        ("w".into(), f32s(&[2, 3], &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0])),
        ("t".into(), f32s(&[3, 2], &[0.0, 3.0, 1.0, 4.0, 2.0, 5.0])),
        ("v".into(), f32s(&[2], &[2.0, 4.0])),
        ("n".into(), count(-9)),
        ("e".into(), f32s(&[0, 7], &[])),
    ]);
    assert_eq!(read_torch(&path).unwrap(), expected);
}

#[test]
fn hostile_torch_files_are_refused() {
    let stored = |entries: &[(&str, &[u8])]| zip(entries, CompressionMethod::Stored);
    let with = |pickle: &[u8]| stored(&[("a/data.pkl", pickle), ("a/data/0", &floats(6))]);
    let one = pickle(&[Claim::default()]);

    torch_refused(&with(b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00id\x85R."), "asks for \"posix.system\"");
    torch_refused(&with(b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00id\x85R."), "nothing in it was run");
    torch_refused(&with(b"\x80\x02}."[..3].as_ref()), "ends too soon");
    torch_refused(&with(b"\x80\x02K\x05."), "no dict of tensors");
    torch_refused(&with(b"\x80\x02}X\x05\x00\x00\x00epochK\x05s."), "entry \"epoch\" is no tensor");
    torch_refused(&with(&pickle(&[Claim { name: "a\u{7}", ..Claim::default() }])), "unusable name");
    torch_refused(&with(&pickle(&[Claim::default(), Claim::default()])), "tensor \"w\" occurs twice");

    // Views that leave their storage or blow it up, and storages that lie.
    torch_refused(&with(&pickle(&[Claim { offset: 1, ..Claim::default() }])), "outside its storage");
    torch_refused(&with(&pickle(&[Claim { shape: &[i32::MAX as u32], strides: &[0], ..Claim::default() }])), "outside");
    torch_refused(&with(&pickle(&[Claim { strides: &[u32::MAX, 1], ..Claim::default() }])), "negative");
    torch_refused(&with(&pickle(&[Claim { shape: &[2], ..Claim::default() }])), "more sizes than strides");
    let huge = Claim { storage: ("FloatStorage", "0", i32::MAX as u32), ..Claim::default() };
    torch_refused(&with(&pickle(&[huge])), "more numbers than the file holds");
    let short = stored(&[("a/data.pkl", &one), ("a/data/0", &floats(5))]);
    torch_refused(&short, "length of 20 bytes is not what the state dict declares");
    let names: Vec<String> = (0..10_000).map(|i| i.to_string()).collect();
    let storage = ("FloatStorage", "0", 1_000);
    let repeated: Vec<_> =
        names.iter().map(|name| Claim { name, storage, shape: &[1_000], strides: &[1], offset: 0 }).collect();
    let bytes = stored(&[("a/data.pkl", &pickle(&repeated)), ("a/data/0", &floats(1_000))]);
    torch_refused(&bytes, "repeat the file's contents");
    torch_refused(&with(&pickle(&[Claim { storage: ("FloatStorage", "../0", 6), ..Claim::default() }])), "no storage");
    torch_refused(&stored(&[("a/data.pkl", &one)]), "entry \"a/data/0\" is unsound");
    torch_refused(&stored(&[("a/data.pkl", &one), ("b/data.pkl", &one)]), "several data.pkl");
    torch_refused(&stored(&[("a/b/data.pkl", &one)]), "without data.pkl");
    let big_endian = stored(&[("a/data.pkl", &one), ("a/byteorder", b"big"), ("a/data/0", &floats(6))]);
    torch_refused(&big_endian, "big-endian");
    let nan = [f32::NAN; 6].map(f32::to_le_bytes).concat();
    torch_refused(&stored(&[("a/data.pkl", &one), ("a/data/0", &nan)]), "tensor \"w\" holds NaN");

    // Archives that expand: a bomb of zeros, in the place of the pickle and of a storage.
    let zeros = vec![0; 1 << 20];
    torch_refused(&zip(&[("a/data.pkl", &zeros)], CompressionMethod::Deflated), "is compressed");
    let long =
        pickle(&[Claim { storage: ("ByteStorage", "0", 1_000), shape: &[9], strides: &[1], ..Claim::default() }]);
    torch_refused(&zip(&[("a/data.pkl", &long), ("a/data/0", &zeros)], CompressionMethod::Deflated), "is compressed");
    torch_refused(&stored(&[("a/data.pkl", &vec![b'('; 5 << 20])]), "entry \"a/data.pkl\" is unsound");

    // Not such a file at all.
    torch_refused(b"", "no PyTorch state dict");
    torch_refused(b"PK\x03\x04", "no sound zip archive");
    torch_refused(b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.", "before 1.6");
}

/// Every single-bit fault and every truncation of a whole file: never a panic, never other numbers.
#[test]
fn no_single_fault_in_a_torch_file_goes_unnoticed() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("pytorch_model.bin");
    let entries: [(&str, &[u8]); 2] = [("a/data.pkl", &pickle(&[Claim::default()])), ("a/data/0", &floats(6))];
    let whole = zip(&entries, CompressionMethod::Stored);
    fs::write(&path, &whole).unwrap();
    let sound = read_torch(&path).unwrap();
    for cut in 0..whole.len() {
        fs::write(&path, &whole[..cut]).unwrap();
        refused(read_torch(&path), &path, "");
    }
    for at in 0..whole.len() {
        for bit in 0..8 {
            let mut bad = whole.clone();
            bad[at] ^= 1 << bit;
            fs::write(&path, &bad).unwrap();
            match read_torch(&path) {
                Ok(read) => assert_eq!(read, sound, "bit {bit} of byte {at}"),
                Err(e) => assert!(e.kind == Kind::Input && !e.to_string().chars().any(char::is_control), "{e}"),
            }
        }
    }
}

// ---- models -------------------------------------------------------------------------------------------------------

#[test]
fn a_model_reads_back_from_folder_and_file() {
    let dir = TempDir::new().unwrap();
    let config = SegformerConfig { depths: vec![3, 4, 6, 3], drop_path_rate: 0.2, ..SegformerConfig::default() };
    checkpoint::write(dir.path(), &config, &model(), 384).unwrap();
    for path in [dir.path().to_path_buf(), dir.path().join("model.safetensors")] {
        let read = checkpoint::read(&path).unwrap();
        assert_eq!(read.config, config);
        assert_eq!(read.tensors, model());
    }
    let json = |name: &str| -> Value { serde_json::from_slice(&fs::read(dir.path().join(name)).unwrap()).unwrap() };
    let written = json("config.json");
    assert_eq!(written["architectures"], json!(["SegformerForSemanticSegmentation"]));
    assert_eq!(written["model_type"], "segformer");
    assert_eq!(written["id2label"], json!({ "0": "background", "1": "polyp" }));
    assert_eq!(written["label2id"], json!({ "background": 0, "polyp": 1 }));
    assert_eq!(written["drop_path_rate"], json!(0.2));
    let written = json("preprocessor_config.json");
    assert_eq!(written["size"], json!({ "height": 384, "width": 384 }));
    assert_eq!(written["rescale_factor"], json!(0.003_921_568_627_450_98));
    assert_eq!(written["do_reduce_labels"], false);
    assert_eq!(image_size(dir.path()), Some(384));
}

#[test]
fn the_size_of_images_is_read_in_every_form_it_has_been_written() {
    let dir = TempDir::new().unwrap();
    let size = |text: &str| {
        fs::write(dir.path().join("preprocessor_config.json"), text).unwrap();
        image_size(dir.path())
    };
    assert_eq!(size(r#"{"size": 512}"#), Some(512));
    assert_eq!(size(r#"{"size": {"shortest_edge": 256}}"#), Some(256));
    assert_eq!(size(r#"{"size": {"height": 128, "width": 128}}"#), Some(128));
    for unknown in [
        r#"{"size": {"height": 128, "width": 96}}"#,
        r#"{"size": 512, "do_resize": false}"#,
        r#"{"size": -1}"#,
        r#"{"size": 1e30}"#,
        r#"{"size": "512"}"#,
        "{}",
        "[512]",
        "no JSON",
    ] {
        assert_eq!(size(unknown), None, "{unknown}");
    }
}

#[test]
fn a_model_under_version_5_names_comes_under_version_4s() {
    let dir = TempDir::new().unwrap();
    let renamed = model().into_iter().map(|(name, t)| (names::to_v5(&name), t)).collect();
    checkpoint::write(dir.path(), &SegformerConfig::default(), &renamed, 512).unwrap();
    assert_eq!(checkpoint::read(dir.path()).unwrap().tensors, model());
    let both: StateDict = renamed.into_iter().chain(model()).collect();
    checkpoint::write(dir.path(), &SegformerConfig::default(), &both, 512).unwrap();
    refused(checkpoint::read(dir.path()), &dir.path().join("model.safetensors"), "version-4 and its version-5 name");
}

#[test]
fn missing_files_are_named() {
    let dir = TempDir::new().unwrap();
    refused(checkpoint::read(dir.path()), dir.path(), "neither model.safetensors nor pytorch_model.bin");
    let none = dir.path().join("nvidia/segformer");
    refused(checkpoint::read(&none), &none, "no such file or folder");
    write_safetensors(&dir.path().join("model.safetensors"), &model(), PT_METADATA).unwrap();
    refused(checkpoint::read(dir.path()), &dir.path().join("config.json"), "no such file");
    let other = TempDir::new().unwrap();
    fs::write(other.path().join("adapter_config.json"), "{}").unwrap();
    refused(checkpoint::read(other.path()), other.path(), "--adapter");
}

#[test]
fn configurations_are_read_as_transformers_reads_them() {
    let dir = TempDir::new().unwrap();
    write_safetensors(&dir.path().join("model.safetensors"), &model(), PT_METADATA).unwrap();
    let path = dir.path().join("config.json");
    let labels = |value: Value| -> Vec<String> {
        write_json(&path, &value);
        checkpoint::read(dir.path()).unwrap().config.id2label.into_values().collect()
    };
    let base = json!({ "model_type": "segformer", "reshape_last_stage": true, "image_size": 224, "torch_dtype": null });
    let and = |more: Value| {
        let mut all = base.clone();
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        all
    };
    assert_eq!(labels(base.clone()), ["LABEL_0", "LABEL_1"]);
    assert_eq!(labels(and(json!({ "num_labels": 3, "id2label": null }))), ["LABEL_0", "LABEL_1", "LABEL_2"]);
    assert_eq!(labels(and(json!({ "num_labels": 3, "id2label": { "0": "a", "1": "b" } }))), ["a", "b"]);

    for (more, part) in [
        (json!({ "model_type": "resnet" }), "model_type is \"resnet\""),
        (json!({ "model_type": "a\n" }), "\"a\\n\""),
        (json!({ "model_type": null }), "no model_type"),
        (json!({ "depths": [2, 2] }), "depths has 2 entries"),
        (json!({ "depths": "deep" }), "depths: invalid type"),
        (json!({ "hidden_sizes": [32, 64, 160, u64::MAX] }), "hidden_sizes"),
        (json!({ "hidden_act": "relu" }), "hidden_act"),
        (json!({ "hidden_dropout_prob": 0.5 }), "hidden_dropout_prob"),
        (json!({ "num_channels": 4 }), "num_channels"),
        (json!({ "num_labels": 1 }), "1 labels"),
        (json!({ "num_labels": u64::MAX }), "num_labels is \"18446744073709551615\""),
        (json!({ "id2label": { "0": "a", "7": "b" } }), "id2label lacks \"1\""),
    ] {
        write_json(&path, &and(more));
        refused(checkpoint::read(dir.path()), &path, part);
    }
    for (text, part) in [("[]", "not a JSON object"), ("{", "not valid JSON"), ("\u{0}", "not valid JSON")] {
        fs::write(&path, text).unwrap();
        refused(checkpoint::read(dir.path()), &path, part);
    }
    fs::write(&path, "[".repeat(100_000)).unwrap();
    refused(checkpoint::read(dir.path()), &path, "not valid JSON");
    fs::File::create(&path).unwrap().set_len(1 << 30).unwrap();
    refused(checkpoint::read(dir.path()), &path, "1073741824 bytes long");
}

// ---- adapters -----------------------------------------------------------------------------------------------------

fn lora() -> Adapter {
    let query = "segformer.encoder.block.0.1.attention.self.query";
    let sr = "segformer.encoder.block.0.1.attention.self.sr";
    Adapter {
        config: AdapterConfig {
            r: 2,
            lora_alpha: 3.0,
            lora_dropout: 0.1,
            use_rslora: false,
            target_modules: ["query", "mlp.dense.1", "sr"].map(String::from).into(),
            modules_to_save: vec!["decode_head".into()],
            base_model: "nvidia/segformer".into(),
        },
        tensors: StateDict::from([
            (format!("{query}.lora_A.weight"), numbers(&[2, 4], 0.0)),
            (format!("{query}.lora_B.weight"), numbers(&[5, 2], 1.0)),
            (format!("{sr}.lora_A.weight"), numbers(&[2, 4, 8, 8], 2.0)),
            (format!("{sr}.lora_B.weight"), numbers(&[4, 2, 1, 1], 3.0)),
            ("decode_head.linear_c.0.proj.bias".into(), numbers(&[3], 4.0)),
            ("decode_head.batch_norm.num_batches_tracked".into(), count(7)),
        ]),
        sidecar: StateDict::from([("decode_head.classifier.bias".into(), numbers(&[2], 5.0))]),
    }
}

#[test]
fn adapters_read_back_under_either_version() {
    let dir = TempDir::new().unwrap();
    for (names, tensor, targets) in [
        (HfNames::V4, "encoder.block.0.1.attention.self.query", ["query", "mlp.dense.1", "sr"]),
        (
            HfNames::V5,
            "stages.0.blocks.1.attention.q_proj",
            ["q_proj", "mlp.dense.1", "sequence_reduction.sequence_reduction"],
        ),
    ] {
        adapter::write(dir.path(), &lora(), names).unwrap();
        assert_eq!(adapter::read(dir.path()).unwrap(), lora());
        let file = read_safetensors(&dir.path().join("adapter_model.safetensors")).unwrap();
        assert!(file.contains_key(&format!("base_model.model.segformer.{tensor}.lora_A.weight")));
        let config: Value = serde_json::from_slice(&fs::read(dir.path().join("adapter_config.json")).unwrap()).unwrap();
        assert_eq!(config["target_modules"], json!(targets));
        assert_eq!((&config["lora_alpha"], &config["lora_dropout"]), (&json!(3), &json!(0.1)));
    }
    let bare = Adapter { sidecar: StateDict::new(), ..lora() };
    adapter::write(dir.path(), &bare, HfNames::V4).unwrap();
    assert_eq!(adapter::read(dir.path()).unwrap(), bare);
    assert_eq!(lora().config.scale(), 1.5);
    assert_eq!(AdapterConfig { use_rslora: true, r: 9, ..lora().config }.scale(), 1.0);
}

#[test]
fn modules_that_no_pattern_matches_are_listed_by_name() {
    let dir = TempDir::new().unwrap();
    adapter::write(dir.path(), &lora(), HfNames::V4).unwrap();
    let path = dir.path().join("adapter_config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["target_modules"] = json!(".*(query|sr)");
    write_json(&path, &config);
    let read = adapter::read(dir.path()).unwrap();
    let block = "segformer.encoder.block.0.1.attention.self";
    assert_eq!(read.config.target_modules, [format!("{block}.query"), format!("{block}.sr")]);
}

#[test]
fn adapters_that_compute_something_else_are_refused() {
    let dir = TempDir::new().unwrap();
    adapter::write(dir.path(), &lora(), HfNames::V5).unwrap();
    let path = dir.path().join("adapter_config.json");
    let sound: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for (field, value) in [
        ("peft_type", json!("IA3")),
        ("r", json!(0)),
        ("r", json!(1e9)),
        ("r", json!("8")),
        ("lora_alpha", json!("x")),
        ("lora_alpha", json!(null)),
        ("lora_dropout", json!(1.0)),
        ("bias", json!("all")),
        ("use_dora", json!(true)),
        ("lora_bias", json!(true)),
        ("fan_in_fan_out", json!(true)),
        ("use_qalora", json!(true)),
        ("use_rslora", json!("yes")),
        ("rank_pattern", json!({ "query": 8 })),
        ("alpha_pattern", json!({ "query": 8 })),
        ("megatron_config", json!({ "x": 1 })),
        ("layer_replication", json!([[0, 1]])),
        ("target_parameters", json!(["w"])),
        ("trainable_token_indices", json!([1])),
        ("alora_invocation_tokens", json!([1])),
        ("arrow_config", json!({ "top_k": 1 })),
        ("use_bdlora", json!({ "n": 1 })),
        ("init_lora_weights", json!("pissa")),
        ("modules_to_save", json!([1])),
        ("target_modules", json!({ "a": "\n" })),
    ] {
        let mut config = sound.clone();
        config[field] = value;
        write_json(&path, &config);
        refused(adapter::read(dir.path()), &path, field);
    }
    let mut config = sound.clone();
    config["a_field_of_the_future"] = json!("x");
    config["peft_version"] = json!("0.21.2");
    config["init_lora_weights"] = json!("gaussian");
    write_json(&path, &config);
    assert_eq!(adapter::read(dir.path()).unwrap(), lora());

    config["r"] = json!(3);
    write_json(&path, &config);
    refused(adapter::read(dir.path()), &dir.path().join("adapter_model.safetensors"), "rank 3 does not fit");
    fs::remove_file(&path).unwrap();
    refused(adapter::read(dir.path()), &path, "no such file");
}

#[test]
fn factors_that_do_not_belong_together_are_refused() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("adapter_model.safetensors");
    let module = "segformer.encoder.block.0.1.attention.self.query";
    let changed = |change: &dyn Fn(&mut StateDict)| {
        let mut bad = lora();
        change(&mut bad.tensors);
        adapter::write(dir.path(), &bad, HfNames::V4).unwrap();
        adapter::read(dir.path())
    };
    let a = format!("{module}.lora_A.weight");
    let b = format!("{module}.lora_B.weight");
    refused(changed(&|t| drop(t.remove(&a))), &path, "lora_B but no lora_A");
    refused(changed(&|t| drop(t.remove(&b))), &path, "lora_A but no lora_B");
    refused(changed(&|t| drop(t.insert(b.clone(), numbers(&[5, 3], 0.0)))), &path, "rank 2 does not fit");
    refused(changed(&|t| drop(t.insert(b.clone(), numbers(&[5, 2, 1, 1], 0.0)))), &path, "rank 2 does not fit");
    refused(changed(&|t| drop(t.insert(a.clone(), numbers(&[], 0.0)))), &path, "rank 2 does not fit");
    let dora = format!("{module}.lora_magnitude_vector");
    refused(changed(&|t| drop(t.insert(dora.clone(), numbers(&[5], 0.0)))), &path, "lora_magnitude_vector");
    refused(changed(&|t| drop(t.insert(format!("{module}.bias"), numbers(&[5], 0.0)))), &path, "modules_to_save");
    adapter::write(dir.path(), &lora(), HfNames::V4).unwrap();
    write_safetensors(&path, &StateDict::from([("w".into(), numbers(&[1], 0.0))]), PT_METADATA).unwrap();
    refused(adapter::read(dir.path()), &path, "does not begin with \"base_model.model.\"");
}

#[test]
fn published_adapters_load() {
    let Some(root) = std::env::var_os("SEGPEFT_PUBLISHED").map(PathBuf::from) else {
        return eprintln!("skipped: SEGPEFT_PUBLISHED is not set to the folder of the published adapters");
    };
    for (folder, r) in [("lora_r16_alpha16/final", 16), ("lora_r16_alpha16/checkpoint-192", 16), ("lora_r4_alpha4", 4)]
    {
        let read = adapter::read(&root.join(folder)).unwrap();
        let parameters: usize = read.tensors.values().map(|t| t.shape.iter().product::<usize>()).sum();
        assert_eq!((read.tensors.len(), parameters), (64, 8192 * r));
        assert_eq!((read.config.r, read.config.scale(), read.config.lora_dropout), (r, 1.0, 0.0));
        assert_eq!((read.config.target_modules.len(), read.config.modules_to_save.len()), (6, 0));
        assert!(read.config.target_modules.contains(&"mlp.dense.1".to_string()) && read.sidecar.is_empty());
        let b = &read.tensors["segformer.encoder.block.3.1.attention.output.dense.lora_B.weight"];
        let HostData::F32(numbers) = &b.data else { panic!("factors are floating") };
        assert!(b.shape == [256, r] && numbers.iter().any(|&x| x != 0.0));
        // Under version 5 and back.
        let dir = TempDir::new().unwrap();
        adapter::write(dir.path(), &read, HfNames::V5).unwrap();
        assert_eq!(adapter::read(dir.path()).unwrap(), read);
    }
}

// ---- exchange with Python -----------------------------------------------------------------------------------------

/// Compares tensors with Python's list of names, shapes and CRCs.
#[track_caller]
fn as_expected(tensors: &StateDict, expected: &Value, what: &str) {
    let expected = expected.as_object().unwrap_or_else(|| panic!("{what} is not in expected.json"));
    assert!(tensors.keys().eq(expected.iter().map(|(name, _)| name)), "{what}: other names");
    for (name, tensor) in tensors {
        let bytes: Vec<u8> = match &tensor.data {
            HostData::F32(numbers) => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
            HostData::I64(numbers) => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
        };
        assert_eq!(json!([tensor.shape, crc32fast::hash(&bytes)]), expected[name], "{what}: {name}");
    }
    println!("{what}: {} tensors as Python wrote them", tensors.len());
}

#[test]
fn exchange_with_python() {
    let Some(root) = std::env::var_os("SEGPEFT_EXCHANGE").map(PathBuf::from) else {
        return eprintln!("skipped: SEGPEFT_EXCHANGE is not set to the folder of tools/reference/roundtrip.py");
    };
    let rust = root.join("rust");
    for (version, names) in [("4", HfNames::V4), ("5", HfNames::V5)] {
        let python = root.join(format!("python{version}"));
        let expected: Value = serde_json::from_slice(&fs::read(python.join("expected.json")).unwrap()).unwrap();
        for kind in ["model", "model-bf16", "model-f64", "bin-plain", "bin-parameters", "bin-views", "bin-protocol4"] {
            let read = checkpoint::read(&python.join(kind)).unwrap();
            as_expected(&read.tensors, &expected[kind], &format!("python{version}/{kind}"));
        }
        // `module.state_dict()` has version 5's names there and version 4's here.
        let read = checkpoint::read(&python.join("bin-module")).unwrap();
        as_expected(&read.tensors, &expected["bin-module"], &format!("python{version}/bin-module"));
        checkpoint::write(&rust.join("model-of-bin"), &read.config, &read.tensors, 384).unwrap();
        let legacy = python.join("bin-legacy");
        refused(checkpoint::read(&legacy), &legacy.join("pytorch_model.bin"), "before 1.6");

        let mut read = checkpoint::read(&python.join("model")).unwrap();
        read.config.id2label = SegformerConfig::default().id2label;
        checkpoint::write(&rust.join("model"), &read.config, &read.tensors, 384).unwrap();
        checkpoint::write(&rust.join("model-of-bin"), &read.config, &read.tensors, 384).unwrap();

        let (other, other_names) = if version == "4" { ("5", HfNames::V5) } else { ("4", HfNames::V4) };
        for kind in ["adapter", "adapter-head", "adapter-classifier"] {
            let read = adapter::read(&python.join(kind)).unwrap();
            as_expected(&read.tensors, &expected[kind], &format!("python{version}/{kind}"));
            adapter::write(&rust.join(format!("{kind}-{version}")), &read, names).unwrap();
            // An adapter made under one version, for the other.
            if kind == "adapter-head" {
                adapter::write(&rust.join(format!("adapter-of-other-{other}")), &read, other_names).unwrap();
            }
        }
    }
}
