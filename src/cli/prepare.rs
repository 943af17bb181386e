//! `prepare`: packs an archive or folder.

use std::path::PathBuf;

use clap::Args;

use super::{Context, args, output, signals};
use crate::dataset;
use crate::error::Result;
use crate::progress::{byte_size, duration};

/// Pack an archive or folder of images and masks into one file for training
///
/// Reads Kvasir-SEG's archive without unpacking it, or a folder with images/ and masks/. Pairs by stem, resizes as OpenCV
/// does (bilinear images, nearest masks), and takes mask pixels above 127 for polyp. The file is memory-mapped for
/// training and carries checksums.
#[derive(Args)]
#[command(after_help = "\
Examples:
  segpeft-native prepare kvasir-seg.zip --out kvasir-512.pack
  segpeft-native prepare my-polyps/ --out polyps-256.pack --size 256")]
pub struct Prepare {
    /// The archive (.zip), or the folder that holds images/ and masks/
    #[arg(value_name = "SOURCE")]
    source: PathBuf,
    /// The packed file
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Side of the square images, a multiple of 32
    #[arg(long, value_name = "PIXELS", default_value = "512", value_parser = args::size)]
    size: usize,
}

impl Prepare {
    pub fn run(&self, context: &Context) -> Result<()> {
        signals::install(&context.progress)?;
        let summary = dataset::prepare(&self.source, &self.out, self.size, &context.progress)?;
        context.result(&summary, || {
            output::fields(&[
                ("packed", self.out.display().to_string()),
                ("images", format!("{} at {s} x {s}", summary.images, s = summary.size)),
                ("polyp", format!("{:.1} % of the pixels", 100.0 * summary.foreground)),
                ("size", byte_size(summary.bytes)),
                ("time", duration(summary.seconds)),
            ])
        })
    }
}
