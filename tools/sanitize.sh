#!/usr/bin/env bash
# The operation tests of the CUDA backend on the CPU under AddressSanitizer and UndefinedBehaviorSanitizer; two planted
# overruns, in global and in shared memory, show that they watch. Needs g++. `sanitize.sh build` compiles, no more.
set -euo pipefail
cd "$(dirname "$0")/.."
# The kernels are watched (kernels/host/build.rs); so is memory from Rust, whose allocator is malloc. A shared library of their
# own, so that the tests are those that ran without.
kernels=$PWD/target/sanitize/kernels.so
SEGPEFT_SANITIZE_TO=$kernels cargo build --release -p host-kernels --target-dir target/sanitize
if [[ ${1:-} == build ]]; then exit; fi
export SEGPEFT_SANITIZED_KERNELS=$kernels
export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0
# The sanitizers want to be loaded first.
host=$(rustc -vV | sed -n 's/^host: //p' | tr 'a-z-' 'A-Z_')
export "CARGO_TARGET_${host}_RUNNER=env LD_PRELOAD=$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libubsan.so)"
run() { cargo test --release --test cuda -- "$@"; }

run operations::
for planted in past_the_end past_shared; do
    if output=$(run --ignored --exact "planted::$planted" 2>&1) || ! grep -qE "AddressSanitizer: heap-buffer-overflow|index [0-9]+ out of bounds" <<<"$output"; then
        echo "$planted went unnoticed:" >&2
        echo "$output" >&2
        exit 1
    fi
    echo "$planted is caught"
done
