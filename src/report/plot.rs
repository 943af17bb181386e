//! Line and scatter plots as PNG: drawn at twice the size and averaged down, with a legend above the data and notes
//! placed beside their points so that nothing covers anything.

use std::path::Path;
use std::sync::Once;

use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::{ExtendedColorType, ImageEncoder};
use plotters::drawing::DrawingAreaErrorKind;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontTransform, register_font};

use crate::error::{Error, Kind, Result};
use crate::files;

pub(super) const BLUE: RGBColor = RGBColor(31, 99, 181);
pub(super) const ORANGE: RGBColor = RGBColor(214, 94, 0);
pub(super) const RED: RGBColor = RGBColor(190, 30, 45);
pub(super) const GREEN: RGBColor = RGBColor(0, 134, 96);
const INK: RGBColor = RGBColor(34, 34, 34);
const GRID: RGBColor = RGBColor(222, 222, 222);

/// Drawn pixels per final pixel and dimension.
const OVERSAMPLING: u32 = 2;

type Canvas<'a> = DrawingArea<BitMapBackend<'a>, plotters::coord::Shift>;
type DrawError = DrawingAreaErrorKind<<BitMapBackend<'static> as DrawingBackend>::ErrorType>;
type Drawn = std::result::Result<(), DrawError>;

/// The outline of a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Marker {
    Circle,
    Square,
    Triangle,
    Diamond,
    Wedge,
    Cross,
}

/// Points of one kind: a line through them, a marker at each, or both.
#[derive(Clone)]
pub(super) struct Series {
    label: String,
    colour: RGBColor,
    line: Option<Stroke>,
    marker: Option<Marker>,
    points: Vec<(f64, f64)>,
    /// A note per point, or none at all.
    notes: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stroke {
    Solid,
    Dashed,
}

impl Series {
    /// A line with small round points.
    pub(super) fn line(label: impl Into<String>, colour: RGBColor, points: Vec<(f64, f64)>) -> Self {
        Self {
            label: label.into(),
            colour,
            line: Some(Stroke::Solid),
            marker: Some(Marker::Circle),
            points,
            notes: Vec::new(),
        }
    }

    /// Points without a line, each with a note beside it.
    pub(super) fn scatter(
        label: impl Into<String>,
        colour: RGBColor,
        marker: Marker,
        points: Vec<(f64, f64)>,
        notes: Vec<String>,
    ) -> Self {
        Self { label: label.into(), colour, line: None, marker: Some(marker), points, notes }
    }

    pub(super) fn dashed(mut self) -> Self {
        self.line = Some(Stroke::Dashed);
        self
    }

    /// Joined by a line after all.
    pub(super) fn joined(mut self) -> Self {
        self.line = Some(Stroke::Solid);
        self
    }

    pub(super) fn marker(mut self, marker: Marker) -> Self {
        self.marker = Some(marker);
        self
    }
}

/// What runs along an edge of the plot.
#[derive(Clone)]
pub(super) struct Axis {
    label: String,
    scale: Scale,
    /// Places of the ticks; chosen from the data if empty.
    ticks: Vec<f64>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Scale {
    Linear,
    /// Whole numbers from 1.
    Epochs,
    /// Equal factors are equal distances.
    Log,
}

impl Axis {
    pub(super) fn linear(label: impl Into<String>) -> Self {
        Self { label: label.into(), scale: Scale::Linear, ticks: Vec::new() }
    }

    pub(super) fn epochs() -> Self {
        Self { label: "Epoch".into(), scale: Scale::Epochs, ticks: Vec::new() }
    }

    /// A logarithmic axis with ticks at the given values, all greater than 0.
    pub(super) fn log(label: impl Into<String>, ticks: Vec<f64>) -> Self {
        Self { label: label.into(), scale: Scale::Log, ticks }
    }

    fn place(&self, value: f64) -> f64 {
        if self.scale == Scale::Log { value.log2() } else { value }
    }

