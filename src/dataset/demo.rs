//! Drawings for the demo: a polyp-like dataset that needs no download.
//!
//! The target domain looks like colonoscopy: mucosa with folds, vessels and wet highlights, seen through a round or
//! octagonal aperture, and polyps of several shapes, redder than what surrounds them, which no threshold on colour finds
//! well. The source domain is a plainer world (flat reddish shapes on a pale ground), for a starting model that has
//! something to keep and something to adapt to.
//!
//! Every number comes from [`Philox`] and passes only through operations that IEEE 754 rounds exactly (no sine, no
//! exponential), so a picture has the same pixels on every machine.

use std::fs;
use std::path::Path;

use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::{ExtendedColorType, ImageEncoder};
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::files;
use crate::progress::Progress;
use crate::random::{Philox, Purpose, unit};

/// What is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Domain {
    /// Flat reddish shapes on a pale ground: what the starting model is trained on.
    Source = 0,
    /// Polyps on mucosa: what it is adapted to.
    Target = 1,
}

/// Largest side of a drawing, pixels.
pub const MAX_SIZE: usize = 4096;

/// Draws picture `index` of a domain: pixels `(size, size, 3)` RGB and mask `(size, size)`, 0 or 1.
///
/// The content depends on `domain` and `index`; `size` (pixels, at most [`MAX_SIZE`]) only sets the resolution.
pub fn draw(domain: Domain, index: u64, size: usize) -> (Vec<u8>, Vec<u8>) {
    assert!((1..=MAX_SIZE).contains(&size), "a drawing has 1 to {MAX_SIZE} pixels a side, not {size}");
    let mut draws = Draws { stream: Philox::new(index, Purpose::Demo, domain as u32, 0), next: 0 };
    let noise = Noise::new(&Philox::new(index, Purpose::Demo, domain as u32, 1));
    let (mut colour, mask) = match domain {
        Domain::Source => source(&mut draws, &noise, size),
        Domain::Target => target(&mut draws, &noise, size),
    };
    let grain = Philox::new(index, Purpose::Demo, domain as u32, 2);
    let strength = draws.range(0.006, 0.02);
    let mut pixels = Vec::with_capacity(colour.len() * 3);
    for (block, four) in colour.chunks_mut(4).enumerate() {
        for (rgb, word) in four.iter_mut().zip(grain.block(block as u64)) {
            for (c, value) in rgb.iter().enumerate() {
                let shot = ((word >> (8 * c)) & 255) as f32 * (2.0 / 255.0) - 1.0;
                pixels.push(((value + shot * strength).clamp(0.0, 1.0) * 255.0 + 0.5) as u8);
            }
        }
    }
    (pixels, mask)
}

/// Writes drawings `0..count` of a domain as `images/<stem>.png` (RGB) and `masks/<stem>.png` (grey, 0 or 255) under
/// `dir`, on all cores. A folder that already holds this very set is left as it is; one that holds another drawn set
/// is replaced as a whole.
///
/// # Errors
/// `Usage` for no pictures or an absurd size, `Input` if `dir` holds something else, `Io` if it cannot be written.
pub fn write_folder(dir: &Path, domain: Domain, count: usize, size: usize, progress: &Progress) -> Result<()> {
    if count == 0 || !(1..=MAX_SIZE).contains(&size) {
        return Err(Error::usage(format!(
            "cannot draw {count} pictures of {size} x {size} pixels; ask for at least one, of 1 to {MAX_SIZE} pixels a side"
        )));
    }
    let what =
        format!("segpeft-native demo, drawing {DRAWING}: {domain:?}, {count} pictures, {size} x {size} pixels\n");
    match fs::read_to_string(dir.join(MARK)) {
        Ok(found) if found == what => return Ok(()),
        Ok(_) => {}
        // Removes an empty folder only.
        Err(_) if !dir.exists() || fs::remove_dir(dir).is_ok() => {}
        Err(_) => {
            return Err(Error::input(
                dir,
                "holds something other than the demo's drawings; remove it or choose another folder",
            ));
        }
    }
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let drawing = dir.with_file_name(format!(".{name}.drawing"));
    files::remove_folder(&drawing)?;
    for folder in ["images", "masks"] {
        files::create_folder(&drawing.join(folder))?;
    }
    let bar = progress.bar("drawing", count as u64, "images");
    let stem = match domain {
        Domain::Source => "source",
        Domain::Target => "polyp",
    };
    (0..count).into_par_iter().try_for_each(|i| {
        let (pixels, mask) = draw(domain, i as u64, size);
        let mask: Vec<u8> = mask.iter().map(|m| m * 255).collect();
        let name = format!("{stem}_{i:05}.png");
        write_png(&drawing.join("images").join(&name), &pixels, size, ExtendedColorType::Rgb8)?;
        write_png(&drawing.join("masks").join(&name), &mask, size, ExtendedColorType::L8)?;
        bar.inc(1);
        Ok(())
    })?;
    let mark = drawing.join(MARK);
    fs::write(&mark, what).map_err(|e| Error::io(&mark, "write this file", e))?;
    files::remove_folder(dir)?;
    fs::rename(&drawing, dir).map_err(|e| Error::io(dir, "put the finished drawings here", e))
}

