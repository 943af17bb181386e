//! Drives the real program in scratch folders.
#![allow(dead_code, missing_docs)]

use std::path::Path;
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};

pub const USAGE: i32 = 2;
pub const INPUT: i32 = 3;
pub const IO: i32 = 4;
pub const DIVERGED: i32 = 5;
pub const DEVICE: i32 = 6;
pub const BUSY: i32 = 7;
pub const INTERRUPTED: i32 = 130;

pub fn program(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_segpeft-native"));
    command.current_dir(folder).args(arguments);
    command
}

pub fn run(folder: &Path, arguments: &[&str]) -> Output {
    program(folder, arguments).output().expect("the program starts")
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("UTF-8 on standard output")
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("UTF-8 on standard error")
}

pub fn succeeds(folder: &Path, arguments: &[&str]) -> Output {
    let output = run(folder, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", stderr(&output));
    output
}

/// The command fails with `code` and exactly one line, which starts with `error: ` and holds each of `words`.
pub fn fails(folder: &Path, arguments: &[&str], code: i32, words: &[&str]) {
    let output = run(folder, arguments);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {text}");
    let errors: Vec<&str> = text.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{arguments:?}: {text}");
    assert_eq!(text.lines().last(), Some(errors[0]), "{arguments:?}: nothing follows the error: {text}");
    for word in words {
        assert!(errors[0].contains(word), "{arguments:?}: {word:?} is not in {}", errors[0]);
    }
    assert!(output.stdout.is_empty(), "{arguments:?}: a failure prints no result");
}

/// Twelve pictures of 48 x 40 with a bright disc, and its mask: a folder to train on.
pub fn dataset(folder: &Path) {
    for part in ["images", "masks"] {
        std::fs::create_dir_all(folder.join("data").join(part)).expect("scratch folder");
    }
    for i in 0..12u32 {
        let inside = |x: u32, y: u32| (x as i32 - 20).pow(2) + (y as i32 - 8 - i as i32 * 2).pow(2) < 80;
        let image = image::RgbImage::from_fn(48, 40, |x, y| {
            let noise = ((x * 7 + y * 13 + i * 29) % 31) as u8;
            image::Rgb(if inside(x, y) { [220, 160 + noise, 150] } else { [120 + noise, 50, 40] })
        });
        let mask = image::GrayImage::from_fn(48, 40, |x, y| image::Luma([if inside(x, y) { 255 } else { 0 }]));
        image.save(folder.join(format!("data/images/p{i:02}.png"))).expect("image");
        mask.save(folder.join(format!("data/masks/p{i:02}.png"))).expect("mask");
    }
}

/// A short run at 32 x 32 from fresh weights.
pub const SHORT: [&str; 14] = [
    "--data",
    "data",
    "--model",
    "random",
    "--size",
    "32",
    "--epochs",
    "2",
    "--batch-size",
    "4",
    "--grad-accum",
    "2",
    "--eval-batch-size",
    "4",
];

pub fn with<'a>(command: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&[command], &SHORT[..], more].concat()
}

pub fn scratch() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("scratch folder");
    dataset(folder.path());
    folder
}

pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(120), "waited too long until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn interrupt(child: &Child) {
    let status = Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill starts");
    assert!(status.success());
}