    /// Range, in places, and ticks with their labels for data between `low` and `high`.
    fn layout(&self, low: f64, high: f64, most_ticks: usize) -> (f64, f64, Vec<(f64, String)>) {
        let (low, high) = (self.place(low), self.place(high));
        let largest = high.abs().max(low.abs());
        let spread = if high - low > 1e-9 * largest.max(1e-3) { high - low } else { (largest * 0.05).max(0.01) };
        let padding = match self.scale {
            Scale::Linear => spread * 0.08,
            Scale::Epochs => (spread * 0.03).max(0.25),
            Scale::Log => 0.4,
        };
        let (low, high) = (low - padding, high + padding);
        let ticks = if self.ticks.is_empty() {
            let step = nice_step((high - low) / most_ticks as f64, self.scale == Scale::Epochs);
            let first = (low / step).ceil() as i64;
            let decimals = (-step.log10().floor()).clamp(0.0, 9.0) as usize;
            (first..)
                .map(|k| k as f64 * step)
                .take_while(|&t| t <= high)
                .filter(|&t| self.scale != Scale::Epochs || t >= 0.0)
                .map(|t| (t, format!("{:.decimals$}", if t == 0.0 { 0.0 } else { t })))
                .collect()
        } else {
            self.ticks.iter().map(|&t| (self.place(t), format!("{t}"))).collect()
        };
        (low, high, ticks)
    }
}

/// The smallest of 1, 2, 5 times a power of ten that is at least `rough`.
fn nice_step(rough: f64, whole: bool) -> f64 {
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|&s| s >= rough * 0.999).unwrap_or(power);
    if whole { step.max(1.0) } else { step }
}

/// A plot.
pub(super) struct Figure {
    pub(super) title: String,
    pub(super) x: Axis,
    pub(super) y: Axis,
    /// A horizontal line with its label, to compare with.
    pub(super) level: Option<(f64, String)>,
    pub(super) series: Vec<Series>,
}

impl Figure {
    /// Draws the figure, `size` = (width, height) in pixels, and replaces the PNG at `path` by it.
    pub(super) fn write(&self, path: &Path, size: (u32, u32)) -> Result<()> {
        let pixels =
            self.draw(size).map_err(|e| Error::new(Kind::Internal, format!("cannot draw {}: {e}", path.display())))?;
        let mut png = Vec::new();
        PngEncoder::new_with_quality(&mut png, CompressionType::Default, FilterType::NoFilter)
            .write_image(&pixels, size.0, size.1, ExtendedColorType::Rgb8)
            .map_err(|e| Error::io(path, "encode this plot", std::io::Error::other(e)))?;
        files::replace(path, &png)
    }

    /// Pixels (height, width, 3) RGB.
    fn draw(&self, (width, height): (u32, u32)) -> std::result::Result<Vec<u8>, DrawError> {
        register_fonts();
        let (w, h) = (width * OVERSAMPLING, height * OVERSAMPLING);
        let mut pixels = vec![255u8; (w * h * 3) as usize];
        {
            let canvas = BitMapBackend::with_buffer(&mut pixels, (w, h)).into_drawing_area();
            Painter { canvas: &canvas, em: f64::from(h) / 34.0 }.figure(self, f64::from(w), f64::from(h))?;
            canvas.present()?;
        }
        Ok(average_down(&pixels, w as usize))
    }
}

/// Averages each 2 x 2 pixels of an RGB picture `wide` pixels across.
fn average_down(pixels: &[u8], wide: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(pixels.len() / 4);
    for rows in pixels.chunks_exact(wide * 6) {
        let (top, bottom) = rows.split_at(wide * 3);
        for (a, b) in top.chunks_exact(6).zip(bottom.chunks_exact(6)) {
            for c in 0..3 {
                let sum = u16::from(a[c]) + u16::from(a[c + 3]) + u16::from(b[c]) + u16::from(b[c + 3]);
                out.push(((sum + 2) / 4) as u8);
            }
        }
    }
    out
}

fn register_fonts() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let fonts: [(FontStyle, &'static [u8]); 2] = [
            (FontStyle::Normal, include_bytes!("font/DejaVuSans.ttf")),
            (FontStyle::Bold, include_bytes!("font/DejaVuSans-Bold.ttf")),
        ];
        for (style, bytes) in fonts {
            assert!(register_font("sans-serif", style, bytes).is_ok(), "the built-in font is a valid one");
        }
    });
}

