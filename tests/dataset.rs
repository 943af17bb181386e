//! Sources, packed datasets, splits and their bad inputs, through the public interface.

use std::fs;
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use segpeft_native::dataset::{
    Augment, DEFAULT_SIZE, PackedDataset, Split, load_image, open_or_prepare, prepare, resize_bilinear, resize_nearest,
};
use segpeft_native::error::Kind;
use segpeft_native::progress::Progress;
use segpeft_native::{Error, Result};
use serde::Deserialize;
use tempfile::TempDir;
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

// ---- Against OpenCV and albumentations (fixtures written by tools/reference/images.py) ----

fn fixture<T: for<'a> Deserialize<'a>>(name: &str) -> T {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/dataset").join(name);
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect()
}

#[derive(Deserialize)]
struct ResizeCase {
    seed: u32,
    from: (usize, usize),
    to: (usize, usize),
    channels: usize,
    linear_crc: u32,
    nearest_crc: Option<u32>,
    linear: Option<String>,
}

/// Pixels by formula: the high byte of a multiplicative hash of the index.
fn noise(seed: u32, len: usize) -> Vec<u8> {
    (0..len as u32).map(|i| (i.wrapping_add(seed).wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

#[test]
fn resizing_equals_opencv() {
    let cases: Vec<ResizeCase> = fixture("resize.json");
    assert!(cases.len() > 20);
    for case in cases {
        let what = format!("{:?} to {:?}, {} channels", case.from, case.to, case.channels);
        let image = noise(case.seed, case.from.0 * case.from.1 * case.channels);
        let linear = resize_bilinear(&image, case.from, case.to, case.channels);
        if let Some(expected) = case.linear {
            assert_eq!(linear, bytes(&expected), "{what}");
        }
        assert_eq!(crc32fast::hash(&linear), case.linear_crc, "{what}");
        if let Some(expected) = case.nearest_crc {
            assert_eq!(crc32fast::hash(&resize_nearest(&image, case.from, case.to)), expected, "{what}, nearest");
        }
    }
}

#[derive(Deserialize)]
struct AugmentCase {
    contrast: f32,
    brightness: f32,
    table: String,
}

#[test]
fn brightness_and_contrast_equal_albumentations() {
    let cases: Vec<AugmentCase> = fixture("augment.json");
    assert!(cases.len() > 20);
    for AugmentCase { contrast, brightness, table } in cases {
        let augment = Augment { flip: false, contrast, brightness };
        assert_eq!(augment.table()[..], bytes(&table), "contrast {contrast}, brightness {brightness}");
    }
}

// ---- Sources made for the tests ----

/// A grey gradient, different for each `seed`.
fn image_png(seed: u32, width: u32, height: u32) -> Vec<u8> {
    let pixel = |x, y| image::Rgb([(x * 3 + seed * 40) as u8, (y * 5) as u8, (x + y) as u8]);
    png(image::RgbImage::from_fn(width, height, pixel).into())
}

/// White in the left part, black elsewhere.
fn mask_png(width: u32, height: u32, left: u32) -> Vec<u8> {
    png(image::GrayImage::from_fn(width, height, |x, _| image::Luma([if x < left { 255 } else { 0 }])).into())
}

fn png(image: image::DynamicImage) -> Vec<u8> {
    encode(image, image::ImageFormat::Png)
}

fn encode(image: image::DynamicImage, format: image::ImageFormat) -> Vec<u8> {
    let mut out = Cursor::new(Vec::new());
    image.write_to(&mut out, format).unwrap();
    out.into_inner()
}

/// Files by name within a source.
fn sample() -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    for (i, stem) in ["b", "a", "c with space"].into_iter().enumerate() {
        files.push((format!("images/{stem}.png"), image_png(i as u32, 50, 40)));
        files.push((format!("masks/{stem}.PNG"), mask_png(50, 40, 25)));
    }
    files
}

struct Fixture {
    dir: TempDir,
}

impl Fixture {
    fn folder(files: &[(String, Vec<u8>)]) -> Self {
        let fixture = Self { dir: tempfile::tempdir().unwrap() };
        for part in ["images", "masks"] {
            fs::create_dir_all(fixture.source().join(part)).unwrap();
        }
        for (name, data) in files {
            fs::write(fixture.source().join(name), data).unwrap();
        }
        fixture
    }

    fn archive(files: &[(String, Vec<u8>)]) -> Self {
        let fixture = Self { dir: tempfile::tempdir().unwrap() };
        fs::write(fixture.source(), zip(files)).unwrap();
        fixture
    }

    fn source(&self) -> PathBuf {
        self.dir.path().join("source")
    }

    fn out(&self) -> PathBuf {
        self.dir.path().join("out/data.pack")
    }

    fn cache(&self) -> PathBuf {
        self.dir.path().join("cache")
    }

    fn file(&self, name: &str) -> PathBuf {
        self.source().join(name)
    }

    fn prepare(&self) -> Result<PackedDataset> {
        prepare(&self.source(), &self.out(), 32, &Progress::quiet())?;
        PackedDataset::open(&self.out())
    }

    fn cached(&self, size: Option<usize>) -> Result<PackedDataset> {
        open_or_prepare(&self.source(), &self.cache(), size, DEFAULT_SIZE, &Progress::quiet())
    }

    /// Preparing fails with one line that names `file` and holds `words`; nothing is left in the output folder.
    #[track_caller]
    fn refused(&self, file: &Path, words: &str) {
        let e = self.prepare().err().expect("an error");
        one_line(&e, Kind::Input, file, words);
        let left = fs::read_dir(self.out().parent().unwrap()).map_or(0, Iterator::count);
        assert_eq!(left, 0, "files left behind");
    }
}

fn zip(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    for (i, (name, data)) in files.iter().enumerate() {
        let method = [zip::CompressionMethod::Stored, zip::CompressionMethod::Deflated][i % 2];
        zip.start_file(name, SimpleFileOptions::default().compression_method(method)).unwrap();
        zip.write_all(data).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

#[track_caller]
fn one_line(e: &Error, kind: Kind, file: &Path, words: &str) {
    let text = e.to_string();
    assert_eq!(e.kind, kind, "{text}");
    assert!(!text.contains('\n'), "{text:?}");
    assert!(text.starts_with(&format!("{}: ", file.display())), "{text:?} does not begin with {}", file.display());
    assert!(text.contains(words), "{text:?} does not say {words:?}");
}

fn prefixed(prefix: &str, files: Vec<(String, Vec<u8>)>) -> Vec<(String, Vec<u8>)> {
    files.into_iter().map(|(name, data)| (format!("{prefix}{name}"), data)).collect()
}

// ---- What is packed ----

#[test]
fn a_folder_is_packed_in_the_order_of_its_stems() {
    let fixture = Fixture::folder(&sample());
    let summary = prepare(&fixture.source(), &fixture.out(), 64, &Progress::quiet()).unwrap();
    assert_eq!((summary.images, summary.size, summary.foreground), (3, 64, 0.5));
    assert_eq!(summary.bytes, fs::metadata(fixture.out()).unwrap().len());

    let data = PackedDataset::open(&fixture.out()).unwrap();
    assert_eq!((data.len(), data.size(), data.is_empty()), (3, 64, false));
    assert_eq!([data.name(0), data.name(1), data.name(2)], ["a", "b", "c with space"]);
    assert_eq!((data.index("b"), data.index("z")), (Some(1), None));
    for (i, seed) in [(0, 1), (1, 0), (2, 2)] {
        let image = image::load_from_memory(&image_png(seed, 50, 40)).unwrap().into_rgb8().into_raw();
        assert_eq!(data.pixels(i), resize_bilinear(&image, (50, 40), (64, 64), 3));
        assert!(data.mask(i).iter().enumerate().all(|(at, &m)| m == u8::from(at % 64 < 32)));
    }
}

#[test]
fn an_archive_gives_the_same_as_its_folder_whatever_its_top_folder_is_called() {
    let folder = Fixture::folder(&sample()).prepare().unwrap();
    for prefix in ["", "Kvasir-SEG/", "a/b/"] {
        let mut files = prefixed(prefix, sample());
        files.push((format!("{prefix}readme.txt"), b"hello".to_vec()));
        files.push((format!("__MACOSX/{prefix}images/._a.png"), b"junk".to_vec()));
        files.push((format!("{prefix}images/.DS_Store"), b"junk".to_vec()));
        let archive = Fixture::archive(&files).prepare().unwrap();
        assert_eq!(archive.fingerprint(), folder.fingerprint(), "{prefix:?}");
    }
}

#[test]
fn the_fingerprint_is_that_of_the_contents() {
    let one = Fixture::folder(&sample()).prepare().unwrap().fingerprint();
    let mut files = sample();
    files[1].1 = mask_png(50, 40, 26);
    assert_ne!(Fixture::folder(&files).prepare().unwrap().fingerprint(), one);
    let mut files = sample();
    files[0].0 = "images/d.png".into();
    files[1].0 = "masks/d.png".into();
    assert_ne!(Fixture::folder(&files).prepare().unwrap().fingerprint(), one);
}

#[test]
fn jpeg_pictures_are_packed_too() {
    let mask = image::GrayImage::from_fn(48, 48, |x, _| image::Luma([if x < 24 { 255 } else { 0 }]));
    let fixture = Fixture::folder(&[
        ("images/x.JPEG".into(), encode(image::RgbImage::new(48, 48).into(), image::ImageFormat::Jpeg)),
        ("masks/x.jpg".into(), encode(mask.into(), image::ImageFormat::Jpeg)),
    ]);
    let data = fixture.prepare().unwrap();
    assert!(data.mask(0).iter().enumerate().all(|(at, &m)| m == u8::from(at % 32 < 16)));
}

#[test]
fn load_image_reads_one_picture_and_names_a_bad_one() {
    let fixture = Fixture::folder(&sample());
    let image = load_image(&fixture.file("images/a.png")).unwrap();
    assert_eq!((image.width, image.height, image.data.len()), (50, 40, 6000));
    let bad = fixture.file("bad.png");
    one_line(&load_image(&bad).unwrap_err(), Kind::Input, &bad, "check the name");
    fs::write(&bad, b"hello").unwrap();
    one_line(&load_image(&bad).unwrap_err(), Kind::Input, &bad, "neither JPEG nor PNG");
}

// ---- Bad sources ----

#[test]
fn missing_partners_are_named() {
    let mut files = sample();
    files.remove(1);
    let fixture = Fixture::folder(&files);
    fixture.refused(&fixture.file("images/b.png"), "add masks/b.jpg or .png");
    let mut files = prefixed("top/", sample());
    files.remove(0);
    let fixture = Fixture::archive(&files);
    fixture.refused(&fixture.file("top/masks/b.PNG"), "has no image");
}

#[test]
fn duplicated_stems_are_named() {
    let mut files = sample();
    files.push(("images/a.jpg".into(), Vec::new()));
    let fixture = Fixture::folder(&files);
    let e = fixture.prepare().err().unwrap();
    assert!(e.to_string().contains("has the same stem; remove or rename one of them"), "{e}");
    let fixture = Fixture::archive(&files);
    fixture.refused(&fixture.file("images/a.jpg"), "a.png has the same stem");
}

#[test]
fn truncated_and_foreign_pictures_are_named() {
    let jpeg = encode(image::load_from_memory(&image_png(0, 50, 40)).unwrap(), image::ImageFormat::Jpeg);
    let mut files = sample();
    files[0] = ("images/b.jpg".into(), jpeg[..jpeg.len() * 2 / 3].to_vec());
    let fixture = Fixture::folder(&files);
    fixture.refused(&fixture.file("images/b.jpg"), "truncated JPEG");
    let fixture = Fixture::archive(&files);
    fixture.refused(&fixture.file("images/b.jpg"), "fetch the file again");

    let mut files = sample();
    files[1].1.truncate(60);
    let fixture = Fixture::folder(&files);
    fixture.refused(&fixture.file("masks/b.PNG"), "truncated or damaged PNG");
    files[1].1 = b"BM....".to_vec();
    let fixture = Fixture::folder(&files);
    fixture.refused(&fixture.file("masks/b.PNG"), "convert it");
}

#[test]
fn image_and_mask_of_different_size_are_named() {
    let mut files = sample();
    files[1].1 = mask_png(40, 50, 25);
    let fixture = Fixture::folder(&files);
    fixture.refused(&fixture.file("masks/b.PNG"), "the mask is 40x50, its image 50x40; give both the same size");
}

#[test]
fn masks_of_zeros_and_ones_are_refused() {
    let mask = image::GrayImage::from_pixel(50, 40, image::Luma([1]));
    let fixture =
        Fixture::folder(&[("images/a.png".into(), image_png(0, 50, 40)), ("masks/a.png".into(), png(mask.into()))]);
    fixture.refused(&fixture.source(), "masks must be 0 (background) and 255 (polyp)");
}

#[test]
fn empty_and_wrong_folders_are_refused() {
    let fixture = Fixture::folder(&[]);
    fixture.refused(&fixture.source(), "no .jpg or .png in images/ and masks/");
    fs::remove_dir(fixture.file("masks")).unwrap();
    fixture.refused(&fixture.source(), "no folder masks/");
    fs::remove_dir_all(fixture.source()).unwrap();
    fixture.refused(&fixture.source(), "check the name");
}

#[test]
fn wrong_archives_are_refused() {
    let fixture = Fixture::archive(&[("notes/readme.txt".into(), b"hello".to_vec())]);
    fixture.refused(&fixture.source(), "no pictures in images/ and masks/");
    let fixture = Fixture::archive(&[prefixed("one/", sample()), prefixed("two/", sample())].concat());
    fixture.refused(&fixture.source(), "holds two datasets");
    let whole = zip(&sample());
    for data in [&b""[..], b"not a zip", &whole[..whole.len() / 2], &whole[..whole.len() - 1]] {
        fs::write(fixture.source(), data).unwrap();
        fixture.refused(&fixture.source(), "not a zip archive that can be read");
    }
}

#[test]
fn a_damaged_entry_fails_its_checksum() {
    let mut data = zip(&sample());
    // The first entry is stored; its pixels lie some 100 bytes into the file.
    data[120] ^= 1;
    let fixture = Fixture::archive(&[]);
    fs::write(fixture.source(), data).unwrap();
    fixture.refused(&fixture.file("images/b.png"), "download the archive again");
}

#[test]
fn entries_that_climb_out_are_refused() {
    for name in ["../images/x.png", "top/../../images/x.png", "/images/x.png", "images/..\\..\\x.png"] {
        let mut files = sample();
        files.push((name.into(), image_png(0, 50, 40)));
        // The writer tidies names up; a stand-in of the same length lets the wanted one through.
        let stand_in = "z".repeat(name.len());
        files.last_mut().unwrap().0 = stand_in.clone();
        let mut data = zip(&files);
        for at in 0..data.len() - name.len() {
            if data[at..].starts_with(stand_in.as_bytes()) {
                data[at..at + name.len()].copy_from_slice(name.as_bytes());
            }
        }
        let fixture = Fixture::archive(&[]);
        fs::write(fixture.source(), data).unwrap();
        fixture.refused(&fixture.source(), "leads out of the archive");
    }
}

#[test]
fn links_in_archives_are_refused() {
    let mut zip = ZipWriter::new(Cursor::new(zip(&[])));
    zip.add_symlink("images/a.png", "/etc/passwd", SimpleFileOptions::default()).unwrap();
    let fixture = Fixture::archive(&[]);
    fs::write(fixture.source(), zip.finish().unwrap().into_inner()).unwrap();
    fixture.refused(&fixture.file("images/a.png"), "a symbolic link");
}

#[cfg(unix)]
#[test]
fn links_that_lead_out_of_a_folder_are_refused() {
    use std::os::unix::fs::symlink;
    let fixture = Fixture::folder(&sample());
    symlink("b.png", fixture.file("images/inside.png")).unwrap();
    symlink("b.PNG", fixture.file("masks/inside.png")).unwrap();
    assert_eq!(fixture.prepare().unwrap().len(), 4);
    fs::remove_file(fixture.out()).unwrap();
    let outside = fixture.dir.path().join("outside.png");
    fs::write(&outside, image_png(0, 50, 40)).unwrap();
    symlink(&outside, fixture.file("images/outside.png")).unwrap();
    fixture.refused(&fixture.file("images/outside.png"), "leads out of the folder");
}

#[test]
fn impossible_names_are_refused() {
    for name in ["images/two\nlines.png", "images/bell\u{7}.png"] {
        let files = [sample(), vec![(name.into(), image_png(0, 50, 40))]].concat();
        let fixture = Fixture::archive(&files);
        fixture.refused(&fixture.source(), "unpack it and rename the file");
        let fixture = Fixture::folder(&files);
        fixture.refused(&fixture.file("images"), "is not plain text of at most 255 bytes; rename the file");
    }
    let name = format!("images/{}.png", "x".repeat(300));
    let fixture = Fixture::archive(&[sample(), vec![(name, image_png(0, 50, 40))]].concat());
    fixture.refused(&fixture.file("images"), "rename the file");
}

// ---- Sizes and outputs ----

#[test]
fn absurd_sizes_are_refused() {
    let fixture = Fixture::folder(&sample());
    for size in [0, 1, 31, 33, 4097, 4128, usize::MAX] {
        let e = prepare(&fixture.source(), &fixture.out(), size, &Progress::quiet()).unwrap_err();
        assert!(e.kind == Kind::Usage && e.to_string().contains("choose a multiple of 32"), "{e}");
        assert_eq!(fixture.cached(Some(size)).err().unwrap().kind, Kind::Usage);
    }
    assert!(!fixture.out().exists());
}

#[test]
fn an_unwritable_output_is_named() {
    let fixture = Fixture::folder(&sample());
    let file = fixture.file("images/a.png");
    let e = prepare(&fixture.source(), &file.join("x.pack"), 32, &Progress::quiet()).unwrap_err();
    one_line(&e, Kind::Io, &file, "cannot create this folder");
    assert_eq!(fs::read(&file).unwrap(), image_png(1, 50, 40));
}

#[test]
fn only_packed_datasets_are_replaced() {
    let fixture = Fixture::folder(&sample());
    let file = fixture.file("images/a.png");
    for out in [&file, &fixture.source()] {
        let e = prepare(&fixture.source(), out, 32, &Progress::quiet()).unwrap_err();
        one_line(&e, Kind::Usage, out, "is not a packed dataset; choose another name");
    }
    assert_eq!(fs::read(&file).unwrap(), image_png(1, 50, 40));
    fixture.prepare().unwrap();
    fixture.prepare().unwrap();
    let e = prepare(&fixture.out(), &fixture.out(), 32, &Progress::quiet()).unwrap_err();
    one_line(&e, Kind::Usage, &fixture.out(), "a packed dataset already");
}

#[test]
fn a_failure_keeps_the_older_packed_file() {
    let fixture = Fixture::folder(&sample());
    let before = fixture.prepare().unwrap().fingerprint();
    fs::write(fixture.file("images/a.png"), b"junk").unwrap();
    fixture.prepare().err().unwrap();
    assert_eq!(PackedDataset::open(&fixture.out()).unwrap().fingerprint(), before);
    assert_eq!(fs::read_dir(fixture.out().parent().unwrap()).unwrap().count(), 1);
}

// ---- Bad packed files ----

/// A packed file's bytes, its path and its folder.
fn packed() -> (Vec<u8>, Fixture) {
    let fixture = Fixture::folder(&sample());
    fixture.prepare().unwrap();
    (fs::read(fixture.out()).unwrap(), fixture)
}

#[track_caller]
fn open_refused(fixture: &Fixture, data: &[u8], words: &str) {
    let path = fixture.out();
    fs::write(&path, data).unwrap();
    let e = PackedDataset::open(&path).err().expect("an error");
    one_line(&e, Kind::Input, &path, words);
    assert!(e.to_string().ends_with("make it again with `segpeft-native prepare`"), "{e}");
}

/// Puts the right checksum over a changed header.
fn reseal(data: &mut [u8], head: usize) {
    data[12..16].fill(0);
    let checksum = crc32fast::hash(&data[..head]);
    data[12..16].copy_from_slice(&checksum.to_le_bytes());
}

#[test]
fn truncated_packed_files_are_refused() {
    let (data, fixture) = packed();
    for len in [40, 60, 4095, 4096, 4097, data.len() / 2, data.len() - 1] {
        open_refused(&fixture, &data[..len], "truncated");
    }
    for len in [0, 7, 39] {
        open_refused(&fixture, &data[..len], "not a packed dataset");
    }
    open_refused(&fixture, &[&data[..], &[0]].concat(), "bytes after the end");
}

#[test]
fn packed_files_of_another_version_or_kind_are_refused() {
    let (mut data, fixture) = packed();
    data[8] = 2;
    reseal(&mut data, 4096);
    open_refused(&fixture, &data, "version 2; this program reads version 1");
    data[0] = b'X';
    open_refused(&fixture, &data, "not a packed dataset");
    let missing = fixture.dir.path().join("missing");
    one_line(&PackedDataset::open(&missing).err().unwrap(), Kind::Input, &missing, "cannot be opened");
}

#[test]
fn every_flipped_bit_is_found() {
    let (data, fixture) = packed();
    for at in (0..100).chain((100..data.len()).step_by(13)) {
        let mut data = data.clone();
        data[at] ^= 1 << (at % 8);
        open_refused(&fixture, &data, "");
    }
}

#[test]
fn hostile_headers_are_refused() {
    let (data, fixture) = packed();
    let changed = |at: usize, bytes: &[u8]| {
        let mut data = data.clone();
        data[at..at + bytes.len()].copy_from_slice(bytes);
        reseal(&mut data, 4096);
        data
    };
    for size in [0u32, 31, 48, 8192, u32::MAX] {
        open_refused(&fixture, &changed(16, &size.to_le_bytes()), "an impossible size");
    }
    open_refused(&fixture, &changed(16, &4096u32.to_le_bytes()), "truncated");
    open_refused(&fixture, &changed(20, &0u32.to_le_bytes()), "an impossible size or number");
    open_refused(&fixture, &changed(20, &u32::MAX.to_le_bytes()), "truncated");
    open_refused(&fixture, &changed(24, &(1u64 << 40).to_le_bytes()), "truncated");
    open_refused(&fixture, &changed(24, &u64::MAX.to_le_bytes()), "damaged (lengths");
    open_refused(&fixture, &changed(24, &3u64.to_le_bytes()), "damaged (names)");
    open_refused(&fixture, &changed(40 + 12, b"b"), "damaged (names)");
    open_refused(&fixture, &changed(40 + 12, &[0xFF]), "damaged (names)");
    // A class that does not exist, with the right checksums.
    let mut data = data.clone();
    data[4096 + 4 * 32 * 32 - 1] = 2;
    let checksum = crc32fast::hash(&data[4096..8192]);
    data[40..44].copy_from_slice(&checksum.to_le_bytes());
    reseal(&mut data, 4096);
    open_refused(&fixture, &data, "other values than 0 and 1");
}

// ---- The cache ----

/// Sets a file's time of modification, so that a test need not wait for the clock.
fn touch(path: &Path, seconds: u64) {
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    fs::File::options().write(true).open(path).unwrap().set_modified(time).unwrap();
}

#[test]
fn the_cache_is_reused_until_the_source_changes() {
    for fixture in [Fixture::folder(&sample()), Fixture::archive(&sample())] {
        let first = fixture.cached(Some(32)).unwrap();
        assert_eq!(first.path(), fixture.cache().join("source-32.pack"));
        touch(first.path(), 1000);
        let unchanged = || {
            fs::metadata(first.path()).unwrap().modified().unwrap()
                == SystemTime::UNIX_EPOCH + Duration::from_secs(1000)
        };
        fixture.cached(Some(32)).unwrap();
        assert!(unchanged());

        let changed = if fixture.source().is_dir() { fixture.file("masks/a.PNG") } else { fixture.source() };
        touch(&changed, 2000);
        fixture.cached(Some(32)).unwrap();
        assert!(!unchanged());

        assert_eq!(fixture.cached(Some(64)).unwrap().size(), 64);
        assert_eq!(fs::read_dir(fixture.cache()).unwrap().count(), 2);
    }
}

#[test]
fn a_damaged_cache_is_made_again() {
    let fixture = Fixture::folder(&sample());
    let first = fixture.cached(Some(32)).unwrap();
    for damage in [&b""[..], b"junk", &fs::read(first.path()).unwrap()[..5000]] {
        fs::write(first.path(), damage).unwrap();
        assert_eq!(fixture.cached(Some(32)).unwrap().fingerprint(), first.fingerprint());
    }
}

#[test]
fn a_packed_file_is_taken_as_it_is_and_must_have_the_size_asked_for() {
    let fixture = Fixture::folder(&sample());
    fixture.prepare().unwrap();
    let open = |size| open_or_prepare(&fixture.out(), &fixture.cache(), size, DEFAULT_SIZE, &Progress::quiet());
    assert_eq!((open(None).unwrap().size(), open(Some(32)).unwrap().size()), (32, 32));
    one_line(&open(Some(64)).err().unwrap(), Kind::Usage, &fixture.out(), "holds images of size 32, not 64");
    assert!(!fixture.cache().exists());
}

// ---- Splits ----

#[test]
fn a_split_survives_writing_and_reading() {
    let fixture = Fixture::folder(&sample());
    let data = fixture.prepare().unwrap();
    let split = Split { train: vec![2, 0], val: vec![1] };
    split.write(&fixture.cache(), &data).unwrap();
    assert_eq!(fs::read_to_string(fixture.cache().join("train.txt")).unwrap(), "c with space\na\n");
    assert_eq!(Split::read(&fixture.cache(), &data).unwrap(), split);
}

#[test]
fn bad_splits_are_refused() {
    let fixture = Fixture::folder(&sample());
    let data = fixture.prepare().unwrap();
    let dir = fixture.cache();
    fs::create_dir(&dir).unwrap();
    let (train, val) = (dir.join("train.txt"), dir.join("val.txt"));
    let refused = |text: &[u8], file: &Path, words: &str| {
        fs::write(&val, text).unwrap();
        one_line(&Split::read(&dir, &data).unwrap_err(), Kind::Input, file, words);
    };
    refused(b"b\n", &train, "cannot be read");
    fs::write(&train, "a\r\n\n").unwrap();
    refused(b"\n", &val, "names no image");
    refused(b"b\nx\n", &val, "line 2: no image \"x\"");
    refused(b"b\nb\n", &val, "line 2: \"b\" is listed twice");
    refused(b"a\n", &val, "line 1: \"a\" is listed twice");
    refused(b"\xFF", &val, "cannot be read");
    fs::write(&val, "b").unwrap();
    assert_eq!(Split::read(&dir, &data).unwrap(), Split { train: vec![0], val: vec![1] });
}

// ---- The real dataset ----

#[test]
fn kvasir_seg_is_packed_whole() {
    let Some(source) = std::env::var_os("SEGPEFT_KVASIR").filter(|p| Path::new(p).exists()) else {
        eprintln!("skipped: SEGPEFT_KVASIR does not name the Kvasir-SEG archive");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("kvasir.pack");
    let summary = prepare(Path::new(&source), &out, 64, &Progress::quiet()).unwrap();
    assert_eq!(summary.images, 1000);
    assert!((summary.foreground - 0.154).abs() < 0.002, "{}", summary.foreground);
    assert_eq!(PackedDataset::open(&out).unwrap().len(), 1000);
}
