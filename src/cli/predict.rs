//! `predict`: masks and overlays for pictures.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use clap::Args;
use image::{ExtendedColorType, ImageEncoder, codecs::png::PngEncoder};
use rayon::prelude::*;
use serde_json::json;

use super::args::{self, DeviceArgs};
use super::output::path;
use super::{Context, output};
use crate::ablation::source::{ModelSource, Source};
use crate::dataset;
use crate::error::{Error, Kind, Result};
use crate::files;
use crate::formats::{self, HostData, HostTensor, StateDict};
use crate::train::Predictor;

/// Colour laid over what the model marks, RGB, and its weight.
const MARK: [f32; 3] = [0.0, 255.0, 128.0];
const MARK_WEIGHT: f32 = 0.4;

/// Segment pictures: masks and overlays at the pictures' own size
///
/// Writes masks/STEM.png (0 and 255; class numbers for a model of more than two classes) and overlays/STEM.png into --out.
/// Pictures are turned as their EXIF orientation says; one that cannot be read does not stop the others.
#[derive(Args)]
#[command(after_help = "\
Examples:
  segpeft-native predict polyp.jpg --out predictions \\
    --model outputs/segformer_fft_baseline/final
  segpeft-native predict pictures/ --model segformer-b0-ade/ --out predictions \\
    --adapter outputs/lora_r16_alpha32/final --save-logits logits.safetensors")]
pub struct Predict {
    /// Pictures (JPEG, PNG), or folders of them
    #[arg(value_name = "IMAGE", required = true)]
    images: Vec<PathBuf>,
    /// Hugging Face directory or weights file of a SegFormer
    #[arg(long, value_name = "PATH")]
    model: PathBuf,
    /// Adapter on top of the model
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Folder of the masks and overlays
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Side at which the model sees the pictures, a multiple of 32 [default: what the model was trained on, else 512]
    #[arg(long, value_name = "PIXELS", value_parser = args::size)]
    size: Option<usize>,
    /// Also keep the logits: safetensors, f32, one (classes, size/4, size/4) tensor per picture under its stem
    #[arg(long, value_name = "FILE")]
    save_logits: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArgs,
}

impl Predict {
    pub fn run(&self, context: &Context) -> Result<()> {
        let place = self.device.open(&context.progress)?;
        let pictures = pictures(&self.images)?;
        let source = Source::open(&ModelSource::Path(self.model.clone()), self.adapter.as_deref(), &context.progress)?;
        let size = self.size.or(source.image_size).unwrap_or(dataset::DEFAULT_SIZE);
        let mut predictor = Predictor::new(&place, &source.start, size, &context.progress)?;
        let (masks, overlays) = (self.out.join("masks"), self.out.join("overlays"));
        for folder in [&masks, &overlays] {
            files::create_folder(folder)?;
        }
        let (labels, grid) = (predictor.labels(), predictor.grid());
        let mut kept = StateDict::new();
        let mut rows = Vec::new();
        let bar = context.progress.bar("predicting", pictures.len() as u64, "images");
        for (stem, file) in &pictures {
            let name = format!("{stem}.png");
            let (mask_file, overlay_file) = (masks.join(&name), overlays.join(&name));
            let picture = match dataset::load_image(file) {
                Ok(picture) => picture,
                Err(error) if pictures.len() == 1 => return Err(error),
                Err(error) => {
                    context.progress.warn(error.to_string());
                    // What an earlier call made of another picture of this name must not pass for this one's.
                    for old in [&mask_file, &overlay_file] {
                        files::remove(old)?;
                    }
                    bar.inc(1);
                    continue;
                }
            };
            let extent = (picture.width, picture.height);
            let pixels = dataset::resize_bilinear(&picture.data, extent, (size, size), 3);
            let logits = predictor.logits(&pixels)?;
            let mask = classes(&logits, labels, (grid.height, grid.width), extent);
            let marked = mask.iter().filter(|&&class| class != 0).count() as f64 / mask.len() as f64;
            let grey: Vec<u8> = match labels {
                2 => mask.iter().map(|&class| class * 255).collect(),
                _ => mask.clone(),
            };
            write_png(&mask_file, &grey, extent, ExtendedColorType::L8)?;
            let overlay = lay_over(&picture.data, &mask);
            write_png(&overlay_file, &overlay, extent, ExtendedColorType::Rgb8)?;
            rows.push(json!({
                "image": path(file), "mask": path(&mask_file), "overlay": path(&overlay_file),
                "marked": marked,
            }));
            if self.save_logits.is_some() {
                let tensor = HostTensor { shape: vec![labels, grid.height, grid.width], data: HostData::F32(logits) };
                kept.insert(stem.clone(), tensor);
            }
            bar.inc(1);
        }
        drop(bar);
        if let Some(file) = self.save_logits.as_ref().filter(|_| !kept.is_empty()) {
            formats::write_safetensors(file, &kept, &[])?;
        }
        context.result(&rows, || {
            output::fields(&[
                ("pictures", rows.len().to_string()),
                ("masks", masks.display().to_string()),
                ("overlays", overlays.display().to_string()),
            ])
        })?;
        match pictures.len() - rows.len() {
            0 => Ok(()),
            n => Err(Error::new(Kind::Input, format!("{n} of {} pictures could not be read", pictures.len()))),
        }
    }
}

