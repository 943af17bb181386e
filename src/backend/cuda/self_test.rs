//! A quick look whether a device computes at all.

use super::{Cuda, Device};
use crate::backend::{Linear, Memory, Product};
use crate::error::Kind;
use crate::{Error, Result};

/// Multiplies and sums small whole numbers, which bf16 holds exactly, and compares with the same on the host: memory,
/// copies, kernels, a product with bias.
///
/// # Errors
/// When the device fails, or computes something else.
pub fn self_test<D: Device>(backend: &Cuda<D>) -> Result<()> {
    let p = Product { rows: 96, inputs: 32, outputs: 40 };
    let whole = |n: usize, range: usize| -> Vec<f32> { (0..n).map(|i| (i * 7 % range) as f32 - 2.0).collect() };
    let (x, w, bias) = (whole(p.rows * p.inputs, 5), whole(p.outputs * p.inputs, 4), whole(p.outputs, 6));
    let store = |numbers: &[f32]| {
        let (mut full, mut act) = (backend.full(numbers.len()), backend.act(numbers.len()));
        backend.upload(numbers, &mut full);
        backend.cast(&full, &mut act);
        (full, act)
    };
    let (mut y, mut sums) = (backend.act(p.rows * p.outputs), backend.full(p.outputs));
    backend.linear(&store(&x).1, &store(&w).1, Some(&store(&bias).1), p, &mut y, false);
    backend.linear_backward_bias(&y, p.rows, p.outputs, &mut sums);
    let (found, found_sums) = (backend.download_act(&y, p.rows * p.outputs), backend.download(&sums));
    backend.check()?;

    let expected: Vec<f32> = (0..p.rows * p.outputs)
        .map(|i| {
            let (row, column) = (&x[i / p.outputs * p.inputs..][..p.inputs], i % p.outputs);
            let weights = &w[column * p.inputs..][..p.inputs];
            row.iter().zip(weights).map(|(x, w)| x * w).sum::<f32>() + bias[column]
        })
        .collect();
    let mut expected_sums = vec![0.0; p.outputs];
    for row in expected.chunks_exact(p.outputs) {
        expected_sums.iter_mut().zip(row).for_each(|(sum, y)| *sum += y);
    }
    if found != expected || found_sums != expected_sums {
        return Err(Error::new(Kind::Device, "the GPU computes wrong numbers: its driver or the GPU itself is faulty"));
    }
    Ok(())
}
