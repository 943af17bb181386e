//! From a source to a packed dataset: decode, resize, threshold, pack, on all cores.

use std::fs;
use std::io::{Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Instant;

use rayon::prelude::*;
use serde::Serialize;

use super::packed::{self, Writer, record_len};
use super::resize::{resize_bilinear_into, resize_nearest_into};
use super::source::{Pair, Source};
use super::{PackedDataset, decode};
use crate::error::Kind;
use crate::progress::{Progress, byte_size, count, interrupted};
use crate::{Error, Result, files};

/// Side of the packed images where none is asked for.
pub const DEFAULT_SIZE: usize = 512;
/// Mask pixels above this value are polyp.
const THRESHOLD: u8 = 127;

/// What [`prepare`] did.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PrepareSummary {
    /// Images packed.
    pub images: usize,
    /// Side of the packed images in pixels.
    pub size: usize,
    /// Length of the packed file.
    pub bytes: u64,
    /// Share of the mask pixels that are polyp.
    pub foreground: f64,
    /// Seconds taken.
    pub seconds: f64,
}

/// Packs `source` (an archive, read in place, or a folder; either holds `images/` and `masks/`) into the file `out`.
/// Images are resized to `size` x `size` as OpenCV's `INTER_LINEAR` does, masks as `INTER_NEAREST` does and
/// thresholded at > 127. `out` appears when it is complete, and may replace an older packed dataset.
///
/// # Errors
/// [`crate::error::Kind::Usage`] for an impossible size or output; [`crate::error::Kind::Input`] for a source of another
/// layout, unpaired or unequal images and masks, or an unreadable picture; [`crate::error::Kind::Io`] if `out` cannot be
/// written; [`crate::error::Kind::Interrupted`] on a signal.
pub fn prepare(source: &Path, out: &Path, size: usize, progress: &Progress) -> Result<PrepareSummary> {
    packed::check_size(size)?;
    if is_packed_file(source) {
        return Err(Error::usage(format!("{}: a packed dataset already; use it as it is", source.display())));
    }
    // Renaming over a file replaces it: never the source, a picture or a device.
    if out.exists() && !is_packed_file(out) {
        return Err(Error::usage(format!(
            "{}: exists and is not a packed dataset; choose another name for the output or remove it",
            out.display()
        )));
    }
    pack_file(&Source::open(source)?, out, size, progress)
}

/// Opens the packed dataset `source`, whose image size must be `size` if one is given. Any other source is packed at
/// `size` (`default` if none is given) into the folder `cache`, or taken from there if it has not changed since.
///
/// # Errors
/// As [`prepare`] and [`PackedDataset::open`].
pub fn open_or_prepare(
    source: &Path,
    cache: &Path,
    size: Option<usize>,
    default: usize,
    progress: &Progress,
) -> Result<PackedDataset> {
    size.map_or(Ok(()), packed::check_size)?;
    if is_packed_file(source) {
        let data = PackedDataset::open(source)?;
        return match size {
            Some(size) if size != data.size() => Err(Error::usage(format!(
                "{}: holds images of size {}, not {size}; leave --size out or prepare the source again at {size}",
                source.display(),
                data.size()
            ))),
            _ => Ok(data),
        };
    }
    let size = size.unwrap_or(default);
    let opened = Source::open(source)?;
    let out = cache_file(source, cache, size);
    if out.exists() {
        match PackedDataset::open(&out) {
            Ok(data) if data.stamp() == opened.stamp() && data.size() == size => {
                progress.detail(format!("{}: unchanged, reusing {}", source.display(), out.display()));
                return Ok(data);
            }
            Ok(_) => progress.info(format!("{}: changed, packing it again", source.display())),
            Err(e) => progress.warn(format!("{e} (doing so)")),
        }
    }
    let summary = pack_file(&opened, &out, size, progress)?;
    progress.info(format!(
        "packed {} at {size} x {size} into {} ({}) in {:.1} s",
        count(summary.images, "image"),
        out.display(),
        byte_size(summary.bytes),
        summary.seconds
    ));
    PackedDataset::open(&out)
}

/// Whether there is a packed dataset, of any version, behind `path`. Looks into ordinary files only.
pub fn is_packed_file(path: &Path) -> bool {
    path.is_file() && packed::is_packed(path).unwrap_or(false)
}

/// `<cache>/<name of the source>-<size>.pack`.
fn cache_file(source: &Path, cache: &Path, size: usize) -> PathBuf {
    let full = fs::canonicalize(source).unwrap_or_else(|_| source.into());
    let name = if full.is_dir() { full.file_name() } else { full.file_stem() };
    cache.join(format!("{}-{size}.pack", name.unwrap_or("dataset".as_ref()).to_string_lossy()))
}

fn pack_file(source: &Source, out: &Path, size: usize, progress: &Progress) -> Result<PrepareSummary> {
    files::replace_with(out, |file| pack(source, file, out, size, progress))
}

