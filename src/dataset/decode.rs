//! Decoding JPEG and PNG to 8-bit pixels. The kind is told by the content, not by the file's name.

use std::io::Cursor;
use std::path::Path;

use image::codecs::png::PngDecoder;
use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageReader, Limits};
use zune_core::bytestream::ZCursor;
use zune_core::colorspace::ColorSpace;
use zune_core::options::DecoderOptions;
use zune_jpeg::JpegDecoder;

use super::source::read_file;
use crate::{Error, Result};

/// The error is the second half of a line that begins with the file's name.
type Decoded<T> = std::result::Result<T, String>;

/// Pixels of the largest image accepted, so that a hostile header cannot ask for all memory.
const MAX_PIXELS: usize = 50_000_000;

/// A decoded colour picture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RgbImage {
    /// Pixels per row.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// (height, width, 3) RGB.
    pub data: Vec<u8>,
}

/// A decoded grey picture.
pub(super) struct GreyImage {
    pub width: usize,
    pub height: usize,
    /// (height, width).
    pub data: Vec<u8>,
}

/// Reads and decodes one JPEG or PNG as a viewer shows it: turned and mirrored as its EXIF orientation says. Grey becomes RGB,
/// transparency is dropped, 16 bits become 8.
///
/// # Errors
/// [`crate::error::Kind::Input`] if the file is missing, truncated, damaged or neither JPEG nor PNG.
pub fn load_image(path: &Path) -> Result<RgbImage> {
    let bytes = read_file(path)?;
    rgb(&bytes).map(|image| upright(image, &bytes)).map_err(|e| Error::input(path, e))
}

/// The image of a file, turned as its EXIF data say, if it has any.
fn upright(image: RgbImage, file: &[u8]) -> RgbImage {
    let reader = ImageReader::new(Cursor::new(file)).with_guessed_format().ok();
    let orientation = reader.and_then(|r| r.into_decoder().ok()).and_then(|mut d| d.orientation().ok());
    let (Some(orientation), (width, height)) = (orientation, (image.width, image.height)) else { return image };
    if orientation == Orientation::NoTransforms {
        return image;
    }
    let pixels = image::RgbImage::from_raw(width as u32, height as u32, image.data).expect("three bytes a pixel");
    let mut turned = DynamicImage::ImageRgb8(pixels);
    turned.apply_orientation(orientation);
    RgbImage { width: turned.width() as usize, height: turned.height() as usize, data: turned.into_rgb8().into_raw() }
}

/// Decodes to RGB, as the pixels are stored.
pub(super) fn rgb(bytes: &[u8]) -> Decoded<RgbImage> {
    let (width, height, data) = match kind(bytes)? {
        Kind::Jpeg => jpeg(bytes, |_| ColorSpace::RGB).map(|(w, h, data, _)| (w, h, data))?,
        Kind::Png => {
            let image = png(bytes)?;
            (image.width() as usize, image.height() as usize, image.into_rgb8().into_raw())
        }
    };
    Ok(RgbImage { width, height, data })
}

/// Decodes to grey: the luma of ITU-R BT.601, as Pillow's `convert("L")`.
pub(super) fn grey(bytes: &[u8]) -> Decoded<GreyImage> {
    match kind(bytes)? {
        Kind::Jpeg => {
            // The luma plane is all a mask needs; chroma is neither transformed nor upsampled.
            let luma = |input| match input {
                ColorSpace::YCbCr | ColorSpace::Luma => ColorSpace::Luma,
                _ => ColorSpace::RGB,
            };
            let (width, height, data, space) = jpeg(bytes, luma)?;
            let data = if space == ColorSpace::Luma { data } else { luma_of_rgb(&data) };
            Ok(GreyImage { width, height, data })
        }
        Kind::Png => {
            let image = png(bytes)?;
            let (width, height) = (image.width() as usize, image.height() as usize);
            let data = if image.color().has_color() {
                luma_of_rgb(image.into_rgb8().as_raw())
            } else {
                image.into_luma8().into_raw()
            };
            Ok(GreyImage { width, height, data })
        }
    }
}

fn luma_of_rgb(rgb: &[u8]) -> Vec<u8> {
    rgb.chunks_exact(3)
        .map(|p| ((u32::from(p[0]) * 19595 + u32::from(p[1]) * 38470 + u32::from(p[2]) * 7471 + 0x8000) >> 16) as u8)
        .collect()
}

enum Kind {
    Jpeg,
    Png,
}

fn kind(bytes: &[u8]) -> Decoded<Kind> {
    match bytes {
        [] => Err("empty file; fetch it again".into()),
        [0xFF, 0xD8, ..] => Ok(Kind::Jpeg),
        [0x89, b'P', b'N', b'G', ..] => Ok(Kind::Png),
        _ => Err("neither JPEG nor PNG; convert it to one of them".into()),
    }
}

fn check_size(width: usize, height: usize) -> Decoded<()> {
    if width == 0 || height == 0 || width.saturating_mul(height) > MAX_PIXELS {
        return Err(format!(
            "{width}x{height} pixels; up to {} million are supported, scale it down",
            MAX_PIXELS / 1_000_000
        ));
    }
    Ok(())
}