/// An upright rectangle: left, top, right, bottom.
#[derive(Clone, Copy)]
struct Frame {
    left: f64,
    top: f64,
    right: f64,
    bottom: f64,
}

impl Frame {
    fn around(x: f64, y: f64, half_width: f64, half_height: f64) -> Self {
        Self { left: x - half_width, top: y - half_height, right: x + half_width, bottom: y + half_height }
    }

    /// Area shared with another.
    fn overlap(&self, other: &Frame) -> f64 {
        let w = self.right.min(other.right) - self.left.max(other.left);
        let h = self.bottom.min(other.bottom) - self.top.max(other.top);
        w.max(0.0) * h.max(0.0)
    }

    fn contains(&self, other: &Frame) -> bool {
        other.left >= self.left && other.right <= self.right && other.top >= self.top && other.bottom <= self.bottom
    }
}

/// Draws on a canvas; `em` is the font size in drawn pixels, and all else is in proportion.
struct Painter<'a, 'b> {
    canvas: &'a Canvas<'b>,
    em: f64,
}

impl Painter<'_, '_> {
    fn figure(&self, figure: &Figure, width: f64, height: f64) -> Drawn {
        let em = self.em;
        let all: Vec<(f64, f64)> =
            figure.series.iter().flat_map(|s| &s.points).copied().filter(|(x, y)| drawable(figure, *x, *y)).collect();
        self.text(&figure.title, em * 1.15, FontStyle::Bold, width / 2.0, em * 1.5, HPos::Center, &INK)?;

        // On long lines the points are too many to be marked.
        let longest = figure.series.iter().filter(|s| s.line.is_some()).map(|s| s.points.len()).max().unwrap_or(0);
        let marked = (longest as f64) * em * 1.6 < width;
        let level = figure.level.as_ref().filter(|(y, _)| y.is_finite());
        let legend_bottom = self.legend(figure, level.map(|(_, label)| label.as_str()), width, em * 2.9, marked)?;
        let bounds = |values: &mut dyn Iterator<Item = f64>| {
            values.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(v), b.max(v)))
        };
        let (x_low, x_high) = bounds(&mut all.iter().map(|p| p.0));
        let (y_low, y_high) = bounds(&mut all.iter().map(|p| p.1).chain(level.map(|(y, _)| *y)));
        let mut area = Frame { left: em * 5.0, top: legend_bottom, right: width - em, bottom: height - em * 3.7 };
        if all.is_empty() {
            self.border(&area)?;
            let (x, y) = ((area.left + area.right) / 2.0, (area.top + area.bottom) / 2.0);
            return self.text("no data yet", em, FontStyle::Normal, x, y, HPos::Center, &INK);
        }

        let (y_from, y_to, y_ticks) = figure.y.layout(y_low, y_high, 8);
        let widest = y_ticks.iter().map(|(_, t)| self.width(t, em, FontStyle::Normal)).fold(0.0, f64::max);
        area.left = widest + em * 3.1;
        let (x_from, x_to, x_ticks) = figure.x.layout(x_low, x_high, 10);
        let to_x = |v: f64| area.left + (v - x_from) / (x_to - x_from) * (area.right - area.left);
        let to_y = |v: f64| area.bottom - (v - y_from) / (y_to - y_from) * (area.bottom - area.top);
        let place = |&(x, y): &(f64, f64)| (to_x(figure.x.place(x)), to_y(figure.y.place(y)));

        for (v, label) in &y_ticks {
            let y = to_y(*v);
            self.line(&[(area.left, y), (area.right, y)], em * 0.05, &GRID)?;
            self.text(label, em, FontStyle::Normal, area.left - em * 0.5, y, HPos::Right, &INK)?;
        }
        for (v, label) in &x_ticks {
            let x = to_x(*v);
            self.line(&[(x, area.top), (x, area.bottom)], em * 0.05, &GRID)?;
            self.text(label, em, FontStyle::Normal, x, area.bottom + em, HPos::Center, &INK)?;
        }
        self.border(&area)?;
        let middle = (area.left + area.right) / 2.0;
        self.text(&figure.x.label, em, FontStyle::Normal, middle, height - em * 1.2, HPos::Center, &INK)?;
        self.upright(&figure.y.label, em * 1.1, (area.top + area.bottom) / 2.0)?;

        if let Some((y, _)) = level {
            let y = to_y(figure.y.place(*y));
            self.stroke(&[(area.left, y), (area.right, y)], Stroke::Dashed, &RED)?;
        }
        let mut taken = Vec::new();
        let mut notes = Vec::new();
        for series in &figure.series {
            let points: Vec<_> = series
                .points
                .iter()
                .enumerate()
                .filter(|(_, (x, y))| drawable(figure, *x, *y))
                .map(|(i, p)| (place(p), series.notes.get(i)))
                .collect();
            let path: Vec<_> = points.iter().map(|(p, _)| *p).collect();
            if let Some(stroke) = series.line {
                self.stroke(&path, stroke, &series.colour)?;
            }
            let radius = if series.line.is_some() { em * 0.22 } else { em * 0.42 };
            if let Some(marker) = series.marker.filter(|_| marked) {
                for &(x, y) in &path {
                    self.marker(marker, x, y, radius, &series.colour)?;
                    taken.push(Frame::around(x, y, radius * 1.3, radius * 1.3));
                }
            }
            notes.extend(points.into_iter().filter_map(|(p, note)| note.map(|n| (p, n, series.colour))));
        }
        for ((x, y), note, colour) in notes {
            self.note(note, x, y, &colour, &area, &mut taken)?;
        }
        Ok(())
    }

    /// Writes a note beside (x, y) where it covers nothing, if need be at a distance with a line to its point.
    fn note(&self, note: &str, x: f64, y: f64, colour: &RGBColor, area: &Frame, taken: &mut Vec<Frame>) -> Drawn {
        let size = self.em * 0.85;
        let half_width = self.width(note, size, FontStyle::Normal) / 2.0 + self.em * 0.12;
        let half_height = size * 0.48;
        const SIDES: [(f64, f64); 8] =
            [(0.0, -1.0), (1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (1.0, -1.0), (-1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)];
        let mut best: Option<(f64, Frame, f64)> = None;
        'search: for ring in 0..6 {
            let gap = self.em * (0.55 + 0.8 * f64::from(ring));
            for (sx, sy) in SIDES {
                let centre = (x + sx * (half_width + gap), y + sy * (half_height + gap));
                let frame = Frame::around(centre.0, centre.1, half_width, half_height);
                if !area.contains(&frame) {
                    continue;
                }
                let covered: f64 = taken.iter().map(|t| t.overlap(&frame)).sum();
                if best.as_ref().is_none_or(|(least, ..)| covered < *least) {
                    best = Some((covered, frame, gap));
                }
                if covered == 0.0 {
                    break 'search;
                }
            }
        }
        let Some((_, frame, gap)) = best else { return Ok(()) };
        let centre = ((frame.left + frame.right) / 2.0, (frame.top + frame.bottom) / 2.0);
        if gap > self.em {
            let near = (x.clamp(frame.left, frame.right), y.clamp(frame.top, frame.bottom));
            let way = ((near.0 - x).powi(2) + (near.1 - y).powi(2)).sqrt().max(1.0);
            let start = self.em * 0.45 / way;
            let from = (x + (near.0 - x) * start, y + (near.1 - y) * start);
            self.line(&[from, near], self.em * 0.06, colour)?;
        }
        taken.push(frame);
        self.text(note, size, FontStyle::Normal, centre.0, centre.1, HPos::Center, &INK)
    }

    /// Draws the legend centred below `top`, in as many rows as needed; returns where the plot may begin.
    fn legend(
        &self,
        figure: &Figure,
        level: Option<&str>,
        width: f64,
        top: f64,
        marked: bool,
    ) -> std::result::Result<f64, DrawError> {
        let em = self.em;
        let (sample, gap) = (em * 1.9, em * 1.5);
        let level = level.map(|label| Series {
            label: label.to_string(),
            colour: RED,
            line: Some(Stroke::Dashed),
            marker: None,
            points: Vec::new(),
            notes: Vec::new(),
        });
        let mut rows: Vec<(f64, Vec<(&Series, f64)>)> = Vec::new();
        for series in figure.series.iter().chain(&level) {
            let sample = if series.line.is_some() { sample } else { em * 1.3 };
            let entry = sample + self.width(&series.label, em, FontStyle::Normal);
            match rows.last_mut() {
                Some((used, row)) if *used + gap + entry < width - em * 2.0 => {
                    *used += gap + entry;
                    row.push((series, entry));
                }
                _ => rows.push((entry, vec![(series, entry)])),
            }
        }
        let mut y = top;
        for (used, row) in rows {
            let mut x = (width - used) / 2.0;
            for (series, entry) in row {
                if let Some(stroke) = series.line {
                    self.stroke(&[(x, y), (x + em * 1.5, y)], stroke, &series.colour)?;
                }
                if let Some(marker) = series.marker.filter(|_| marked) {
                    let (at, radius) = if series.line.is_some() { (0.75, 0.22) } else { (0.45, 0.38) };
                    self.marker(marker, x + em * at, y, em * radius, &series.colour)?;
                }
                self.text(&series.label, em, FontStyle::Normal, x + entry, y, HPos::Right, &INK)?;
                x += entry + gap;
            }
            y += em * 1.4;
        }
        Ok(y - em * 0.2)
    }

    fn border(&self, area: &Frame) -> Drawn {
        let (l, t, r, b) = (area.left, area.top, area.right, area.bottom);
        self.line(&[(l, t), (l, b), (r, b), (r, t), (l, t)], self.em * 0.06, &INK)
    }

    fn marker(&self, marker: Marker, x: f64, y: f64, radius: f64, colour: &RGBColor) -> Drawn {
        let polygon = |corners: &[(f64, f64)]| {
            let corners: Vec<_> = corners.iter().map(|(dx, dy)| pixel(x + dx * radius, y + dy * radius)).collect();
            self.canvas.draw(&Polygon::new(corners, colour.filled()))
        };
        match marker {
            Marker::Circle => self.canvas.draw(&Circle::new(pixel(x, y), radius, colour.filled())),
            Marker::Square => polygon(&[(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]),
            Marker::Triangle => polygon(&[(0.0, -1.15), (1.05, 0.8), (-1.05, 0.8)]),
            Marker::Wedge => polygon(&[(0.0, 1.15), (1.05, -0.8), (-1.05, -0.8)]),
            Marker::Diamond => polygon(&[(0.0, -1.25), (1.15, 0.0), (0.0, 1.25), (-1.15, 0.0)]),
            Marker::Cross => {
                let r = radius * 1.1;
                self.line(&[(x - r, y - r), (x + r, y + r)], radius * 0.45, colour)?;
                self.line(&[(x - r, y + r), (x + r, y - r)], radius * 0.45, colour)
            }
        }
    }

    /// A line of data.
    fn stroke(&self, path: &[(f64, f64)], stroke: Stroke, colour: &RGBColor) -> Drawn {
        let width = self.em * 0.12;
        if stroke == Stroke::Solid {
            return self.line(path, width, colour);
        }
        let (dash, gap) = (self.em * 0.45, self.em * 0.25);
        let (mut left, mut on) = (dash, true);
        for ends in path.windows(2) {
            let ((x0, y0), (x1, y1)) = (ends[0], ends[1]);
            let whole = ((x1 - x0).powi(2) + (y1 - y0).powi(2)).sqrt();
            let mut done = 0.0;
            while done < whole {
                let part = left.min(whole - done);
                if on {
                    let at = |d: f64| (x0 + (x1 - x0) * d / whole, y0 + (y1 - y0) * d / whole);
                    self.line(&[at(done), at(done + part)], width, colour)?;
                }
                done += part;
                left -= part;
                if left <= 1e-9 {
                    on = !on;
                    left = if on { dash } else { gap };
                }
            }
        }
        Ok(())
    }

    fn line(&self, path: &[(f64, f64)], width: f64, colour: &RGBColor) -> Drawn {
        let path: Vec<_> = path.iter().map(|&(x, y)| pixel(x, y)).collect();
        self.canvas.draw(&PathElement::new(path, colour.stroke_width(width.round().max(1.0) as u32)))
    }

    fn width(&self, text: &str, size: f64, style: FontStyle) -> f64 {
        let font = FontDesc::new(FontFamily::SansSerif, size, style);
        font.layout_box(text).map_or(0.0, |((left, _), (right, _))| f64::from(right - left))
    }

    /// Text whose capitals are centred on the height `y`.
    fn text(&self, text: &str, size: f64, style: FontStyle, x: f64, y: f64, side: HPos, colour: &RGBColor) -> Drawn {
        // Plotters puts the baseline half a font size below the anchor; a capital is 0.62 font sizes high.
        let font = FontDesc::new(FontFamily::SansSerif, size, style);
        let style = font.color(colour).pos(Pos::new(side, VPos::Top));
        self.canvas.draw(&Text::new(text, pixel(x, y - size * 0.19), style))
    }

    /// Text that runs upwards, centred on (x, y).
    fn upright(&self, text: &str, x: f64, y: f64) -> Drawn {
        let font = FontDesc::new(FontFamily::SansSerif, self.em, FontStyle::Normal).transform(FontTransform::Rotate270);
        let style = font.color(&INK).pos(Pos::new(HPos::Center, VPos::Center));
        self.canvas.draw(&Text::new(text.to_string(), pixel(x, y), style))
    }
}

