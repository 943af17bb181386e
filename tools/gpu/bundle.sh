#!/usr/bin/env bash
# Packs what a check on a machine with a GPU needs into one folder: the program, the tests and the bench of the CUDA
# backend, the comparison with PyTorch, tools/gpu/check.sh, and as many pictures as fit, out of the archive that
# SEGPEFT_KVASIR names. That machine needs no Rust, no nvcc and no repository.
#
# usage: tools/gpu/bundle.sh [folder]     (default: target/gpu, made anew)
#
# Needs nvcc (tools/get-nvcc.sh) and python3. SEGPEFT_BUNDLE_MIB is the most that the folder may hold (default: 60).
set -euo pipefail
root=$(realpath "$(dirname "$0")/../..")
folder=$(realpath -m "${1:-$root/target/gpu}")
most=$((${SEGPEFT_BUNDLE_MIB:-60} << 20))
cd "$root"

fail() {
    echo "bundle.sh: $*" >&2
    exit 1
}

# An older bundle is replaced, and nothing else is.
if [[ -e $folder && ! -e $folder/commit && -n $(ls -A "$folder") ]]; then
    fail "$folder holds something other than a bundle: name another folder"
fi
rm -rf "$folder"
mkdir -p "$folder/fixtures/reference" "$folder/baseline"
changed=$(git status --porcelain --untracked-files=no)
echo "$(git rev-parse HEAD)${changed:+, with changes}" >"$folder/commit"

# One build of everything; cargo says where it put what.
SEGPEFT_REQUIRE_CUDA=1 cargo build --release --bin segpeft-native --test cuda --bench kernels \
    --message-format=json-render-diagnostics >"$folder/build.json" ||
    fail "the build failed; if nvcc is missing, run tools/get-nvcc.sh"
built() { # kind, name
    python3 - "$folder/build.json" "$@" <<'PYTHON'
import json
import sys

path, kind, name = sys.argv[1:]
for line in open(path):
    message = json.loads(line)
    if message["reason"] == "compiler-artifact" and message["executable"]:
        if message["target"]["kind"] == [kind] and message["target"]["name"] == name:
            print(message["executable"])
PYTHON
}
strip -o "$folder/segpeft-native" "$(built bin segpeft-native)"
strip -o "$folder/cuda-tests" "$(built test cuda)"
strip -o "$folder/kernels-bench" "$(built bench kernels)"
rm "$folder/build.json"

cp tests/fixtures/reference/tiny.json "$folder/fixtures/reference/"
cp tools/baseline/{baseline.py,compare.py,pipeline.py,requirements.txt} "$folder/baseline/"
cp tools/gpu/{check.sh,README.md} "$folder/"

size() { find "$folder" -type f -printf '%s\n' | awk '{ sum += $1 } END { print sum + 0 }'; }
if [[ -n ${SEGPEFT_KVASIR:-} ]]; then
    [[ -f $SEGPEFT_KVASIR ]] || fail "$SEGPEFT_KVASIR is no file: let SEGPEFT_KVASIR name the Kvasir-SEG archive"
    python3 - "$SEGPEFT_KVASIR" "$folder/data" $((most - $(size))) <<'PYTHON'
import sys
import zipfile
from pathlib import Path, PurePosixPath

archive, folder, room = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
with zipfile.ZipFile(archive) as source:
    found = {"images": {}, "masks": {}}
    for entry in source.infolist():
        path = PurePosixPath(entry.filename)
        if not entry.is_dir() and path.parent.name in found:
            found[path.parent.name][path.stem] = entry
    stems = sorted(found["images"].keys() & found["masks"])
    pairs = [(found["images"][stem], found["masks"][stem]) for stem in stems]
    if not pairs:
        sys.exit(f"bundle.sh: {archive} has no images/ with masks/ of the same names: name the Kvasir-SEG archive")
    taken = 0
    for pair in pairs:
        room -= sum(entry.file_size for entry in pair)
        if room < 0:
            break
        for kind, entry in zip(found, pair):
            path = folder / kind / PurePosixPath(entry.filename).name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(source.read(entry))
        taken += 1
    print(f"{taken} of {len(pairs)} pictures")
PYTHON
else
    echo "no pictures: SEGPEFT_KVASIR does not name the Kvasir-SEG archive, so the check will skip training runs"
fi

bytes=$(size)
echo "$folder: $(awk -v bytes="$bytes" 'BEGIN { printf "%.1f", bytes / 2 ^ 20 }') MiB"
if ((bytes > most)); then
    fail "$folder is larger than $((most >> 20)) MiB: raise SEGPEFT_BUNDLE_MIB"
fi