/// Width, height, pixels and their colour space, which `target` chooses by that of the file.
///
/// `image`'s own JPEG reader turns the missing part of a truncated file grey; in strict mode the same decoder refuses.
fn jpeg(bytes: &[u8], target: impl Fn(ColorSpace) -> ColorSpace) -> Decoded<(usize, usize, Vec<u8>, ColorSpace)> {
    let damaged = |e: zune_jpeg::errors::DecodeErrors| format!("damaged JPEG ({}); fetch the file again", one_line(e));
    if !ends(bytes) {
        return Err("truncated JPEG (its end is missing); fetch the file again".into());
    }
    let options = DecoderOptions::default().set_strict_mode(true).set_max_width(usize::MAX).set_max_height(usize::MAX);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    decoder.decode_headers().map_err(damaged)?;
    let (width, height) = decoder.dimensions().unwrap_or_default();
    check_size(width, height)?;
    let space = target(decoder.input_colorspace().unwrap_or(ColorSpace::YCbCr));
    decoder.set_options(options.jpeg_set_out_colorspace(space));
    let mut data = vec![0; width * height * space.num_components()];
    decoder.decode_into(&mut data).map_err(damaged)?;
    Ok((width, height, data, space))
}

/// Whether an end-of-image marker follows the last start-of-scan marker. The decoder itself does not notice when only a
/// part of the last row of blocks is missing.
fn ends(jpeg: &[u8]) -> bool {
    const END: [u8; 2] = [0xFF, 0xD9];
    const SCAN: [u8; 2] = [0xFF, 0xDA];
    match jpeg.windows(2).rposition(|w| w == END) {
        Some(end) => !jpeg[end..].windows(2).any(|w| w == SCAN),
        None => false,
    }
}

fn png(bytes: &[u8]) -> Decoded<DynamicImage> {
    let damaged = |e: image::ImageError| format!("truncated or damaged PNG ({}); fetch the file again", one_line(e));
    let mut limits = Limits::no_limits();
    // Eight bytes a pixel (16-bit RGBA), and the decoder's own buffers.
    limits.max_alloc = Some(MAX_PIXELS as u64 * 8 + (64 << 20));
    let decoder = PngDecoder::with_limits(Cursor::new(bytes), limits).map_err(damaged)?;
    let (width, height) = decoder.dimensions();
    check_size(width as usize, height as usize)?;
    DynamicImage::from_decoder(decoder).map_err(damaged)
}