/// Says in a drawn folder what it holds.
const MARK: &str = "drawn.txt";

/// Counts the changes of what [`draw`] draws, so that folders of an earlier drawing are drawn anew.
const DRAWING: u32 = 2;

fn write_png(path: &Path, bytes: &[u8], size: usize, kind: ExtendedColorType) -> Result<()> {
    let mut file = Vec::new();
    PngEncoder::new_with_quality(&mut file, CompressionType::Fast, FilterType::Adaptive)
        .write_image(bytes, size as u32, size as u32, kind)
        .map_err(|e| Error::io(path, "encode this picture", std::io::Error::other(e)))?;
    fs::write(path, file).map_err(|e| Error::io(path, "write this picture", e))
}

type Rgb = [f32; 3];
type Point = (f32, f32);

/// Uniform numbers, one after the other.
struct Draws {
    stream: Philox,
    next: u64,
}

impl Draws {
    fn unit(&mut self) -> f32 {
        self.next += 1;
        self.stream.uniform(self.next - 1)
    }

    fn range(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * self.unit()
    }

    fn chance(&mut self, probability: f32) -> bool {
        self.unit() < probability
    }

    fn below(&mut self, n: usize) -> usize {
        ((self.unit() * n as f32) as usize).min(n - 1)
    }

    /// A direction, uniform on the circle: a point of the disc, scaled to length one.
    fn direction(&mut self) -> Point {
        loop {
            let (x, y) = (self.range(-1.0, 1.0), self.range(-1.0, 1.0));
            let square = x * x + y * y;
            if (0.01..=1.0).contains(&square) {
                let length = square.sqrt();
                return (x / length, y / length);
            }
        }
    }

    fn colour(&mut self, low: Rgb, high: Rgb) -> Rgb {
        let t = self.unit();
        [0, 1, 2].map(|c| mix(low[c], high[c], t) * self.range(0.96, 1.04))
    }
}

/// Smooth value noise on a periodic lattice.
struct Noise {
    lattice: Box<[f32; Noise::SIDE * Noise::SIDE]>,
}

impl Noise {
    /// A power of two: positions wrap by a mask.
    const SIDE: usize = 64;

    fn new(stream: &Philox) -> Self {
        let mut lattice = Box::new([0.0; Self::SIDE * Self::SIDE]);
        for (block, four) in lattice.chunks_exact_mut(4).enumerate() {
            for (value, word) in four.iter_mut().zip(stream.block(block as u64)) {
                *value = 2.0 * unit(word) - 1.0;
            }
        }
        Self { lattice }
    }

    /// Noise of wavelength 1 in [-1, 1].
    #[inline(always)]
    fn at(&self, x: f32, y: f32) -> f32 {
        let (ix, iy) = (floor(x), floor(y));
        let (fx, fy) = (x - ix as f32, y - iy as f32);
        let (sx, sy) = (fx * fx * (3.0 - 2.0 * fx), fy * fy * (3.0 - 2.0 * fy));
        let wrap = |i: i32| i as usize & (Self::SIDE - 1);
        let (x0, x1) = (wrap(ix), wrap(ix + 1));
        let (y0, y1) = (wrap(iy) * Self::SIDE, wrap(iy + 1) * Self::SIDE);
        let top = mix(self.lattice[y0 + x0], self.lattice[y0 + x1], sx);
        let bottom = mix(self.lattice[y1 + x0], self.lattice[y1 + x1], sx);
        mix(top, bottom, sy)
    }

    /// `octaves` of noise, each of half the wavelength and amplitude of the one before, about [-1, 1].
    #[inline(always)]
    fn octaves(&self, x: f32, y: f32, octaves: u32) -> f32 {
        let (mut sum, mut scale, mut amplitude) = (0.0, 1.0, 0.6);
        for k in 0..octaves {
            let shift = 13.7 * k as f32;
            sum += amplitude * self.at(x * scale + shift, y * scale - shift);
            scale *= 2.0;
            amplitude *= 0.5;
        }
        sum
    }
}

#[inline(always)]
fn floor(x: f32) -> i32 {
    let i = x as i32;
    i - i32::from((i as f32) > x)
}

#[inline(always)]
fn mix(a: f32, b: f32, t: f32) -> f32 {
    a + (b - a) * t
}

