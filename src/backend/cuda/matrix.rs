//! Small products among parameters.

use bytemuck::{Pod, Zeroable};
use half::bf16;

use super::tables::{Table, int};
use super::{Argument, Array, Cuda, Device};
use crate::backend::{Base, Matrix, Scaled, SmallProduct, Transpose};

/// Rows and columns that one block makes, as `TILE` in `kernels/matrix.cu`.
const TILE: usize = 32;
/// Terms of a sum that one block adds up, as `SLICE` in `kernels/matrix.cu`.
const SLICE: usize = 256;

/// A product. `Small` in `kernels/matrix.cu`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Entry {
    /// f32 `(m, k)`
    a: u64,
    /// f32 `(k, n)`
    b: u64,
    /// f32 `(m, n)`, or 0; may be c.
    base: u64,
    /// f32 `(m, n)`
    c: u64,
    /// bf16 `(m, n)`, or 0.
    product: u64,
    /// Where its slices start in the partial sums.
    partial: u64,
    /// f32 `(1)`, or 0.
    alpha: u64,
    /// m, n, k.
    size: [i32; 3],
    /// Of a along its rows and k, of b along k and its columns, of c along its rows and columns.
    strides: [i32; 6],
    _end: i32,
}

impl Entry {
    fn slices(&self) -> usize {
        (self.size[2] as usize).div_ceil(SLICE)
    }

    /// Tiles of c.
    fn grid(&self) -> (usize, usize) {
        ((self.size[0] as usize).div_ceil(TILE), (self.size[1] as usize).div_ceil(TILE))
    }

    /// The tiles of product `i`, once for each slice.
    fn tiles(self, i: usize, slices: usize) -> impl Iterator<Item = Tile> {
        let (rows, columns) = self.grid();
        (0..slices * rows * columns).map(move |at| Tile {
            product: int(i),
            row: int(at / columns % rows),
            column: int(at % columns),
            slice: int(at / columns / rows),
        })
    }
}

/// What a block makes. `Tile` in `kernels/matrix.cu`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Tile {
    product: i32,
    row: i32,
    column: i32,
    slice: i32,
}

/// A scaled tensor. `Scaled` in `kernels/matrix.cu`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct ScaledEntry {
    /// f32 `(n)`
    x: u64,
    /// f32 `(n)`
    y: u64,
    /// bf16 `(n)`, or 0.
    product: u64,
    n: u64,
}

/// A product as the kernel takes it, whose slices start at `partial`. Lanes of a warp lie along the kernel's rows, so where
/// c is wide it is given transposed.
fn entry<D: Device>(p: &SmallProduct<'_, Array<D, f32>, Array<D, bf16>>, partial: usize) -> Entry {
    let (m, n, k) = p.size;
    let c = p.c.address(m * n);
    let (a, b) = (p.a.address(m * k), p.b.address(k * n));
    let (a_row, a_k) = if p.transpose == Transpose::Left { (1, m) } else { (k, 1) };
    let (b_k, b_column) = if p.transpose == Transpose::Right { (1, k) } else { (n, 1) };
    let transposed = n >= TILE || n >= m;
    let (ends, size, strides) = if transposed {
        ((b, a), [n, m, k], [b_column, b_k, a_k, a_row, 1, n])
    } else {
        ((a, b), [m, n, k], [a_row, a_k, b_k, b_column, n, 1])
    };
    Entry {
        a: ends.0,
        b: ends.1,
        base: match p.base {
            Base::Zeros => 0,
            Base::Itself => c,
            Base::Of(base) => base.address(m * n),
        },
        c,
        product: p.product.as_ref().map_or(0, |product| product.address(m * n)),
        partial: partial as u64,
        alpha: p.alpha.map_or(0, |alpha| alpha.address(1)),
        size: size.map(int),
        strides: strides.map(int),
        _end: 0,
    }
}

impl<D: Device> Matrix for Cuda<D> {
    fn small_products(&self, products: &mut [SmallProduct<'_, Self::Full, Self::Act>]) {
        let (mut read, mut written, mut partial) = (0, 0, 0);
        let mut entries = Vec::with_capacity(products.len());
        for p in products.iter() {
            let (m, n, k) = p.size;
            let bases = usize::from(!matches!(p.base, Base::Zeros));
            read += (m * k + k * n + bases * m * n) * size_of::<f32>();
            written += m * n * (size_of::<f32>() + p.product.as_ref().map_or(0, |_| size_of::<bf16>()));
            let entry = entry(p, partial);
            if entry.slices() > 1 {
                partial += entry.slices() * m * n;
            }
            entries.push(entry);
        }
        let sliced = || entries.iter().enumerate().filter(|(_, entry)| entry.slices() > 1);
        let all = self.table(&entries, || {
            let tiles = entries.iter().enumerate().flat_map(|(i, entry)| entry.tiles(i, entry.slices()));
            tiles.chain(sliced().flat_map(|(i, entry)| entry.tiles(i, 1))).collect()
        });
        // The tiles to join stand behind those to make.
        let joined = sliced().map(|(_, entry)| entry.grid().0 * entry.grid().1).sum();
        let made = Table { blocks: all.blocks - joined, ..all };
        let join = Table { parts: all.parts + (made.blocks * size_of::<Tile>()) as u64, blocks: joined, ..all };
        let room = self.scratch(partial);
        self.launch_table("small_products", made, (read, written), &[Argument::partial(room, partial)]);
        self.launch_table("join_slices", join, (0, 0), &[Argument::partial_read(room, partial)]);
    }

    fn columns(&self, x: &Self::Full, columns: usize, start: usize, n: usize, y: &mut Self::Full) {
        let rows = x.len() / columns;
        let sizes = [rows, columns, start, n].map(Argument::from);
        let arguments = [x.at(rows * columns), sizes[0], sizes[1], sizes[2], sizes[3], y.to(rows * n)];
        self.launch("columns", rows * n, &arguments);
    }

    fn add_columns(&self, y: &Self::Full, columns: usize, start: usize, n: usize, x: &mut Self::Full) {
        let rows = x.len() / columns;
        let sizes = [rows, columns, start, n].map(Argument::from);
        let arguments = [y.at(rows * n), sizes[0], sizes[1], sizes[2], sizes[3], x.both(rows * columns)];
        self.launch("add_columns", rows * n, &arguments);
    }

    fn scale_all(&self, alpha: &Self::Full, tensors: &mut [Scaled<'_, Self::Full, Self::Act>]) {
        let (mut read, mut written) = (0, 0);
        let entry = |t: &Scaled<'_, Self::Full, Self::Act>| {
            let n = t.x.len();
            read += n * size_of::<f32>();
            written += n * (size_of::<f32>() + t.product.as_ref().map_or(0, |_| size_of::<bf16>()));
            let product = t.product.as_ref().map_or(0, |product| product.address(n));
            ScaledEntry { x: t.x.address(n), y: t.y.address(n), product, n: n as u64 }
        };
        let entries: Vec<ScaledEntry> = tensors.iter().map(entry).collect();
        let table = self.pieces(&entries, |entry| entry.n as usize);
        self.launch_table("scale_all", table, (read, written), &[alpha.at(1)]);
    }

    fn add_part(&self, x: &Self::Full, start: usize, y: &mut Self::Full) {
        let n = y.len();
        self.launch("add_part", n, &[x.at(start + n), start.into(), n.into(), y.both(n)]);
    }

    fn add_all(&self, sums: &mut [(Vec<&Self::Full>, &mut Self::Full)]) {
        for (xs, y) in sums {
            for x in xs {
                self.add_part(x, 0, y);
            }
        }
    }
}