/// Whether a point has a place on the figure's axes: finite, and no number that only an accident explains.
fn drawable(figure: &Figure, x: f64, y: f64) -> bool {
    figure.x.place(x).abs() < 1e30 && figure.y.place(y).abs() < 1e30
}

fn pixel(x: f64, y: f64) -> (i32, i32) {
    (x.round() as i32, y.round() as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_few_and_within_the_range() {
        for (low, high) in [(0.849, 0.94), (696.0, 1270.0), (0.0, 0.0), (0.0, 5e-324), (-3.0, 1e9), (0.5, 0.5 + 1e-12)]
        {
            let (from, to, ticks) = Axis::linear("").layout(low, high, 8);
            assert!(from < low && high < to, "{low}..{high} in {from}..{to}");
            assert!((2..=10).contains(&ticks.len()), "{low}..{high}: {ticks:?}");
            for (value, label) in ticks {
                assert!((from..=to).contains(&value));
                assert!((label.parse::<f64>().unwrap() - value).abs() <= 1e-6 * (to - from), "{label} at {value}");
            }
        }
        let (_, _, ticks) = Axis::epochs().layout(1.0, 3.0, 10);
        assert_eq!(ticks.iter().map(|t| t.1.as_str()).collect::<Vec<_>>(), ["1", "2", "3"]);
    }

    /// Sixteen points in one place: each note finds room of its own.
    #[test]
    fn notes_do_not_cover_each_other() {
        register_fonts();
        let mut pixels = vec![255u8; 1200 * 900 * 3];
        let canvas = BitMapBackend::with_buffer(&mut pixels, (1200, 900)).into_drawing_area();
        let painter = Painter { canvas: &canvas, em: 24.0 };
        let area = Frame { left: 0.0, top: 0.0, right: 1200.0, bottom: 900.0 };
        let mut taken = vec![Frame::around(600.0, 450.0, 10.0, 10.0)];
        for i in 0..16 {
            painter.note(&format!("note {i}"), 600.0 + f64::from(i), 450.0, &BLUE, &area, &mut taken).unwrap();
        }
        assert_eq!(taken.len(), 17);
        for (i, a) in taken.iter().enumerate() {
            assert!(area.contains(a));
            assert!(taken[..i].iter().all(|b| a.overlap(b) == 0.0), "note {i} covers another");
        }
    }

    #[test]
    fn averaging_keeps_means_and_size() {
        let pixels: Vec<u8> = (0..4 * 2 * 3).map(|i| i as u8).collect();
        let out = average_down(&pixels, 4);
        assert_eq!(out, [8, 9, 10, 14, 15, 16]);
    }
}