/// 0 below `low`, 1 above `high`, smooth between.
#[inline(always)]
fn step(low: f32, high: f32, x: f32) -> f32 {
    let t = ((x - low) / (high - low)).clamp(0.0, 1.0);
    t * t * (3.0 - 2.0 * t)
}

/// The larger of two, rounded off where they are within `k`.
#[inline(always)]
fn smooth_max(a: f32, b: f32, k: f32) -> f32 {
    let h = ((k - (a - b).abs()) / k).max(0.0);
    a.max(b) + h * h * k * 0.25
}

#[inline(always)]
fn length(x: f32, y: f32) -> f32 {
    (x * x + y * y).sqrt()
}

/// Centre of pixel `i` of `size` in picture coordinates, 0..1.
#[inline(always)]
fn centre(i: usize, size: usize) -> f32 {
    (i as f32 + 0.5) / size as f32
}

/// An ellipse. Lengths are in picture widths.
struct Lobe {
    x: f32,
    y: f32,
    along: f32,
    across: f32,
    direction: Point,
}

impl Lobe {
    /// 1 in the centre, 0 on the outline, falling on outside.
    #[inline(always)]
    fn at(&self, x: f32, y: f32, swell: f32) -> f32 {
        let (dx, dy) = (x - self.x, y - self.y);
        let (c, s) = self.direction;
        1.0 - length((dx * c + dy * s) / self.along, (dy * c - dx * s) / self.across) * (1.0 + swell)
    }
}

/// A polyp: ellipses grown together, perhaps on a stalk.
struct Polyp {
    lobes: Vec<Lobe>,
    /// Foot, middle and half width of a bent stalk whose head is the first lobe.
    stalk: Option<(Point, Point, f32)>,
    /// Height over the mucosa, picture widths.
    height: f32,
    /// 1 for a dome, 0 for a plateau.
    dome: f32,
    wobble: f32,
    wobble_scale: f32,
    tint: Rgb,
    pits: f32,
    pit_scale: f32,
    shadow: f32,
}

impl Polyp {
    fn draw(draws: &mut Draws, x: f32, y: f32, radius: f32) -> Self {
        let direction = draws.direction();
        let lobe = |draws: &mut Draws, x: f32, y: f32, radius: f32, slim: f32| Lobe {
            x,
            y,
            along: radius,
            across: radius * draws.range(slim, 1.0),
            direction: draws.direction(),
        };
        let mut polyp = Polyp {
            lobes: Vec::new(),
            stalk: None,
            height: radius * draws.range(0.45, 0.95),
            dome: draws.range(0.6, 1.0),
            wobble: draws.range(0.05, 0.14),
            wobble_scale: draws.range(0.8, 1.8) / radius,
            // Redder than its surroundings: less green, less blue.
            tint: [draws.range(-0.05, 0.05), draws.range(-0.5, -0.3), draws.range(-0.5, -0.25)],
            pits: draws.range(0.02, 0.12),
            pit_scale: draws.range(26.0, 44.0),
            shadow: draws.range(0.15, 0.5),
        };
        match draws.below(8) {
            // Sessile.
            0..3 => polyp.lobes.push(lobe(draws, x, y, radius, 0.6)),
            // Pedunculated.
            3 | 4 => {
                let head = radius * draws.range(0.6, 0.85);
                polyp.lobes.push(lobe(draws, x, y, head, 0.75));
                let reach = head * draws.range(1.4, 2.1);
                let bend = head * draws.range(-0.45, 0.45);
                let (c, s) = direction;
                let foot = (x + c * reach, y + s * reach);
                let middle = (x + c * reach * 0.5 - s * bend, y + s * reach * 0.5 + c * bend);
                polyp.stalk = Some((foot, middle, head * draws.range(0.38, 0.6)));
                polyp.height = head * draws.range(0.8, 1.2);
                polyp.shadow = draws.range(0.35, 0.65);
            }
            // Flat.
            5 => {
                polyp.lobes.push(lobe(draws, x, y, radius * 1.15, 0.5));
                polyp.height *= 0.3;
                polyp.dome = draws.range(0.0, 0.3);
                polyp.wobble *= 1.8;
                polyp.pits *= 1.6;
                polyp.shadow *= 0.4;
            }
            // Lobulated.
            _ => {
                polyp.lobes.push(lobe(draws, x, y, radius * 0.75, 0.7));
                for _ in 0..2 + draws.below(4) {
                    let (c, s) = draws.direction();
                    let reach = radius * draws.range(0.35, 0.75);
                    let part = radius * draws.range(0.35, 0.6);
                    polyp.lobes.push(lobe(draws, x + c * reach, y + s * reach, part, 0.7));
                }
                polyp.wobble *= 1.3;
            }
        }
        polyp
    }

