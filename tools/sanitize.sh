#!/usr/bin/env bash
# The operation tests of the CUDA backend on the CPU under AddressSanitizer and UndefinedBehaviorSanitizer; two planted
# overruns show that the first one watches. Needs g++; builds into a folder of its own.
#
# usage: tools/sanitize.sh [build folder]     (default: target/sanitize)
set -euo pipefail
cd "$(dirname "$0")/.."
target=$(rustc -vV | sed -n 's/^host: //p')
export CARGO_TARGET_DIR=${1:-target/sanitize}
# The C++ code is watched; memory from Rust is too, since its allocator is malloc. rustc links without default libraries, so
# the sanitizers' are named, and loaded first.
export CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -g -fno-omit-frame-pointer"
export RUSTFLAGS="-Clink-arg=-lasan -Clink-arg=-lubsan"
export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0
variable=CARGO_TARGET_$(tr 'a-z-' 'A-Z_' <<<"$target")_RUNNER
export "$variable"="env LD_PRELOAD=$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libubsan.so)"
run() { cargo test --release --target "$target" --test cuda_host -- "$@"; }

run operations
for planted in past_the_end past_shared; do
    if output=$(run --ignored --exact "planted::$planted" 2>&1) || ! grep -q "AddressSanitizer: heap-buffer-overflow" <<<"$output"; then
        echo "$planted went unnoticed:" >&2
        echo "$output" >&2
        exit 1
    fi
    echo "$planted is caught"
done
