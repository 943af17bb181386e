#!/usr/bin/env bash
# Checks and measures segpeft-native on GPU 0, in a folder that tools/gpu/bundle.sh made: see README.md beside this.
#
# usage: check.sh [results folder]     (default: results)
#
#   PARTS="tests steps"     runs these alone, out of: doctor tests repeat memcheck racecheck initcheck steps kernels
#                           compare train apart pipeline compiled
#   BATCH=64 SIZE=512       pictures of a step and their side
#   CHECK_SECONDS=540       ends everything after this long; a part that finds no time left has failed
#
# One line per part on standard output, what each said in <results>/<part>.txt, tables in <results>/summary.md. Exit
# code 1 if a part failed. A part whose means are missing (PyTorch, compute-sanitizer, pictures) is skipped, and says so.
#
# shellcheck disable=SC2329 # parts are called by name
set -euo pipefail

# Each part's seconds at most.
declare -A limits=(
    [doctor]=30 [tests]=150 [repeat]=100 [memcheck]=60 [racecheck]=150 [initcheck]=60 [steps]=90 [apart]=120 [kernels]=60
    [compare]=180 [train]=100 [pipeline]=120 [compiled]=240
)
order=(doctor tests repeat memcheck racecheck initcheck steps kernels compare train apart pipeline compiled)
# What a part exits with that cannot run here.
skipped=77

skip() {
    echo "$*"
    exit "$skipped"
}