    /// Positive inside, at most 1; the outline is at 0.
    #[inline(always)]
    fn inside(&self, noise: &Noise, x: f32, y: f32) -> f32 {
        let swell = self.wobble * noise.octaves(x * self.wobble_scale + 5.0, y * self.wobble_scale + 9.0, 2);
        let mut inside = self.lobes[0].at(x, y, swell);
        for lobe in &self.lobes[1..] {
            inside = smooth_max(inside, lobe.at(x, y, swell), 0.35);
        }
        if let Some((foot, middle, width)) = self.stalk {
            let head = (self.lobes[0].x, self.lobes[0].y);
            // A parabola through the three points, in four straight pieces.
            let quarter = |a: f32, b: f32, c: f32| (0.375 * a + 0.75 * b - 0.125 * c, 0.375 * c + 0.75 * b - 0.125 * a);
            let ((x1, x3), (y1, y3)) = (quarter(foot.0, middle.0, head.0), quarter(foot.1, middle.1, head.1));
            let distance = segment(x, y, foot, (x1, y1))
                .min(segment(x, y, (x1, y1), middle))
                .min(segment(x, y, middle, (x3, y3)))
                .min(segment(x, y, (x3, y3), head));
            inside = smooth_max(inside, (1.0 - distance * (1.0 + swell) / width) * 0.6, 0.3);
        }
        inside.min(1.0)
    }

    /// Picture widths from the centre beyond which [`Polyp::inside`] and the shadow do not reach.
    fn reach(&self) -> f32 {
        let (x, y) = (self.lobes[0].x, self.lobes[0].y);
        let lobes = self.lobes.iter().map(|l| length(l.x - x, l.y - y) + l.along);
        let stalk = self.stalk.iter().map(|(foot, middle, width)| {
            length(foot.0 - x, foot.1 - y).max(length(middle.0 - x, middle.1 - y)) + width
        });
        lobes.chain(stalk).fold(0.0, f32::max) * 1.7
    }
}

/// Distance of a point from a segment.
#[inline(always)]
fn segment(x: f32, y: f32, a: Point, b: Point) -> f32 {
    let (dx, dy) = (b.0 - a.0, b.1 - a.1);
    let t = (((x - a.0) * dx + (y - a.1) * dy) / (dx * dx + dy * dy + 1e-12)).clamp(0.0, 1.0);
    length(x - a.0 - t * dx, y - a.1 - t * dy)
}

/// How far outside its outline a polyp begins to rise, in its own radius.
const FOOT: f32 = 0.22;

/// What the endoscope lets through: a disc, a rounded square or an octagon, slightly off centre.
struct Aperture {
    x: f32,
    y: f32,
    half: f32,
    round: f32,
    cut: f32,
}

impl Aperture {
    fn draw(draws: &mut Draws) -> Self {
        let (round, cut) = match draws.below(4) {
            0 => (1.0, 2.0),
            1 | 2 => (0.0, draws.range(1.45, 1.75)),
            _ => (draws.range(0.25, 0.6), draws.range(1.5, 1.8)),
        };
        let half = if round == 1.0 { draws.range(0.47, 0.56) } else { draws.range(0.455, 0.5) };
        Self { x: draws.range(0.485, 0.515), y: draws.range(0.485, 0.515), half, round, cut }
    }

    /// Picture widths to the rim, positive inside.
    #[inline(always)]
    fn inside(&self, x: f32, y: f32) -> f32 {
        let (dx, dy) = ((x - self.x).abs(), (y - self.y).abs());
        let square = dx.max(dy).max((dx + dy) / self.cut);
        self.half - mix(square, length(dx, dy), self.round)
    }
}