/// A library's message without its line breaks.
fn one_line(message: impl std::fmt::Display) -> String {
    message.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Philox, Purpose};

    macro_rules! fixture {
        ($name:literal) => {
            include_bytes!(concat!("../../tests/fixtures/dataset/", $name)) as &[u8]
        };
    }

    /// Each synthetic JPEG and what Pillow makes of it.
    const JPEGS: [(&str, &[u8], &[u8]); 7] = [
        ("4:2:0", fixture!("420.jpg"), fixture!("420.pillow.png")),
        ("4:2:2", fixture!("422.jpg"), fixture!("422.pillow.png")),
        ("4:4:4", fixture!("444.jpg"), fixture!("444.pillow.png")),
        ("progressive", fixture!("progressive.jpg"), fixture!("progressive.pillow.png")),
        ("restart markers", fixture!("restart.jpg"), fixture!("restart.pillow.png")),
        ("grey", fixture!("grey.jpg"), fixture!("grey.pillow.png")),
        ("CMYK", fixture!("cmyk.jpg"), fixture!("cmyk.pillow.png")),
    ];

    #[test]
    fn jpegs_agree_with_pillow() {
        for (name, jpeg, pillow) in JPEGS {
            let (ours, theirs) = (rgb(jpeg).unwrap(), rgb(pillow).unwrap());
            assert_eq!((ours.width, ours.height), (61, 45), "{name}");
            let differences = ours.data.iter().zip(&theirs.data).map(|(a, b)| a.abs_diff(*b));
            let (worst, sum) = differences.fold((0, 0), |(w, s), d| (w.max(d), s + u32::from(d)));
            let mean = f64::from(sum) / ours.data.len() as f64;
            assert!(worst <= 4 && mean < 0.5, "{name}: worst {worst}, mean {mean}");
        }
    }

    #[test]
    fn jpeg_mask_equals_pillows_after_the_threshold() {
        let ours = grey(fixture!("mask.jpg")).unwrap();
        let theirs = grey(fixture!("mask.pillow.png")).unwrap();
        assert!(ours.data.iter().any(|&v| v > 127) && ours.data.iter().any(|&v| v < 128));
        assert!(ours.data.iter().zip(&theirs.data).all(|(a, b)| (*a > 127) == (*b > 127)));
    }

    /// The file with an EXIF orientation, as cameras write it.
    fn oriented(jpeg: &[u8], orientation: u8) -> Vec<u8> {
        let exif = [
            &[0xFF, 0xE1, 0, 34][..],
            b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0",
            &[orientation, 0, 0, 0, 0, 0, 0],
        ];
        [&jpeg[..2], &exif.concat(), &jpeg[2..]].concat()
    }

    #[test]
    fn pictures_to_look_at_stand_upright() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.jpg");
        let stored = rgb(fixture!("444.jpg")).unwrap();
        let load = |orientation| {
            std::fs::write(&file, oriented(fixture!("444.jpg"), orientation)).unwrap();
            load_image(&file).unwrap()
        };
        assert_eq!(load(1), stored);
        assert_eq!(load(9), stored, "no such orientation");
        let turned = load(6);
        assert_eq!((turned.width, turned.height), (45, 61), "a quarter to the right");
        assert_eq!(turned.data[44 * 3..45 * 3], stored.data[..3], "the first pixel is at the upper right");
        assert_eq!(rgb(&oriented(fixture!("444.jpg"), 6)).unwrap(), stored, "training takes pixels as they are stored");
    }

    /// A JPEG or PNG cut off anywhere is an error, never a picture that is grey from some row on.
    #[test]
    fn truncated_pictures_are_refused() {
        let png = fixture!("420.pillow.png");
        for (name, bytes) in JPEGS.map(|(name, jpeg, _)| (name, jpeg)).into_iter().chain([("PNG", png)]) {
            // The last 12 bytes of a PNG are an empty chunk that says so; without it all pixels are there.
            let needed = if name == "PNG" { bytes.len() - 12 } else { bytes.len() };
            for len in 0..needed {
                assert!(rgb(&bytes[..len]).is_err(), "{name}: {len} of {} bytes", bytes.len());
                assert!(grey(&bytes[..len]).is_err(), "{name}: {len} of {} bytes as a mask", bytes.len());
            }
        }
    }

    /// Damaged bytes give an error or a picture of the stated size.
    #[test]
    fn damaged_pictures_do_not_panic() {
        let random = Philox::new(5, Purpose::Demo, 0, 0);
        for (_, jpeg, png) in JPEGS {
            for bytes in [jpeg, png] {
                for round in 0..400 {
                    let mut bytes = bytes.to_vec();
                    for k in 0..1 + round % 3 {
                        let word = random.word(round * 3 + k) as usize;
                        let at = word % bytes.len();
                        bytes[at] = (word >> 24) as u8;
                    }
                    if let Ok(image) = rgb(&bytes) {
                        assert_eq!(image.data.len(), image.width * image.height * 3);
                    }
                    if let Ok(image) = grey(&bytes) {
                        assert_eq!(image.data.len(), image.width * image.height);
                    }
                }
            }
        }
    }

    #[test]
    fn hostile_sizes_are_refused_before_memory_is_taken() {
        let mut jpeg = fixture!("444.jpg").to_vec();
        let frame = jpeg.windows(2).position(|w| w == [0xFF, 0xC0]).unwrap();
        jpeg[frame + 5..frame + 9].fill(0xFF);
        assert!(rgb(&jpeg).unwrap_err().contains("65535x65535 pixels"));

        let mut png = fixture!("444.pillow.png").to_vec();
        png[16..24].copy_from_slice(&[0, 1, 0, 0, 0, 1, 0, 0]);
        let checksum = crc32fast::hash(&png[12..29]);
        png[29..33].copy_from_slice(&checksum.to_be_bytes());
        assert!(rgb(&png).unwrap_err().contains("65536x65536 pixels"));
    }

    fn encode(image: DynamicImage) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        image.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
        bytes.into_inner()
    }

    #[test]
    fn every_kind_of_png_becomes_8_bit() {
        let grey8 = encode(DynamicImage::ImageLuma8(image::GrayImage::from_raw(2, 1, vec![7, 200]).unwrap()));
        assert_eq!(rgb(&grey8).unwrap().data, [7, 7, 7, 200, 200, 200]);
        assert_eq!(grey(&grey8).unwrap().data, [7, 200]);

        let rgba = image::RgbaImage::from_raw(2, 1, vec![255, 0, 0, 0, 0, 255, 0, 9]).unwrap();
        let rgba = encode(DynamicImage::ImageRgba8(rgba));
        assert_eq!(rgb(&rgba).unwrap().data, [255, 0, 0, 0, 255, 0]);
        assert_eq!(grey(&rgba).unwrap().data, [76, 150], "Pillow's luma of red and green");

        let grey16 = image::ImageBuffer::from_raw(2, 1, vec![0u16, 65535]).unwrap();
        let grey16 = encode(DynamicImage::ImageLuma16(grey16));
        assert_eq!(grey(&grey16).unwrap().data, [0, 255]);

        let rgb16 = image::ImageBuffer::from_raw(1, 1, vec![257u16 * 10, 257 * 20, 257 * 30]).unwrap();
        assert_eq!(rgb(&encode(DynamicImage::ImageRgb16(rgb16))).unwrap().data, [10, 20, 30]);
    }

    #[test]
    fn other_kinds_are_named() {
        assert!(rgb(b"GIF89a").unwrap_err().contains("neither JPEG nor PNG"));
        assert!(rgb(b"").unwrap_err().contains("empty"));
    }
}