# Puts cuBLASLt on the loader's path. PyTorch's own comes first among those not there yet, so that both sides of the
# comparison use the same.
find_libraries() {
    local folder wheels
    if PATH=$PATH:/sbin:/usr/sbin ldconfig -p 2>/dev/null | grep -E 'libcublasLt\.so\.1[23]' >/dev/null; then
        return
    fi
    wheels=$(python3 -c 'import glob, sys; [print(f) for p in sys.path for f in glob.glob(p + "/nvidia/*/lib")]' \
        2>/dev/null || true)
    while read -r folder; do
        if compgen -G "$folder/libcublasLt.so.1[23]" >/dev/null; then
            export LD_LIBRARY_PATH=$folder${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
            return
        fi
    done < <(tr : '\n' <<<"${LD_LIBRARY_PATH:-}" && echo "$wheels" && echo "${CUDA_HOME:-/usr/local/cuda}/lib64" &&
        echo /usr/local/cuda/lib64)
}

# Ends the part with the program's own words where GPU 0 cannot be used.
need_gpu() {
    ./segpeft-native doctor --device cuda --step eval --size 32 --batch-size 1 --steps 1 >/dev/null || exit 1
}

# The pictures in one file, packed once for all parts.
need_pictures() {
    [[ -d data ]] || skip "no pictures in this bundle: run tools/gpu/bundle.sh with SEGPEFT_KVASIR naming the archive"
    pictures=$scratch/pictures.pack
    [[ -e $pictures ]] || ./segpeft-native prepare data --out "$pictures" --size "$SIZE" --quiet
}

# A history without the columns that tell time.
without_times() {
    awk -F, 'NR == 1 { for (i = 1; i <= NF; i++) keep[i] = $i !~ /runtime|per_second/ }
        { line = ""; for (i = 1; i <= NF; i++) if (keep[i]) line = line $i ","; print line }' "$1"
}

# A number of a JSON document with one field a line.
number() { # field, file
    sed -n "s/^ *\"$1\": *\([0-9.eE+-]*\),\{0,1\}$/\1/p" "$2"
}

# The longest entries of a profile, as `doctor --profile --json` prints it.
profile() { # file
    echo "| kernel or product | launches | ms | GB/s | TFLOP/s |"
    echo "| --- | --- | --- | --- | --- |"
    awk '$1 == "\"name\":" { name = $0; sub(/^[^:]*: "/, "", name); sub(/",?$/, "", name) }
        { sub(/,$/, "") }
        $1 == "\"launches\":" { launches = $2 }
        $1 == "\"seconds\":" { seconds = $2 }
        $1 == "\"bytes\":" { bytes = $2 }
        $1 == "\"multiply_adds\":" && seconds > 0 && ++rows <= 25 {
            rate = $2 > 0 ? sprintf("%.1f", 2 * $2 / seconds / 1e12) : ""
            printf "| %s | %d | %.3f | %.0f | %s |\n", name, launches, 1e3 * seconds, bytes / seconds / 1e9, rate
        }' "$1"
}

# Standard input as a block of code.
fenced() {
    echo "\`\`\`"
    cat
    echo "\`\`\`"
}

doctor() {
    need_gpu
    ./segpeft-native doctor | tee "$scratch/doctor.txt"
    grep -E '^CUDA backend +works' "$scratch/doctor.txt" >/dev/null || exit 1
    sed -n 's/^note: GPU 0/GPU 0/p' "$scratch/doctor.txt"
}

tests() {
    need_gpu
    SEGPEFT_TEST_GPU=0 SEGPEFT_FIXTURES=$PWD/fixtures ./cuda-tests operations:: step:: graphs:: --nocapture 2>&1
}

repeat() {
    need_gpu
    need_pictures
    local method turn run file split=$scratch/split
    mkdir -p "$split"
    find data/images -type f -printf '%f\n' | sed 's/\.[^.]*$//' | LC_ALL=C sort >"$scratch/stems"
    sed -n 1,32p "$scratch/stems" >"$split/val.txt"
    sed -n 33,128p "$scratch/stems" >"$split/train.txt"
    for method in fft lora; do
        for turn in first second; do
            ./segpeft-native train --data "$pictures" --split "$split" --model random --method "$method" \
                --out "$scratch/$method-$turn" --epochs 2 --batch-size 8 --grad-accum 2 --device cuda
        done
        run=$scratch/$method
        for file in "$run-first"/final/*.safetensors; do
            cmp "$file" "$run-second/final/$(basename "$file")" || { echo "$method: two runs differ" && exit 1; }
        done
        diff <(without_times "$run-first/training_history.csv") <(without_times "$run-second/training_history.csv") ||
            { echo "$method: the histories of two runs differ" && exit 1; }
    done
    echo "two runs of each method left the same weights and histories, to the bit"
}

sanitize() { # tool
    need_gpu
    local program bad=0 hosts=0 log names=() logs=$scratch/$1
    program=$(PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin:/usr/local/cuda/bin command -v compute-sanitizer) ||
        skip "compute-sanitizer is not here: it comes with the CUDA toolkit"
    mkdir -p "$logs"
    mapfile -t names < <(./cuda-tests operations:: --list | sed -n 's/: test$//p')
    ((${#names[@]} > 0)) || exit 1
    # A process per test, several at a time: the tool serialises what one process does. What it ends with is the last line.
    export SEGPEFT_TEST_GPU=0
    printf '%s\n' "${names[@]}" | xargs -P "$(nproc)" -I NAME bash -c '
        "$1" --tool "$2" --print-limit 20 ./cuda-tests --exact "$3" >"$4/$3" 2>&1
        echo "exit code $?" >>"$4/$3"' sanitize "$program" "$1" NAME "$logs"
    for log in "$logs"/*; do
        # Some tests are about the host alone.
        if grep -q 'terminated before first instrumented API call' "$log" && grep -q 'test result: ok. 1 passed' "$log"; then
            hosts=$((hosts + 1))
            continue
        fi
        if ! grep -q 'SUMMARY: 0 ' "$log" || ! grep -q 'test result: ok. 1 passed' "$log" ||
            [[ $(tail -1 "$log") != "exit code 0" ]]; then
            echo "$(basename "$log"):" && cat "$log"
            bad=$((bad + 1))
        fi
    done
    echo "$1: $((${#names[@]} - hosts)) tests on the GPU, $bad with findings"
    [[ $bad == 0 && $hosts -lt ${#names[@]} ]]
}

steps() {
    need_gpu
    local step json bytes options=(--device cuda --size "$SIZE" --batch-size "$BATCH" --steps 10 --json)
    {
        echo "$SIZE x $SIZE, batch $BATCH; eager: launched kernel by kernel, not as CUDA graphs"
        echo
        echo "| step | median, ms | images/s | device MiB | eager median, ms |"
        echo "| --- | --- | --- | --- | --- |"
    } >"$results/steps.md"
    for step in fft lora eval; do
        json=$results/step-$step.json
        ./segpeft-native doctor --step "$step" "${options[@]}" --eager >"$results/eager-$step.json"
        ./segpeft-native doctor --step "$step" "${options[@]}" --profile >"$json"
        bytes=$(number device_bytes "$json")
        awk -v step="$step" -v seconds="$(number median_seconds "$json")" -v bytes="${bytes:-0}" \
            -v rate="$(number images_per_second "$json")" \
            -v eager="$(number median_seconds "$results/eager-$step.json")" 'BEGIN {
                memory = bytes ? int(bytes / 2 ^ 20) : "-"
                printf "| %s | %.2f | %.0f | %s | %.2f |\n", step, 1e3 * seconds, rate, memory, 1e3 * eager
            }' | tee -a "$results/steps.md"
    done
    # Where a driver does not record, the first column is eager too.
    sed -n 's/^ *"remark": "\(.*\)",\{0,1\}$/\n\1/p' "$results"/step-*.json | uniq | tee -a "$results/steps.md"
    for step in fft lora eval; do
        printf '\nWhere most of the time of %s goes, all steps together:\n\n' "$step"
        profile "$results/step-$step.json"
    done >>"$results/steps.md"
    awk -F ' *[|] *' '/^[|] (fft|lora|eval) / { all = all "  " $2 " " $4 } END { print "images/s:" all }' \
        "$results/steps.md"
}

apart() {
    need_gpu
    local step json
    {
        echo "| step | without | ms | times as long as with it | MB per image |"
        echo "| --- | --- | --- | --- | --- |"
        for step in lora eval fft; do
            json=$results/apart-$step.json
            ./segpeft-native doctor --step "$step" --device cuda --size "$SIZE" --batch-size "$BATCH" --steps 10 --apart \
                --json >"$json" || return 1
            awk -v step="$step" -v images="$BATCH" '
                { sub(/,$/, "") }
                $1 == "\"without\":" { name = $0; sub(/^[^:]*: "/, "", name); sub(/"$/, "", name) }
                $1 == "\"bytes\":" { bytes = $2 }
                $1 == "\"median_seconds\":" { seconds = $2 }
                $1 == "\"ratio\":" {
                    printf "| %s | %s | %.2f | %.3f | %.1f |\n", step, name, 1e3 * seconds, $2, bytes / 1e6 / images
                }' "$json"
        done
    } >"$results/apart.md"
    awk -F ' *[|] *' '$5 ~ /^[0-9]/ && $5 < 1 { all = all "  " $2 " " $3 } END { print "faster apart:" (all ? all : " none") }' \
        "$results/apart.md"
}

kernels() {
    need_gpu
    SEGPEFT_BENCH_BATCH=$BATCH CRITERION_HOME=$scratch/criterion ./kernels-bench --bench 2>&1 |
        tee "$scratch/kernels.txt"
    sed -n '/: a large sum moves/,$p' "$scratch/kernels.txt" >"$results/kernels.md"
    [[ -s $results/kernels.md ]] || exit 1
    echo "$(grep -c '^| [a-z]' "$results/kernels.md") lines in kernels.md"
}

beside_pytorch() { # part, and options of compare.py
    python3 -c 'import torch, transformers, peft' 2>/dev/null ||
        skip "python3 cannot import torch, transformers and peft: install baseline/requirements.txt"
    need_gpu
    python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
        { echo "PyTorch sees no GPU: install one built for CUDA" && exit 1; }
    local part=$1 code=0
    TORCHINDUCTOR_CACHE_DIR=$scratch/inductor python3 baseline/compare.py --binary ./segpeft-native --device cuda \
        --size "$SIZE" --batch-size "$BATCH" "${@:2}" --json "$results/$part.json" >"$results/$part.md" || code=$?
    cat "$results/$part.md"
    [[ $code == 0 ]] || { echo "a measurement failed, see above" && exit 1; }
    awk -F ' *[|] *' '/^[|] (training|evaluation)/ { all = all "  " $5 } END { print "speed-up:" all }' \
        "$results/$part.md"
}

# Compiles what the comparison will use, all kinds of steps at the same time: PyTorch finds it in its cache then.
compile_all() {
    local step
    for step in fft lora eval; do
        TORCHINDUCTOR_CACHE_DIR=$scratch/inductor python3 baseline/baseline.py --step "$step" --dtype bf16 --device cuda \
            --size "$SIZE" --batch-size "$BATCH" --compile --warmup 1 --steps 1 >/dev/null 2>&1 &
    done
    wait
}

pipeline() {
    python3 -c 'import torch, transformers, peft, albumentations' ||
        skip "python3 cannot import torch, transformers, peft and albumentations: install baseline/requirements.txt"
    need_gpu
    [[ -d data ]] || skip "no pictures in this bundle: run tools/gpu/bundle.sh with SEGPEFT_KVASIR naming the archive"
    python3 baseline/pipeline.py --binary ./segpeft-native --data data --method fft --epochs 5 --size "$SIZE" \
        --batch-size "$BATCH" --device cuda --workers 8 | tee "$results/pipeline.md"
}

train() {
    need_gpu
    need_pictures
    local method
    for method in fft lora; do
        ./segpeft-native train --data "$pictures" --model random --method "$method" --out "$scratch/train-$method" \
            --epochs 2 --batch-size "$BATCH" --grad-accum 1 --device cuda 2>&1 | tee "$scratch/train-$method.txt"
        grep -o 'epoch [0-9].*images/s.*' "$scratch/train-$method.txt" | sed "s/^/$method /" >>"$scratch/epochs.txt"
    done
    {
        printf '%s pictures, training and validation together:\n\n' "$(find data/images -type f | wc -l)"
        fenced <"$scratch/epochs.txt"
    } >"$results/train.md"
    echo "$(grep -o '[0-9.]* images/s' "$scratch/epochs.txt" | paste -sd, | sed 's/,/, /g') (fft, then lora)"
}

# This script calls itself for each part, so that a part can be timed out with everything it started.
if [[ ${1-} == --part ]]; then
    case $2 in
    *check) sanitize "$2" ;;
    compare) beside_pytorch compare --rounds 2 --seconds 100 ;;
    compiled) compile_all && beside_pytorch compiled --compile compile --rounds 1 --seconds 150 ;;
    *) "$2" ;;
    esac
    exit
fi

script=$(realpath "$0")
results=$(realpath -m "${1:-results}")
cd "$(dirname "$script")"
for file in segpeft-native cuda-tests kernels-bench commit; do
    if [[ ! -e $file ]]; then
        echo "check.sh: $PWD has no $file: run the check.sh in a folder that tools/gpu/bundle.sh made" >&2
        exit 2
    fi
done
read -ra wanted <<<"${PARTS:-${order[*]}}"
for part in "${wanted[@]}"; do
    if [[ ! -v limits[$part] ]]; then
        echo "check.sh: no part is called $part: PARTS takes some of ${order[*]}" >&2
        exit 2
    fi
done
mkdir -p "$results"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export results scratch BATCH=${BATCH:-64} SIZE=${SIZE:-512}
find_libraries

run() { # part: its verdict, as a line and as a row of the summary
    local part=$1 started=$SECONDS left=$((${CHECK_SECONDS:-540} - SECONDS)) log=$results/$1.txt code=0 verdict=ok last
    local limit=${limits[$part]}
    limit=$((left < limit ? left : limit))
    rm -f "$log" "$results/$part.md"
    if ((limit > 0)); then
        timeout --kill-after=5 "$limit" bash "$script" --part "$part" >"$log" 2>&1 </dev/null || code=$?
        last=$(grep -v '^ *$' "$log" | tail -1 || true)
    else
        code=1
        last="no time left"
    fi
    case $code in
    0) ;;
    "$skipped") verdict=skipped ;;
    124 | 137) verdict=FAILED last="stopped after $limit s; it said: $last" ;;
    *) verdict=FAILED ;;
    esac
    printf '%-8s %-10s %4d s  %s\n' "$verdict" "$part" $((SECONDS - started)) "$last"
    echo "| $part | $verdict | $((SECONDS - started)) | ${last//|/\\|} |" >>"$scratch/verdicts"
    [[ $verdict != FAILED ]]
}

failed=0
for part in "${wanted[@]}"; do
    run "$part" || failed=1
done

python_versions() {
    python3 - 2>/dev/null <<'PYTHON' || echo "no PyTorch with transformers and peft"
import peft
import torch
import transformers

print(f"torch {torch.__version__} (CUDA {torch.version.cuda})", end=", ")
print(f"transformers {transformers.__version__}, peft {peft.__version__}")
PYTHON
}
gpu=$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null | head -1 || true)
{
    echo "# GPU check"
    echo
    echo "| | |"
    echo "| --- | --- |"
    echo "| commit | $(cat commit) |"
    echo "| date | $(date -u '+%Y-%m-%d %H:%M UTC') |"
    echo "| GPU, driver, memory | ${gpu:-nvidia-smi finds none} |"
    echo "| CUDA of the driver | $(nvidia-smi 2>/dev/null | grep -o 'CUDA Version: [0-9.]*' || echo unknown) |"
    echo "| nvcc | $(nvcc --version 2>/dev/null | grep -o 'release .*' || echo "not here, not needed") |"
    echo "| this program's view | $(./segpeft-native doctor 2>&1 | grep -m1 'GPU 0\|no GPU in use' || echo unknown) |"
    echo "| Python | $(python_versions) |"
    echo
    echo "| part | verdict | seconds | |"
    echo "| --- | --- | --- | --- |"
    cat "$scratch/verdicts"
    for part in "${wanted[@]}"; do
        if [[ -s $results/$part.md ]]; then
            printf '\n## %s\n\n' "$part"
            cat "$results/$part.md"
        fi
    done
} >"$results/summary.md"
echo "$results/summary.md"
exit "$failed"
