//! The host run of kernels catches what it must; see `kernels/host/planted.cu`.

use half::bf16;
use host_kernels::{Order, Value, bf16_bits, launch};

const ORDERS: [Order; 4] = [Order::Forward, Order::Reverse, Order::Random(1), Order::Random(2)];

/// Runs a kernel of 256 threads that fills 256 numbers.
fn run(kernel: &str, shared: usize, order: Order) -> Result<Vec<f32>, String> {
    let mut y = vec![0.0f32; 256];
    let arguments = [Value::Pointer(y.as_mut_ptr() as u64)];
    // SAFETY: the planted kernels called here write y[0..256].
    unsafe { launch(kernel, [1, 1, 1], [256, 1, 1], shared, order, &arguments) }.map(|()| y)
}

#[test]
fn a_missing_barrier_shows_between_orders() {
    let results = ORDERS.map(|order| run("missing_barrier", 0, order).expect("a result"));
    let bits = |y: &[f32]| y.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    for other in &results[1..] {
        assert_ne!(bits(&results[0]), bits(other));
    }
    assert!(results.iter().all(|y| y.iter().any(|x| x.is_nan())), "what is not yet written is poisoned");
}

#[test]
fn warps_drift_apart() {
    let results = ORDERS.map(|order| run("reused_shared", 0, order).expect("a result"));
    assert!(results.iter().all(|y| y.iter().any(|&x| x != 3.0)), "somebody read what was written too early");
}

#[test]
fn copies_past_the_registers_are_not_there_before_they_are_waited_for() {
    for order in ORDERS {
        for kernel in ["missing_wait", "early_wait"] {
            assert!(run(kernel, 0, order).expect("a result").iter().all(|x| x.is_nan()), "{kernel}");
        }
    }
    // Copied early or late.
    let [forward, others @ ..] = ORDERS.map(|order| run("changed_source", 0, order).expect("a result"));
    assert!(others.iter().all(|y| *y != forward), "the source of a copy changed unnoticed");
    assert!(run("misaligned_copy", 0, Order::Forward).expect_err("an address").contains("no multiple"));
}

#[test]
fn barriers_and_shuffles_without_all_their_threads_are_errors() {
    for order in ORDERS {
        for (kernel, words) in [("partial_barrier", "__syncthreads"), ("partial_shuffle", "warp operations")] {
            let problem = run(kernel, 0, order).expect_err(kernel);
            assert!(problem.contains(kernel) && problem.contains(words), "{problem}");
        }
    }
}

#[test]
fn unwritten_shared_memory_is_nan() {
    let y = run("unwritten_shared", 1024, Order::Forward).expect("a result");
    assert!(y[0].is_nan() && y[1..].iter().all(|&x| x == 1.0));
}

#[test]
fn a_wrong_stride_is_a_wrong_result() {
    let x: Vec<f32> = (0..256).map(|i| i as f32).collect();
    let mut y = vec![0.0f32; 256];
    let arguments = [Value::Pointer(x.as_ptr() as u64), Value::Pointer(y.as_mut_ptr() as u64)];
    // SAFETY: the kernel reads x[0..256] and writes y[0..256].
    unsafe { launch("wrong_stride", [1, 1, 1], [256, 1, 1], 0, Order::Forward, &arguments) }.expect("a result");
    assert_ne!(x, y);
}

#[test]
fn impossible_launches_are_errors() {
    let y = Value::Pointer(0);
    let attempt = |kernel: &str, grid, block, shared, values: &[Value]| {
        // SAFETY: none of these launches gets as far as its kernel.
        unsafe { launch(kernel, grid, block, shared, Order::Forward, values) }.expect_err("refused")
    };
    let one = [1, 1, 1];
    assert_eq!(attempt("nothing", one, [32, 1, 1], 0, &[y]), "nothing: is no kernel");
    assert!(attempt("missing_barrier", one, [32, 1, 1], 0, &[]).contains("takes 1 arguments, is given 0"));
    assert!(attempt("missing_barrier", one, [32, 1, 1], 0, &[Value::I32(1)]).contains("argument 0"));
    assert!(attempt("missing_barrier", one, [48, 1, 1], 0, &[y]).contains("48 threads"));
    assert!(attempt("missing_barrier", one, [288, 1, 1], 0, &[y]).contains("288 threads; it is compiled for 256"));
    assert!(attempt("missing_barrier", [1, 70_000, 1], [32, 1, 1], 0, &[y]).contains("a grid"));
    assert!(attempt("missing_barrier", one, [32, 1, 1], 300_000, &[y]).contains("300000 bytes"));
}

/// Against the `half` crate, whose rounding is the vendor's but for NaNs, which all become 0x7fff there.
#[test]
fn bf16_rounds_as_the_device_does() {
    let expected = |x: f32| if x.is_nan() { 0x7fff } else { bf16::from_f32(x).to_bits() };
    for high in 0..=u16::MAX {
        for low in [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
            let x = f32::from_bits(u32::from(high) << 16 | low);
            assert_eq!(bf16_bits(x), expected(x), "{x:e}");
        }
    }
}

/// For `tools/sanitize.sh`, which runs it in a process of its own and expects AddressSanitizer to end it.
#[test]
#[ignore = "writes past the end of its memory"]
fn past_the_end() {
    let _ = run("past_the_end", 0, Order::Forward);
}

/// As [`past_the_end`].
#[test]
#[ignore = "writes past the end of its memory"]
fn past_shared() {
    let _ = run("past_shared", 0, Order::Forward);
}