/// Mucosa with polyps.
fn target(draws: &mut Draws, noise: &Noise, size: usize) -> (Vec<Rgb>, Vec<u8>) {
    let aperture = Aperture::draw(draws);
    let (light_x, light_y) = (draws.range(0.2, 0.8), draws.range(0.2, 0.8));
    let light_height = draws.range(0.4, 0.75);
    let exposure = draws.range(0.9, 1.25);

    // The gut runs away towards the lumen; folds are rings around it.
    let (lumen_c, lumen_s) = draws.direction();
    let lumen_distance = draws.range(0.12, 0.75);
    let lumen = (0.5 + lumen_c * lumen_distance, 0.5 + lumen_s * lumen_distance);
    let lumen_radius = draws.range(0.05, 0.32);
    let fold_count = draws.range(1.8, 4.2);
    let fold_height = if draws.chance(0.3) { draws.range(0.0, 0.01) } else { draws.range(0.03, 0.1) };
    let fold_phase = draws.unit();
    let fold_crest = draws.range(0.4, 0.68);
    let relief = draws.range(0.008, 0.022);

    let albedo = match draws.below(3) {
        0 => draws.colour([0.80, 0.40, 0.30], [0.88, 0.52, 0.36]),
        1 => draws.colour([0.74, 0.34, 0.31], [0.84, 0.44, 0.40]),
        _ => draws.colour([0.84, 0.54, 0.45], [0.90, 0.62, 0.54]),
    };
    let blotches = draws.range(0.08, 0.22);
    let vessels = draws.range(0.0, 0.45);
    let vessel_scale = draws.range(3.0, 6.0);
    let wetness = draws.range(0.4, 1.0);

    let mut polyps = Vec::new();
    for _ in 0..[1, 1, 1, 1, 1, 2, 2, 3][draws.below(8)] {
        let radius = 0.11 + 0.25 * draws.unit() * draws.unit().sqrt();
        let (x, y) = (draws.range(0.24, 0.76), draws.range(0.24, 0.76));
        let polyp = Polyp::draw(draws, x, y, radius);
        let apart =
            |other: &Polyp| length(other.lobes[0].x - x, other.lobes[0].y - y) > 0.7 * (other.reach() + polyp.reach());
        if polyps.iter().all(apart) {
            polyps.push(polyp);
        }
    }
    // Bubbles and remains of food, so that not every blob is a polyp.
    let debris: Vec<(Lobe, bool)> = (0..[0, 0, 0, 1, 2, 4][draws.below(6)])
        .map(|_| {
            let radius = draws.range(0.01, 0.04);
            let lobe = Lobe {
                x: draws.range(0.1, 0.9),
                y: draws.range(0.1, 0.9),
                along: radius,
                across: radius * draws.range(0.5, 1.0),
                direction: draws.direction(),
            };
            (lobe, draws.chance(0.6))
        })
        .collect();
    // The scope guide that many recordings show in a corner.
    let inset = draws.chance(0.18).then(|| (draws.range(0.22, 0.32), draws.range(0.26, 0.36)));

    // Heights first: light and highlights follow from their slopes.
    let mut height = vec![0.0f32; size * size];
    let mut depth = vec![0.0f32; size * size];
    for row in 0..size {
        let y = centre(row, size);
        for column in 0..size {
            let x = centre(column, size);
            if aperture.inside(x, y) < -0.04 {
                continue;
            }
            let (wx, wy) = (noise.at(x * 2.6 + 3.1, y * 2.6), noise.at(x * 2.6, y * 2.6 + 7.7));
            let away = length(x + 0.14 * wx - lumen.0, y + 0.14 * wy - lumen.1);
            let phase = away * fold_count + fold_phase;
            let t = phase - floor(phase) as f32;
            // A fold rises slowly towards the viewer and drops steeply behind.
            let crest = fold_crest;
            let ridge = step(0.0, crest, t) * (1.0 - step(crest, 1.0, t));
            let partial = step(-0.5, 0.4, noise.at(x * 1.9 + 20.0, y * 1.9 + floor(phase) as f32 * 4.3));
            let i = row * size + column;
            depth[i] = away;
            height[i] = fold_height * ridge * partial + relief * noise.octaves(x * 5.0, y * 5.0, 4);
        }
    }

    // Polyps add their own height; remember which one covers a pixel and how deep inside it lies.
    let mut cover = vec![(-1.0f32, 0u8); size * size];
    for (which, polyp) in polyps.iter().enumerate() {
        let reach = polyp.reach();
        let range = |c: f32| {
            let low = ((c - reach) * size as f32).max(0.0) as usize;
            low..(((c + reach) * size as f32).max(0.0) as usize).min(size)
        };
        for row in range(polyp.lobes[0].y) {
            for column in range(polyp.lobes[0].x) {
                let (x, y) = (centre(column, size), centre(row, size));
                let inside = polyp.inside(noise, x, y);
                let i = row * size + column;
                if inside > cover[i].0 {
                    cover[i] = (inside, which as u8);
                }
                if inside > -FOOT {
                    // The body rises out of the mucosa in a rounded foot, without a crease.
                    let t = (inside + FOOT) / (1.0 + FOOT);
                    let bowl = 1.0 - (1.0 - t) * (1.0 - t);
                    let profile = mix(step(0.0, 0.45, t), bowl, polyp.dome) * step(0.0, 0.3, t);
                    let body = step(0.0, 0.2, inside);
                    let lumps = polyp.pits * (0.12 * noise.at(x * polyp.pit_scale * 0.4, y * polyp.pit_scale * 0.4));
                    height[i] = height[i] * (1.0 - 0.5 * body) + polyp.height * profile + body * lumps;
                }
            }
        }
    }

    let mut colour = Vec::with_capacity(size * size);
    let mut mask = vec![0u8; size * size];
    let slope = size as f32 * 0.5;
    for row in 0..size {
        let y = centre(row, size);
        for column in 0..size {
            let x = centre(column, size);
            let i = row * size + column;
            let rim = aperture.inside(x, y);
            if rim < -0.02 {
                colour.push([0.02, 0.02, 0.025]);
                continue;
            }
            let (inside, which) = cover[i];
            let polyp = &polyps[which as usize];
            let on = step(-0.04, 0.05, inside);

            let blotch = blotches * noise.octaves(x * 4.0 + 40.0, y * 4.0, 3);
            let patch = step(-0.2, 0.5, noise.at(x * 1.7 + 50.0, y * 1.7 + 50.0));
            let mut vessel = 0.0;
            if patch > 0.0 {
                let (u, v) = (x * vessel_scale, y * vessel_scale);
                let (u, v) = (u + 0.8 * noise.at(v * 0.9 + 11.0, u * 0.9), v + 0.8 * noise.at(u * 0.9, v * 0.9 + 2.0));
                let broad = 1.0 - step(0.0, 0.07, noise.at(u, v + 30.0).abs());
                let fine = 1.0 - step(0.0, 0.08, noise.at(u * 2.3 + 17.0, v * 2.3).abs());
                vessel = vessels * patch * broad.max(0.6 * fine) * (1.0 - 0.75 * on);
            }
            let pits =
                if on > 0.0 { on * polyp.pits * noise.at(x * polyp.pit_scale, y * polyp.pit_scale) } else { 0.0 };
            let mut surface = [
                albedo[0] * (1.0 + 0.35 * blotch - 0.25 * vessel + 0.5 * pits),
                albedo[1] * (1.0 + blotch - vessel + pits),
                albedo[2] * (1.0 + 0.9 * blotch - 0.8 * vessel + pits),
            ];
            for (s, tint) in surface.iter_mut().zip(polyp.tint) {
                *s *= 1.0 + tint * on;
            }

            let (left, right) = (height[i - usize::from(column > 0)], height[i + usize::from(column + 1 < size)]);
            let up = height[if row > 0 { i - size } else { i }];
            let down = height[if row + 1 < size { i + size } else { i }];
            let (nx, ny) = ((left - right) * slope, (up - down) * slope);
            let (lx, ly) = (light_x - x, light_y - y);
            let lamp = (lx * lx + ly * ly + light_height * light_height).sqrt();
            let normal = (nx * nx + ny * ny + 1.0).sqrt();
            let facing = (nx * lx + ny * ly + light_height) / (lamp * normal);
            let fall = light_height / lamp;
            // Tissue scatters: light wraps around edges, and what is in the shade is redder.
            let wrapped = ((facing + 0.3) / 1.3).max(0.0);
            let mut brightness = exposure * (0.2 + 0.9 * wrapped) * (0.35 + 0.65 * fall * fall);
            brightness *= 0.12 + 0.88 * step(lumen_radius * 0.25, lumen_radius * 1.6, depth[i]).max(on);
            // The polyp keeps light from the mucosa behind it.
            if inside < 0.0 && inside > -0.6 {
                let (px, py) = (x - polyp.lobes[0].x, y - polyp.lobes[0].y);
                let behind = 0.5 - 0.5 * (px * lx + py * ly) / (length(px, py) * length(lx, ly) + 1e-6);
                let near = 1.0 + inside / 0.6;
                brightness *= 1.0 - polyp.shadow * near * near * near * (0.15 + 0.85 * behind * behind);
            }

            // Wet highlights: the same light on a rougher film of mucus.
            let (fx, fy) = (noise.at(x * 19.0 + 7.0, y * 19.0), noise.at(x * 19.0, y * 19.0 + 23.0));
            let (gx, gy) = (nx + 0.28 * fx, ny + 0.28 * fy);
            let mirror = (gx * lx + gy * ly + light_height) / (lamp * (gx * gx + gy * gy + 1.0).sqrt());
            let m2 = mirror.max(0.0) * mirror.max(0.0);
            let m8 = m2 * m2 * m2 * m2;
            let m64 = m8 * m8 * m8 * m8 * m8 * m8 * m8 * m8;
            let mut gleam = 0.10 * m8 * m8;
            if m8 > 0.2 {
                let gate = step(0.25, 0.6, noise.at(x * 8.0 + 60.0, y * 8.0 + 31.0) + 0.25 * on);
                let drops = step(0.55, 0.75, noise.at(x * 34.0 + 3.0, y * 34.0 + 41.0)) * step(0.2, 0.7, m8);
                gleam += gate * (step(0.80, 0.98, m64) + 0.7 * drops).min(1.0);
            }
            gleam *= wetness * fall;

            let shade = 0.72 + 0.28 * brightness.min(1.3);
            let mut rgb =
                [surface[0] * brightness, surface[1] * brightness * shade, surface[2] * brightness * shade * shade];
            for (lobe, bubble) in &debris {
                let d = lobe.at(x, y, 0.3 * fx);
                if d > 0.0 {
                    let body = step(0.0, 0.25, d);
                    let kind = if *bubble { [0.86, 0.72, 0.58] } else { [0.62, 0.50, 0.16] };
                    let ring = if *bubble { 0.25 * (1.0 - step(0.0, 0.5, d)) + 0.1 } else { 0.8 };
                    for c in 0..3 {
                        rgb[c] = mix(rgb[c], kind[c] * brightness, body * ring);
                    }
                }
            }
            let vignette = 0.55 + 0.45 * step(-0.01, 0.24, rim);
            let open = step(-0.008, 0.008, rim);
            let red_glow = 0.03 * brightness;
            let warm = [red_glow, 0.0, 0.0];
            let mut rgb =
                [0, 1, 2].map(|c| mix(0.02, (rgb[c] + warm[c] + gleam * [1.0, 0.97, 0.92][c]) * vignette, open));
            let mut visible = rim > 0.0;
            if let Some((w, h)) = inset
                && x < w
                && y > 1.0 - h
            {
                let edge = (w - x).min(y - (1.0 - h)).min(x).min(1.0 - y) < 0.012;
                rgb = if edge { [0.16, 0.30, 0.26] } else { [0.03, 0.10, 0.09] };
                visible = false;
            }
            mask[i] = u8::from(visible && inside > 0.0);
            colour.push(rgb);
        }
    }
    (colour, mask)
}