/// Packs into `file`, which stands for `out` in messages.
fn pack<W: Write + Seek + Send>(
    source: &Source,
    file: W,
    out: &Path,
    size: usize,
    progress: &Progress,
) -> Result<PrepareSummary> {
    let start = Instant::now();
    let pairs = source.pairs();
    let writer = Writer::new(file, size, pairs.iter().map(|p| p.stem.as_str()));
    let bytes = writer.len();
    let full = |e| Error::io(out, &format!("write the packed dataset (it takes {})", byte_size(bytes)), e);
    let writer = Mutex::new(writer);
    let bar = progress.bar("preparing", pairs.len() as u64, "images");
    let foreground = pairs
        .par_iter()
        .enumerate()
        .map_init(
            || vec![0; record_len(size)],
            |record, (i, pair)| {
                if interrupted() {
                    return Err(Error::new(
                        Kind::Interrupted,
                        "interrupted while packing; the same command begins again",
                    ));
                }
                fill_record(source, pair, size, record)?;
                let checksum = crc32fast::hash(record);
                writer.lock().expect("no writer panics").record(i, record, checksum).map_err(full)?;
                bar.inc(1);
                Ok(record[3 * size * size..].iter().map(|&m| u64::from(m)).sum::<u64>())
            },
        )
        .try_reduce(|| 0, |a, b| Ok(a + b))?;
    if foreground == 0 {
        return Err(Error::input(
            source.path(),
            format!("no mask has a pixel above {THRESHOLD}; masks must be 0 (background) and 255 (polyp)"),
        ));
    }
    writer.into_inner().expect("no writer panics").finish(source.stamp()).map_err(full)?;
    Ok(PrepareSummary {
        images: pairs.len(),
        size,
        bytes,
        foreground: foreground as f64 / (pairs.len() * size * size) as f64,
        seconds: start.elapsed().as_secs_f64(),
    })
}

/// Reads one pair into `record`: pixels (size, size, 3), then mask (size, size).
fn fill_record(source: &Source, pair: &Pair, size: usize, record: &mut [u8]) -> Result<()> {
    let image = decode::rgb(&source.read(&pair.image)?).map_err(|e| Error::input(&pair.image.path, e))?;
    let mask = decode::grey(&source.read(&pair.mask)?).map_err(|e| Error::input(&pair.mask.path, e))?;
    if (mask.width, mask.height) != (image.width, image.height) {
        return Err(Error::input(
            &pair.mask.path,
            format!(
                "the mask is {}x{}, its image {}x{}; give both the same size",
                mask.width, mask.height, image.width, image.height
            ),
        ));
    }
    let (pixels, labels) = record.split_at_mut(3 * size * size);
    resize_bilinear_into(&image.data, (image.width, image.height), pixels, (size, size), 3);
    resize_nearest_into(&mask.data, (mask.width, mask.height), labels, (size, size));
    for label in labels {
        *label = u8::from(*label > THRESHOLD);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{self, SeekFrom};

    /// A disk with room for `room` bytes.
    struct Small {
        room: u64,
        at: u64,
    }

    impl Write for Small {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let fits = bytes.len().min(self.room.saturating_sub(self.at) as usize);
            self.at += fits as u64;
            if fits == 0 { Err(io::ErrorKind::StorageFull.into()) } else { Ok(fits) }
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Seek for Small {
        fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
            if let SeekFrom::Start(at) = to {
                self.at = at;
            }
            Ok(self.at)
        }
    }

    fn folder(images: usize) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for part in ["images", "masks"] {
            fs::create_dir(dir.path().join(part)).unwrap();
            for i in 0..images {
                let picture = image::GrayImage::from_pixel(40, 30, image::Luma([255]));
                picture.save(dir.path().join(part).join(format!("{i}.png"))).unwrap();
            }
        }
        dir
    }

    #[test]
    fn full_disk_is_one_line_at_any_moment() {
        let dir = folder(3);
        let source = Source::open(dir.path()).unwrap();
        let whole = 4096 * 4;
        for room in [0, 5000, 9000, whole - 1] {
            let e = pack(&source, Small { room, at: 0 }, Path::new("x.pack"), 32, &Progress::quiet()).unwrap_err();
            assert_eq!(e.kind, Kind::Io, "{e}");
            assert!(e.to_string().starts_with("x.pack: cannot write the packed dataset (it takes 16 kB)"), "{e}");
        }
        pack(&source, Small { room: whole, at: 0 }, Path::new("x.pack"), 32, &Progress::quiet()).unwrap();
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn full_disk_of_the_system() {
        let dir = folder(1);
        let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let source = Source::open(dir.path()).unwrap();
        let e = pack(&source, full, Path::new("x.pack"), 32, &Progress::quiet()).unwrap_err();
        assert!(e.kind == Kind::Io && e.to_string().contains("No space left"), "{e}");
    }
}