/// The pictures that the arguments name, folders opened, by stem.
fn pictures(arguments: &[PathBuf]) -> Result<BTreeMap<String, PathBuf>> {
    let mut found: BTreeMap<String, PathBuf> = BTreeMap::new();
    let mut add = |file: PathBuf| {
        let stem = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        match found.insert(stem, file.clone()) {
            Some(other) => Err(Error::usage(format!(
                "{} and {}: their results would have the same name; give them in two calls",
                other.display(),
                file.display()
            ))),
            None => Ok(()),
        }
    };
    for argument in arguments {
        if !argument.is_dir() {
            if !argument.exists() {
                return Err(Error::input(argument, "no such picture"));
            }
            add(argument.clone())?;
            continue;
        }
        let unreadable = |e| Error::io(argument, "list the folder", e);
        let mut any = false;
        for entry in std::fs::read_dir(argument).map_err(unreadable)? {
            let file = entry.map_err(unreadable)?.path();
            if file.is_file() && dataset::is_picture(&file) {
                add(file)?;
                any = true;
            }
        }
        if !any {
            return Err(Error::input(argument, "no pictures (.jpg, .jpeg, .png) in this folder"));
        }
    }
    Ok(found)
}

/// The class of each pixel of a picture of `width` x `height`: logits `(labels, rows, columns)` upsampled bilinearly
/// (half-pixel centres), then the largest, as transformers' `post_process_semantic_segmentation` does.
fn classes(logits: &[f32], labels: usize, (rows, columns): (usize, usize), (width, height): (usize, usize)) -> Vec<u8> {
    /// The two neighbours of an output position and the weight of the second.
    fn taps(position: usize, extent: usize, side: usize) -> (usize, usize, f32) {
        let at = ((position as f32 + 0.5) * (side as f32 / extent as f32) - 0.5).max(0.0);
        let first = (at as usize).min(side - 1);
        (first, (first + 1).min(side - 1), at - first as f32)
    }
    let across: Vec<_> = (0..width).map(|x| taps(x, width, columns)).collect();
    let mut mask = vec![0u8; width * height];
    mask.par_chunks_mut(width).enumerate().for_each(|(y, row)| {
        let (top, bottom, down) = taps(y, height, rows);
        for (pixel, &(left, right, across)) in row.iter_mut().zip(&across) {
            let mut best = f32::NEG_INFINITY;
            for label in 0..labels {
                let at = |y: usize, x: usize| logits[(label * rows + y) * columns + x];
                let upper = at(top, left) + across * (at(top, right) - at(top, left));
                let lower = at(bottom, left) + across * (at(bottom, right) - at(bottom, left));
                let value = upper + down * (lower - upper);
                if value > best {
                    best = value;
                    *pixel = label as u8;
                }
            }
        }
    });
    mask
}

/// The picture `(height, width, 3)` with the marked pixels tinted.
fn lay_over(rgb: &[u8], mask: &[u8]) -> Vec<u8> {
    let mut tinted = rgb.to_vec();
    for (pixel, _) in tinted.chunks_exact_mut(3).zip(mask).filter(|(_, class)| **class != 0) {
        for (value, mark) in pixel.iter_mut().zip(MARK) {
            *value = (f32::from(*value) * (1.0 - MARK_WEIGHT) + mark * MARK_WEIGHT).round() as u8;
        }
    }
    tinted
}

fn write_png(path: &Path, pixels: &[u8], (width, height): (usize, usize), kind: ExtendedColorType) -> Result<()> {
    let mut bytes = Cursor::new(Vec::new());
    PngEncoder::new(&mut bytes)
        .write_image(pixels, width as u32, height as u32, kind)
        .map_err(|e| Error::input(path, format!("cannot be encoded as PNG: {e}")))?;
    files::replace(path, bytes.get_ref())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logits_become_classes_at_the_pictures_size() {
        // Class 1 leads by 1 in the left column and trails by 1 in the right one: the border lies in the middle.
        let logits = [0.0, 0.0, 0.0, 0.0, 1.0, -1.0, 1.0, -1.0];
        let mask = classes(&logits, 2, (2, 2), (10, 3));
        for row in mask.chunks(10) {
            assert_eq!(row, [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]);
        }
        assert_eq!(classes(&logits, 2, (2, 2), (1, 1)), [0], "an exact tie goes to the first class");
    }

    #[test]
    fn only_marked_pixels_are_tinted() {
        assert_eq!(lay_over(&[10, 20, 30, 10, 20, 30], &[0, 1]), [10, 20, 30, 6, 114, 69]);
    }

    #[test]
    fn pictures_of_one_name_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["a.png", "a.JPG", "note.txt"] {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        assert!(pictures(&[folder.path().into()]).unwrap_err().to_string().contains("same name"));
        std::fs::remove_file(folder.path().join("a.png")).unwrap();
        assert_eq!(pictures(&[folder.path().into()]).unwrap().len(), 1);
        std::fs::remove_file(folder.path().join("a.JPG")).unwrap();
        assert!(pictures(&[folder.path().into()]).unwrap_err().to_string().contains("no pictures"));
    }
}