/// Flat reddish shapes, which the mask marks, and thin strokes, which it does not; half of them seen through an aperture.
fn source(draws: &mut Draws, noise: &Noise, size: usize) -> (Vec<Rgb>, Vec<u8>) {
    let ground = draws.colour([0.50, 0.36, 0.32], [0.86, 0.74, 0.68]);
    let aperture = draws.chance(0.5).then(|| Aperture::draw(draws));
    let (slant_x, slant_y) = draws.direction();
    let grain = draws.range(0.04, 0.14);
    let grain_scale = draws.range(3.0, 9.0);
    let strokes: Vec<(Point, Point, f32, f32)> = (0..draws.below(4))
        .map(|_| {
            let a = (draws.unit(), draws.unit());
            let b = (draws.unit(), draws.unit());
            (a, b, draws.range(0.004, 0.014), draws.range(-0.2, 0.2))
        })
        .collect();
    let shapes: Vec<(Lobe, usize, Rgb)> = (0..1 + draws.below(3))
        .map(|_| {
            let radius = draws.range(0.07, 0.24);
            let lobe = Lobe {
                x: draws.range(0.15, 0.85),
                y: draws.range(0.15, 0.85),
                along: radius,
                across: radius * draws.range(0.5, 1.0),
                direction: draws.direction(),
            };
            let red = draws.range(0.3, 0.65);
            let fill = [
                ground[0] * draws.range(0.85, 1.1),
                ground[1] * (1.0 - red),
                ground[2] * (1.0 - red * draws.range(0.8, 1.1)),
            ];
            (lobe, draws.below(3), fill)
        })
        .collect();
    let mut colour = Vec::with_capacity(size * size);
    let mut mask = vec![0u8; size * size];
    for row in 0..size {
        let y = centre(row, size);
        for column in 0..size {
            let x = centre(column, size);
            let tone = 1.0
                + grain * noise.octaves(x * grain_scale, y * grain_scale, 3)
                + 0.18 * ((x - 0.5) * slant_x + (y - 0.5) * slant_y);
            let mut rgb = ground.map(|c| c * tone);
            for &(a, b, width, shade) in &strokes {
                let on = 1.0 - step(width, width + 0.006, segment(x, y, a, b));
                rgb = rgb.map(|c| c * (1.0 + shade * on));
            }
            for (lobe, kind, fill) in &shapes {
                let (dx, dy) = (x - lobe.x, y - lobe.y);
                let (c, s) = lobe.direction;
                let (u, v) = ((dx * c + dy * s) / lobe.along, (dy * c - dx * s) / lobe.across);
                let inside = 1.0
                    - match kind {
                        0 => length(u, v),
                        1 => u.abs().max(v.abs()) * 1.15,
                        _ => (v + 0.5).abs().max(u.abs() * 0.87 + (v + 0.1) * 0.5),
                    };
                let on = step(-0.03, 0.03, inside);
                let fine = 1.0 + 0.5 * grain * noise.at(x * 21.0, y * 21.0);
                for c in 0..3 {
                    rgb[c] = mix(rgb[c], fill[c] * fine, on);
                }
                if inside > 0.0 {
                    mask[row * size + column] = 1;
                }
            }
            if let Some(aperture) = &aperture {
                let rim = aperture.inside(x, y);
                let open = step(-0.008, 0.008, rim) * (0.55 + 0.45 * step(-0.01, 0.24, rim));
                rgb = rgb.map(|c| mix(0.02, c, open));
                mask[row * size + column] &= u8::from(rim > 0.0);
            }
            colour.push(rgb);
        }
    }
    (colour, mask)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The pixels are part of the demo's meaning: they are equal on every machine.
    #[test]
    fn drawings_are_fixed() {
        let sums =
            [(Domain::Target, 0, 96), (Domain::Target, 7, 65), (Domain::Source, 3, 64)].map(|(domain, i, size)| {
                let (pixels, mask) = draw(domain, i, size);
                assert_eq!((pixels.len(), mask.len()), (size * size * 3, size * size));
                let mut sum = crc32fast::Hasher::new();
                sum.update(&pixels);
                sum.update(&mask);
                sum.finalize()
            });
        assert_eq!(sums, [44_308_392u32, 1_112_462_517, 843_960_306]);
    }

    #[test]
    fn every_picture_has_something_to_find() {
        for domain in [Domain::Source, Domain::Target] {
            let covers: Vec<f64> = (0..200)
                .map(|i| {
                    let (_, mask) = draw(domain, i, 48);
                    assert!(mask.iter().all(|&m| m <= 1));
                    mask.iter().map(|&m| f64::from(m)).sum::<f64>() / mask.len() as f64
                })
                .collect();
            assert!(covers.iter().all(|&c| c > 0.003 && c < 0.6), "{domain:?}: {covers:?}");
            let mean = covers.iter().sum::<f64>() / covers.len() as f64;
            assert!((0.04..0.25).contains(&mean), "{domain:?}: mean cover {mean}");
        }
    }

    /// The best threshold on any one colour channel or ratio, chosen with the truth in hand, stays behind what training
    /// reaches (Dice of the polyp class 0.88 in the demo's full fine-tuning).
    #[test]
    fn polyps_are_not_a_matter_of_colour_alone() {
        let size = 48;
        let features: [fn(&[u8]) -> f32; 4] = [
            |p| f32::from(p[0]),
            |p| f32::from(p[1]),
            |p| f32::from(p[2]),
            |p| 100.0 * f32::from(p[1]) / f32::from(p[0]).max(1.0),
        ];
        for feature in features {
            let mut counts = [[0u64; 2]; 256];
            for i in 0..150 {
                let (pixels, mask) = draw(Domain::Target, i, size);
                for (pixel, &m) in pixels.chunks_exact(3).zip(&mask) {
                    counts[(feature(pixel) as usize).min(255)][m as usize] += 1;
                }
            }
            let positives: u64 = counts.iter().map(|c| c[1]).sum();
            let dice = |bins: &mut dyn Iterator<Item = &[u64; 2]>| {
                let (found, wrong) = bins.fold((0, 0), |(t, f), c| (t + c[1], f + c[0]));
                2.0 * found as f64 / (found + wrong + positives) as f64
            };
            for at in 0..256 {
                let (below, above) = (dice(&mut counts[..at].iter()), dice(&mut counts[at..].iter()));
                eprintln!("{at} {below} {above}");
                assert!(below < 0.95 && above < 0.95, "a threshold at {at} reaches Dice {below} or {above}");
            }
        }
    }

    #[test]
    fn folders_are_drawn_once_and_anew_when_they_differ() {
        let parent = tempfile::tempdir().unwrap();
        let dir = &parent.path().join("drawn");
        let progress = Progress::quiet();
        write_folder(dir, Domain::Target, 3, 32, &progress).unwrap();
        let image = dir.join("images/polyp_00002.png");
        let mask = image::open(dir.join("masks/polyp_00002.png")).unwrap().into_luma8();
        let (pixels, truth) = draw(Domain::Target, 2, 32);
        assert_eq!(image::open(&image).unwrap().into_rgb8().into_raw(), pixels);
        assert!(mask.iter().zip(&truth).all(|(&m, &t)| m == t * 255));
        let written = fs::metadata(&image).unwrap().modified().unwrap();
        write_folder(dir, Domain::Target, 3, 32, &progress).unwrap();
        assert_eq!(fs::metadata(&image).unwrap().modified().unwrap(), written);
        write_folder(dir, Domain::Target, 2, 40, &progress).unwrap();
        assert!(!image.exists());
        assert_eq!(fs::read_dir(dir.join("images")).unwrap().count(), 2);
        let first = image::open(dir.join("images/polyp_00000.png")).unwrap();
        assert_eq!((first.width(), first.height()), (40, 40));
        assert!(write_folder(dir, Domain::Target, 0, 32, &progress).is_err());
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 1, "nothing is left beside the folder");
    }

    #[test]
    fn a_folder_of_something_else_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("images")).unwrap();
        fs::write(dir.path().join("images/mine.png"), "mine").unwrap();
        let error = write_folder(dir.path(), Domain::Source, 1, 32, &Progress::quiet()).unwrap_err();
        assert_eq!(error.kind, crate::error::Kind::Input);
        assert!(dir.path().join("images/mine.png").exists());
    }
}
