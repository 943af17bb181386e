//! The real program, as a user drives it.

mod program;

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;

use program::*;
use serde_json::Value;

// --- Help -----------------------------------------------------------------------------------------------------------

#[test]
fn help_lists_every_command_and_exit_code() {
    let folder = tempfile::tempdir().unwrap();
    let help = stdout(&succeeds(folder.path(), &["--help"]));
    for word in ["prepare", "train", "ablate", "eval", "predict", "export", "report", "doctor", "Exit codes:", "130"] {
        assert!(help.contains(word), "{word} is not in the help");
    }
    for command in ["prepare", "train", "ablate", "eval", "predict", "export", "report", "doctor"] {
        let help = stdout(&succeeds(folder.path(), &[command, "--help"]));
        assert!(help.contains("Examples:") && help.contains(&format!("segpeft-native {command}")), "{command}");
    }
    assert!(stdout(&succeeds(folder.path(), &["--version"])).contains(env!("CARGO_PKG_VERSION")));
}

#[test]
fn no_command_shows_the_help() {
    let output = run(tempfile::tempdir().unwrap().path(), &[]);
    assert_eq!(output.status.code(), Some(USAGE));
    assert!(stderr(&output).contains("ablate"));
    fails(tempfile::tempdir().unwrap().path(), &["--json"], USAGE, &["requires a subcommand", "ablate"]);
}

#[test]
fn a_reader_that_goes_away_causes_no_panic() {
    let folder = tempfile::tempdir().unwrap();
    for arguments in [&["train", "--help"][..], &["doctor"], &["doctor", "--json"]] {
        let (reader, writer) = std::io::pipe().expect("pipe");
        drop(reader);
        let output = program(folder.path(), arguments).stdout(writer).stderr(Stdio::piped()).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {:?}", output.status);
        assert_eq!(stderr(&output), "", "{arguments:?}");
    }
}

// --- Arguments ------------------------------------------------------------------------------------------------------

#[test]
fn values_out_of_range_are_refused_before_anything_is_read() {
    let folder = tempfile::tempdir().unwrap();
    // The data do not exist, so only a check up front can give the code for usage.
    for (flag, value) in [
        ("--rank", "0"),
        ("--rank", "1025"),
        ("--rank", "-4"),
        ("--lora-alpha", "0"),
        ("--lora-alpha", "inf"),
        ("--lora-alpha", "-1"),
        ("--lr", "0"),
        ("--lr", "nan"),
        ("--epochs", "0"),
        ("--batch-size", "0"),
        ("--grad-accum", "0"),
        ("--eval-batch-size", "0"),
        ("--size", "100"),
        ("--size", "8192"),
        ("--size", "0"),
        ("--lora-dropout", "1"),
        ("--drop-path", "-0.1"),
        ("--classifier-dropout", "1.5"),
        ("--warmup-ratio", "2"),
        ("--weight-decay", "-1"),
        ("--patience", "0"),
        ("--seed", "-1"),
        ("--targets", "query,,key"),
        ("--threads", "0"),
        ("--device", "gpu"),
        ("--hf-names", "6"),
        ("--method", "qlora"),
    ] {
        let arguments = ["train", "--data", "none", "--model", "random", "--out", "run", flag, value];
        fails(folder.path(), &arguments, USAGE, &[flag, value]);
    }
    for (flag, value) in
        [("--ranks", "4,0"), ("--ratios", "0"), ("--ratios", "1,nan"), ("--slice", "0/4"), ("--slice", "5/4")]
    {
        let arguments = ["ablate", "--data", "none", "--model", "random", "--out", "grid", flag, value];
        fails(folder.path(), &arguments, USAGE, &[flag]);
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "nothing was written");
}

#[test]
fn flags_that_do_not_go_together() {
    let folder = tempfile::tempdir().unwrap();
    let train = |more: &[&'static str]| {
        [&["train", "--data", "none", "--model", "random", "--out", "run", "--method", "fft"], more].concat()
    };
    fails(folder.path(), &train(&["--rank", "4"]), USAGE, &["--rank", "--method lora"]);
    fails(folder.path(), &train(&["--train-head"]), USAGE, &["--train-head", "--method lora"]);
    fails(folder.path(), &train(&["--adapter", "x"]), USAGE, &["--adapter", "export --merge"]);
    fails(folder.path(), &["train"], USAGE, &["--data", "--model", "--out"]);
    fails(folder.path(), &["ablate", "--out", "x"], USAGE, &["--data", "--model"]);
    fails(folder.path(), &["ablate", "--demo", "--data", "x"], USAGE, &["--demo", "--data"]);
    fails(folder.path(), &["eval", "--data", "d", "--model", "m", "--part", "val"], USAGE, &["--part", "--split"]);
    fails(folder.path(), &["export", "--model", "m", "--merge", "--out", "o"], USAGE, &["--adapter"]);
    fails(folder.path(), &["train", "-q", "-v"], USAGE, &["--quiet", "--verbose"]);
    fails(folder.path(), &["trian"], USAGE, &["trian", "train"]);
}

#[test]
fn an_unknown_run_lists_the_known() {
    let folder = tempfile::tempdir().unwrap();
    let grid = ["ablate", "--data", "none", "--model", "random", "--out", "grid", "--only", "lora_r5_alpha5"];
    fails(folder.path(), &grid, USAGE, &["lora_r5_alpha5", "segformer_fft_baseline", "lora_r64_alpha256"]);
}

#[test]
fn cuda_is_refused_clearly() {
    let folder = scratch();
    // More GPUs than any machine has, so that this holds on machines with one too.
    for device in ["cuda:99", "cuda:65535"] {
        let arguments = with("train", &["--out", "run", "--device", device]);
        fails(folder.path(), &arguments, DEVICE, &["use --device c"]);
    }
}

#[test]
fn missing_files_are_named() {
    let folder = scratch();
    let train = ["train", "--data", "nowhere.zip", "--model", "random", "--out", "run"];
    fails(folder.path(), &train, INPUT, &["nowhere.zip"]);
    let train = ["train", "--data", "data", "--model", "no-model", "--out", "run"];
    fails(folder.path(), &train, INPUT, &["no-model"]);
    for left in ["run", "cache"] {
        assert!(!folder.path().join(left).exists(), "{left}: nothing came of it");
    }
    fails(folder.path(), &["report", "nowhere"], INPUT, &["nowhere"]);
    fails(folder.path(), &["report", "data"], INPUT, &["data", "no finished run"]);
    fails(folder.path(), &["predict", "none.png", "--model", "m", "--out", "o"], INPUT, &["none.png"]);
    fails(folder.path(), &["export", "--adapter", "no-adapter", "--out", "o"], INPUT, &["no-adapter"]);
}

#[test]
fn an_unwritable_output_is_an_io_error() {
    let folder = scratch();
    std::fs::write(folder.path().join("file"), "").unwrap();
    fails(folder.path(), &with("train", &["--out", "file/run"]), IO, &["file/run"]);
    fails(folder.path(), &with("ablate", &["--out", "file/grid", "--cache", "cache"]), IO, &["file/grid"]);
}

#[test]
fn export_spares_a_folder_with_something_in_it() {
    let folder = scratch();
    fails(folder.path(), &["export", "--model", "m", "--out", "data"], USAGE, &["--out data", "not empty"]);
}

// --- Doctor ---------------------------------------------------------------------------------------------------------

#[test]
fn doctor_describes_the_machine() {
    let folder = tempfile::tempdir().unwrap();
    let text = stdout(&succeeds(folder.path(), &["doctor"]));
    for word in ["version", "cores", "memory", "CUDA backend"] {
        assert!(text.contains(word), "{text}");
    }
    let json: Value = serde_json::from_slice(&succeeds(folder.path(), &["doctor", "--json", "--threads", "1"]).stdout)
        .expect("one JSON document");
    assert_eq!(json["threads"], 1);
    assert!(json["cores"].as_u64() >= Some(1));
    // On machines with a GPU that can be used, and on those without.
    let works = json["cuda_backend"].as_bool().expect("the first GPU is tried");
    let notes: Vec<&str> = json["notes"].as_array().expect("notes").iter().filter_map(Value::as_str).collect();
    let says = |what: &str| notes.iter().any(|note| note.starts_with(what));
    assert_eq!((says("GPU 0 ("), says("no GPU in use: "), says("on a CPU, try")), (works, !works, !works), "{notes:?}");
}

#[test]
fn doctor_describes_the_device_that_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let cpu = succeeds(folder.path(), &["doctor", "--device", "cpu", "--json"]);
    let json: Value = serde_json::from_slice(&cpu.stdout).expect("JSON");
    assert!(json["cuda_backend"].is_null(), "no GPU is looked for: {json}");
    let missing = ["doctor", "--device", "cuda:99"];
    fails(folder.path(), &missing, DEVICE, &[]);
    // What to do about the first that is missing: a GPU of that number, any, or cuBLASLt.
    let text = stderr(&run(folder.path(), &missing));
    assert!(["use --device c", "LD_LIBRARY_PATH"].iter().any(|remedy| text.contains(remedy)), "{text}");
    fails(folder.path(), &["doctor", "--max-memory", "4"], USAGE, &["--max-memory", "--step"]);
}

/// What doctor counts for a step at 64 x 64.
fn counted(folder: &Path, step: &str, more: &[&str]) -> Value {
    let arguments =
        [&["doctor", "--step", step, "--traffic", "--size", "64", "--batch-size", "3", "--json"], more].concat();
    serde_json::from_slice(&succeeds(folder, &arguments).stdout).expect("JSON")
}

#[test]
fn doctor_counts_a_step_taken_apart() {
    let folder = tempfile::tempdir().unwrap();
    let json = counted(folder.path(), "eval", &["--apart"]);
    let rows = json["apart"].as_array().expect("an array");
    let names: Vec<&str> = rows.iter().filter_map(|row| row["without"].as_str()).collect();
    assert!(names.contains(&"mix_ffn") && !names.contains(&"mix_ffn_backward"), "{names:?}");
    let whole = json["work"].as_array().and_then(|work| work.last()?["read_bytes"].as_u64()).expect("a sum");
    for row in rows {
        assert!(row["bytes"].as_u64() > Some(whole) && row["launches"].as_u64() > Some(0), "{row}");
        // What a GPU tells.
        assert!(row["median_seconds"].is_null() && row["ratio"].is_null(), "{row}");
    }
    assert!(counted(folder.path(), "eval", &[])["apart"].as_array().is_some_and(Vec::is_empty));
    let step = ["doctor", "--step", "eval", "--size", "64", "--batch-size", "3", "--apart"];
    let text = stdout(&succeeds(folder.path(), &[&step[..], &["--traffic"]].concat()));
    let lines = text.lines().skip_while(|line| !line.starts_with("without ")).count();
    assert_eq!(lines, 1 + rows.len(), "{text}");
    fails(folder.path(), &[&step[..], &["--device", "cpu"]].concat(), USAGE, &["--apart", "--traffic"]);
}

#[test]
fn doctor_counts_what_a_step_asks_of_a_gpu() {
    let folder = tempfile::tempdir().unwrap();
    let gigabytes = |bytes: u64| format!("{}", bytes as f64 / 1e9);
    for step in ["fft", "lora", "eval"] {
        let whole = counted(folder.path(), step, &[]);
        let number = |json: &Value, name: &str| json[name].as_u64().expect("a number");
        let moved = |json: &Value| {
            let sum = json["work"].as_array().expect("kernels").last().expect("a sum");
            assert_eq!(sum["kernel"], "together");
            number(sum, "read_bytes") + number(sum, "written_bytes")
        };
        let (most, least) = (number(&whole, "memory_bytes"), number(&whole, "least_memory_bytes"));
        let parts: u64 = whole["memory"]["parts"].as_array().expect("parts").iter().map(|p| number(p, "bytes")).sum();
        assert_eq!((parts, whole["memory"]["activations_made_again"].as_bool()), (most, Some(false)));

        let bounded = counted(folder.path(), step, &["--max-memory", &gigabytes(least + 1000)]);
        let again = step != "eval";
        assert_eq!(bounded["memory"]["activations_made_again"], again, "{step}");
        assert_eq!((number(&bounded, "memory_bytes"), least < most), (least, again), "{step}");
        assert_eq!(moved(&bounded) > moved(&whole), again, "{step}");

        let step = ["doctor", "--step", step, "--traffic", "--size", "64", "--batch-size", "3"];
        let less = gigabytes(least - 1000);
        let refused = |limit| [&step[..], &["--max-memory", limit]].concat();
        fails(folder.path(), &refused(&less), DEVICE, &["--max-memory", "2 would fit: --batch-size 2"]);
        fails(folder.path(), &refused("0.0001"), DEVICE, &["100 kB may be used", "not even one fits: lower --size"]);
        let text = succeeds(folder.path(), &[&step[..], &["-v"]].concat());
        assert!(stdout(&text).contains("moved per image") && stdout(&text).contains("together"), "{}", stdout(&text));
        assert!(
            stderr(&text).contains("planned memory: ") && stderr(&text).contains("  weights "),
            "{}",
            stderr(&text)
        );
    }
}

#[test]
fn flags_that_would_do_nothing_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let step = |more: &[&'static str]| [&["doctor", "--step", "fft", "--size", "32"], more].concat();
    fails(folder.path(), &["doctor", "--traffic"], USAGE, &["--step"]);
    for other in [&["--profile"][..], &["--eager"], &["--steps", "3"], &["--device", "cpu"]] {
        fails(folder.path(), &step(&[&["--traffic"], other].concat()), USAGE, &["--traffic", other[0]]);
    }
    for flag in [&["--profile"][..], &["--eager"], &["--max-memory", "4"]] {
        let arguments = step(&[&["--device", "cpu"], flag].concat());
        fails(folder.path(), &arguments, USAGE, &[flag[0], "name a GPU"]);
    }
    let model = ["--data", "none", "--model", "m"];
    for command in [&["train", "--out", "o"][..], &["ablate", "--out", "o"], &["eval"]] {
        let arguments = [command, &model, &["--device", "cpu", "--max-memory", "4"]].concat();
        fails(folder.path(), &arguments, USAGE, &["--max-memory", "name a GPU"]);
    }
    let grid = |devices| [&["ablate", "--out", "o"], &model[..], &["--devices", devices, "--max-memory", "4"]].concat();
    fails(folder.path(), &grid("cpu"), USAGE, &["--max-memory"]);
    let export = |more: &[&'static str]| [&["export", "--out", "o", "--model"], more].concat();
    fails(folder.path(), &export(&["m", "--seed", "1"]), USAGE, &["--seed", "--model random"]);
    fails(folder.path(), &export(&["random", "--adapter", "a", "--seed", "1"]), USAGE, &["--seed"]);
    fails(folder.path(), &export(&["m", "--adapter", "a"]), USAGE, &["--model", "--merge"]);
    for devices in ["auto,auto", "0,auto", "0,x"] {
        fails(folder.path(), &grid(devices), USAGE, &["--devices", "numbers of GPUs"]);
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "nothing was written");
}

#[test]
fn doctor_times_steps() {
    let folder = tempfile::tempdir().unwrap();
    for step in ["fft", "lora", "eval"] {
        let arguments = ["doctor", "--json", "--step", step, "--size", "32", "--batch-size", "1", "--steps", "3"];
        let json: Value = serde_json::from_slice(&succeeds(folder.path(), &arguments).stdout).expect("JSON");
        assert_eq!(json["seconds"].as_array().map(Vec::len), Some(3));
        assert!(json["images_per_second"].as_f64() > Some(0.0));
    }
}

// --- Training -------------------------------------------------------------------------------------------------------

#[test]
fn one_run_leaves_what_it_should_and_is_kept() {
    let folder = scratch();
    let arguments = with("train", &["--rank", "4", "--out", "runs/r4"]);
    let first = succeeds(folder.path(), &[&arguments[..], &["-v"]].concat());
    assert!(stdout(&first).contains("Dice") && stdout(&first).contains("results: runs/r4"), "{}", stdout(&first));
    let text = stderr(&first);
    assert!(!text.contains('\r') && !text.contains('\u{1b}'), "plain where there is no terminal: {text:?}");
    assert!(text.contains("adapters of rank 4, alpha 8 sit on:") && text.contains("epoch 2/2"), "{text}");
    let planned = text.find("planned memory: ").expect("shown with -v");
    assert!(text[planned..].contains("  activations ") && planned < text.find("epoch 1/2").expect("trains"), "{text}");
    let run = folder.path().join("runs/r4");
    for file in [
        "run_config.json",
        "train.txt",
        "val.txt",
        "all_metrics.json",
        "training_history.csv",
        "r4_results.zip",
        "final",
    ] {
        assert!(run.join(file).exists(), "{file} is missing");
    }
    let config: Value = serde_json::from_slice(&std::fs::read(run.join("run_config.json")).unwrap()).unwrap();
    assert_eq!(config["options"]["method"]["alpha"], Value::from(8.0), "twice the rank");
    assert_eq!(config["options"]["epochs"], Value::from(2));

    let metrics = std::fs::read(run.join("all_metrics.json")).unwrap();
    let again = succeeds(folder.path(), &arguments);
    assert!(stderr(&again).contains("kept"), "{}", stderr(&again));
    assert_eq!(std::fs::read(run.join("all_metrics.json")).unwrap(), metrics);

    let other = with("train", &["--rank", "4", "--out", "runs/r4", "--lr", "0.01"]);
    fails(folder.path(), &[&other[..], &["-q"]].concat(), USAGE, &["runs/r4", "lr 0.0005 there, 0.01 here", "--out"]);
    let quiet = succeeds(folder.path(), &[&arguments[..], &["--quiet", "--json"]].concat());
    assert_eq!(stderr(&quiet), "");
    let json: Value = serde_json::from_slice(&quiet.stdout).expect("one JSON document");
    assert_eq!(json["name"], "r4");
    assert!(json["training_history"].is_array());
}

#[test]
fn two_processes_never_write_one_run() {
    let folder = scratch();
    let run = folder.path().join("runs/one");
    std::fs::create_dir_all(&run).unwrap();
    let lock = File::create(run.join(".lock")).unwrap();
    lock.lock().unwrap();
    std::fs::write(run.join(".lock"), "4242").unwrap();
    fails(folder.path(), &with("train", &["--out", "runs/one", "-q"]), BUSY, &["runs/one", "process 4242", "--out"]);
    drop(lock);
    succeeds(folder.path(), &with("train", &["--out", "runs/one"]));
}

#[test]
fn an_interrupted_run_continues() {
    let folder = scratch();
    let mut arguments = with("train", &["--out", "runs/long", "--patience", "40"]);
    let epochs = arguments.iter().position(|argument| *argument == "--epochs").expect("--epochs") + 1;
    arguments[epochs] = "40";
    let child = program(folder.path(), &arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let run = folder.path().join("runs/long");
    wait_until("the first epoch is done", || run.join("training_history.csv").exists());
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(INTERRUPTED), "{}", stderr(&output));
    let text = stderr(&output);
    assert!(text.lines().last().unwrap().contains("the same command continues"), "{text}");
    assert!(!run.join("all_metrics.json").exists());
    assert!(run.join("Dice_over_Epochs.png").exists());
    succeeds(folder.path(), &arguments);
    assert!(run.join("all_metrics.json").exists());
}

#[test]
fn a_second_interrupt_ends_the_program_at_once() {
    let folder = scratch();
    // Packing the data waits for this lock, which never asks whether it was interrupted.
    std::fs::create_dir(folder.path().join("cache")).unwrap();
    let lock = File::create(folder.path().join("cache/.lock")).unwrap();
    lock.lock().unwrap();
    let arguments = with("train", &["--out", "run", "--cache", "cache", "-v"]);
    let mut child = program(folder.path(), &arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
    assert!(lines.any(|line| line.contains("waiting for")));
    interrupt(&child);
    assert!(lines.any(|line| line.contains("once more")));
    interrupt(&child);
    assert_eq!(child.wait().unwrap().code(), Some(INTERRUPTED));
}

#[test]
fn a_diverged_run_has_its_own_exit_code() {
    let folder = scratch();
    fails(folder.path(), &with("train", &["--out", "runs/wild", "--lr", "1e30", "-q"]), DIVERGED, &["wild"]);
    assert!(folder.path().join("runs/wild/run_error.json").exists());
    assert!(!folder.path().join("runs/wild/all_metrics.json").exists());
}

// --- The grid -------------------------------------------------------------------------------------------------------

const SMALL_GRID: [&str; 6] = ["--out", "grid", "--ranks", "2,4", "--ratios", "1"];

fn grid<'a>(more: &[&'a str]) -> Vec<&'a str> {
    with("ablate", &[&SMALL_GRID[..], more].concat())
}

#[test]
fn a_grid_runs_in_parts_and_ends_in_one_summary() {
    let folder = scratch();
    let out = folder.path().join("grid");
    succeeds(folder.path(), &grid(&["--slice", "1/2"]));
    assert!(out.join("segformer_fft_baseline/all_metrics.json").exists());
    assert!(!out.join("lora_r2_alpha2").exists(), "belongs to part 2");
    let second = stderr(&succeeds(folder.path(), &grid(&["--slice", "2/2"])));
    assert_eq!(second.matches("adapters of rank r sit on:").count(), 1, "{second}");
    assert!(second.contains("[1/1] lora_r2_alpha2: Dice") && second.contains("1 run done"), "{second}");
    let none = stderr(&succeeds(folder.path(), &grid(&["--slice", "4/4"])));
    assert!(none.contains("no run to do: none of the grid's 3 is in this part (--slice, --only)"), "{none}");
    let whole = succeeds(folder.path(), &grid(&["--json"]));
    assert_eq!(stderr(&whole).matches("kept").count(), 3, "{}", stderr(&whole));
    let json: Value = serde_json::from_slice(&whole.stdout).expect("one JSON document");
    assert_eq!(json["runs"].as_array().map(Vec::len), Some(3));
    assert_eq!(json["page"], "grid/index.html");
    for file in ["summary.csv", "summary.json", "summary.md", "index.html", "train.txt", "val.txt"] {
        assert!(out.join(file).exists(), "{file} is missing");
    }
    let lists =
        ["segformer_fft_baseline", "lora_r2_alpha2"].map(|run| std::fs::read(out.join(run).join("val.txt")).unwrap());
    assert_eq!(lists[0], lists[1], "one split for all runs");

    std::fs::remove_file(out.join("index.html")).unwrap();
    let report = stdout(&succeeds(folder.path(), &["report", "grid"]));
    assert!(report.contains("lora_r4_alpha4") && report.contains("page: grid/index.html"), "{report}");
    assert!(out.join("index.html").exists());
    fails(folder.path(), &["report", "grid/lora_r4_alpha4"], INPUT, &["one run"]);
    fails(folder.path(), &grid(&["--seed", "7", "-q"]), USAGE, &["seed 42 there, 7 here", "--out"]);
    assert!(!stderr(&whole).contains("warning"), "{}", stderr(&whole));

    // A run that is not one of this grid's, under other settings.
    let stranger = grid(&["--ranks", "8", "--only", "lora_r8_alpha8", "--lr", "0.01", "-q"]);
    let differ = "fair comparison: lr 0.0005, 0.01";
    let first = stderr(&succeeds(folder.path(), &stranger));
    assert_eq!((first.matches(differ).count(), first.lines().count()), (2, 2), "before and after training: {first}");
    assert_eq!(stderr(&succeeds(folder.path(), &stranger)).lines().count(), 1, "nothing is left to train");
    let report = stderr(&succeeds(folder.path(), &["report", "grid"]));
    assert_eq!(report.matches(differ).count(), 1, "{report}");
    for file in ["summary.json", "summary.md", "index.html"] {
        let text = std::fs::read_to_string(out.join(file)).unwrap();
        assert!(text.contains("These runs were trained under different settings") && text.contains(differ), "{file}");
    }
}

#[test]
fn devices_share_a_grid_and_change_no_result() {
    let (alone, shared) = (scratch(), scratch());
    succeeds(alone.path(), &grid(&["--device", "cpu"]));
    let said = stderr(&succeeds(shared.path(), &grid(&["--devices", "cpu,cpu", "-v"])));
    assert!(said.contains("3 runs done") && !said.contains("waiting for"), "{said}");
    for file in ["segformer_fft_baseline/final/model.safetensors", "lora_r4_alpha4/final/adapter_model.safetensors"] {
        let read = |folder: &tempfile::TempDir| std::fs::read(folder.path().join("grid").join(file)).expect(file);
        assert!(read(&alone) == read(&shared), "{file} differs");
    }
}

#[test]
fn the_notebooks_protocol_draws_a_split_for_each_run() {
    let folder = scratch();
    succeeds(folder.path(), &grid(&["--protocol", "notebook"]));
    let out = folder.path().join("grid");
    let lists =
        ["segformer_fft_baseline", "lora_r2_alpha2"].map(|run| std::fs::read(out.join(run).join("train.txt")).unwrap());
    assert_ne!(lists[0], lists[1]);
    assert!(!out.join("train.txt").exists());
}

#[test]
fn a_busy_run_is_left_to_its_holder() {
    let folder = scratch();
    let run = folder.path().join("grid/lora_r2_alpha2");
    std::fs::create_dir_all(&run).unwrap();
    let lock = File::create(run.join(".lock")).unwrap();
    lock.lock().unwrap();
    let output = succeeds(folder.path(), &grid(&["--no-fft", "--json"]));
    let text = stderr(&output);
    assert!(text.contains("skipped: grid/lora_r2_alpha2: in use by") && !text.contains("another --out"), "{text}");
    let json: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!((&json["busy"][0], &json["runs"][0]["name"]), (&"lora_r2_alpha2".into(), &"lora_r4_alpha4".into()));
}

#[test]
fn a_failed_run_does_not_stop_the_others() {
    let folder = scratch();
    let output = run(folder.path(), &grid(&["--lr", "1e30"]));
    assert_eq!(output.status.code(), Some(DIVERGED), "{}", stderr(&output));
    let text = stderr(&output);
    let warnings: Vec<&str> = text.lines().filter(|line| line.starts_with("warning: ")).collect();
    let goes_on = |line: &&str| line.ends_with("; the other runs go on");
    assert_eq!((warnings.len(), warnings.iter().filter(|line| goes_on(line)).count()), (3, 2), "{text}");
    assert!(warnings[0].starts_with("warning: [1/3] segformer_fft_baseline: "), "{text}");
    let last = text.lines().last().unwrap_or_default();
    for name in ["segformer_fft_baseline", "lora_r2_alpha2", "lora_r4_alpha4"] {
        assert!(last.contains(name), "{text}");
        assert!(folder.path().join("grid").join(name).join("run_error.json").exists(), "{name}");
    }
}

#[test]
fn a_summary_that_cannot_be_written_is_told_at_once_and_stops_the_grid() {
    let folder = scratch();
    let way = folder.path().join("g/summary.csv");
    std::fs::create_dir_all(way.join("in the way")).unwrap();
    let arguments = with("ablate", &["--out", "g", "--ranks", "2", "--ratios", "1,2,4"]);
    let output = run(folder.path(), &arguments);
    assert_eq!(output.status.code(), Some(IO), "{}", stderr(&output));
    assert!(stderr(&output).contains("summary.csv") && stderr(&output).contains("then the grid stops"));
    std::fs::remove_dir_all(&way).unwrap();
    succeeds(folder.path(), &arguments);
    assert!(way.is_file());
}

#[test]
fn an_interrupted_grid_keeps_what_is_finished() {
    let folder = scratch();
    let arguments = grid(&[]);
    let child = program(folder.path(), &arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let out = folder.path().join("grid");
    wait_until("the second run has begun", || out.join("lora_r2_alpha2/run_config.json").exists());
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(INTERRUPTED), "{}", stderr(&output));
    assert!(out.join("summary.csv").exists(), "the finished run is in the summary");
    let again = succeeds(folder.path(), &arguments);
    assert!(stderr(&again).contains("segformer_fft_baseline: finished before, kept"), "{}", stderr(&again));
}

#[test]
fn the_demo_needs_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let arguments = ["ablate", "--demo", "--size", "32", "--epochs", "1", "--ranks", "4", "--ratios", "2"];
    let output = succeeds(folder.path(), &arguments);
    let text = stdout(&output);
    assert!(text.contains("lora_r4_alpha8") && text.contains("page: segpeft-demo/index.html"), "{text}");
    assert!(!text.contains("source-model"), "the model that was adapted is no row of the table");
    assert!(folder.path().join("segpeft-demo/demo/source-model/final").exists());
}

// --- Using a model --------------------------------------------------------------------------------------------------

#[test]
fn a_trained_adapter_is_evaluated_merged_and_used() {
    let folder = scratch();
    succeeds(
        folder.path(),
        &[
            "train",
            "--data",
            "data",
            "--model",
            "random",
            "--size",
            "32",
            "--epochs",
            "1",
            "--batch-size",
            "4",
            "--method",
            "fft",
            "--out",
            "runs/base",
        ],
    );
    let on_base: Vec<&str> = with("train", &["--out", "runs/r2", "--rank", "2"])
        .into_iter()
        .map(|a| if a == "random" { "runs/base/final" } else { a })
        .collect();
    succeeds(folder.path(), &on_base);
    let adapted = ["--model", "runs/base/final", "--adapter", "runs/r2/final"];
    let eval = |model: &[&str]| -> Value {
        let arguments = [&["eval", "--data", "data", "--split", "runs/r2", "--json"], model].concat();
        serde_json::from_slice(&succeeds(folder.path(), &arguments).stdout).expect("JSON")
    };
    let with_adapter = eval(&adapted);
    let record: Value =
        serde_json::from_slice(&std::fs::read(folder.path().join("runs/r2/all_metrics.json")).unwrap()).unwrap();
    let close = |a: &Value, b: &Value| (a.as_f64().unwrap() - b.as_f64().unwrap()).abs() < 1e-5;
    assert!(close(&with_adapter["eval_loss"], &record["final_evaluation"]["eval_loss"]), "{with_adapter} {record}");

    succeeds(folder.path(), &[&["export", "--merge", "--out", "merged"], &adapted[..]].concat());
    assert!(close(&eval(&["--model", "merged"])["eval_loss"], &with_adapter["eval_loss"]));
    succeeds(folder.path(), &["export", "--adapter", "runs/r2/final", "--hf-names", "5", "--out", "five"]);
    assert!(close(
        &eval(&["--model", "runs/base/final", "--adapter", "five"])["eval_loss"],
        &with_adapter["eval_loss"]
    ));

    let predict =
        [&["predict", "data/images", "--out", "predictions", "--save-logits", "logits.safetensors"], &adapted[..]]
            .concat();
    succeeds(folder.path(), &predict);
    let mask = image::open(folder.path().join("predictions/masks/p03.png")).expect("mask").to_luma8();
    assert_eq!(mask.dimensions(), (48, 40), "the picture's own size");
    assert!(mask.pixels().all(|pixel| [0, 255].contains(&pixel.0[0])));
    let overlay = image::open(folder.path().join("predictions/overlays/p03.png")).expect("overlay");
    assert_eq!((overlay.width(), overlay.height()), (48, 40));
    let bytes = std::fs::read(folder.path().join("logits.safetensors")).expect("logits");
    let tensors = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
    assert_eq!(tensors.len(), 12);
    assert_eq!(tensors.tensor("p03").expect("by stem").shape(), [2, 8, 8], "the size it was trained on");

    for exported in ["merged", "five"] {
        let text = std::fs::read(folder.path().join(exported).join("preprocessor_config.json")).expect(exported);
        let size = &serde_json::from_slice::<Value>(&text).expect("JSON")["size"];
        assert_eq!((&size["height"], &size["width"]), (&32.into(), &32.into()), "{exported}");
    }
    let foreign = |model| {
        let arguments = ["eval", "--data", "data", "--model", model, "--adapter", "runs/r2/final"];
        stderr(&succeeds(folder.path(), &arguments)).contains("was trained on another model than")
    };
    assert!(foreign("merged") && !foreign("runs/base/final"));
    let other = ["eval", "--data", "data", "--size", "64", "--model", "merged"];
    assert!(stderr(&succeeds(folder.path(), &other)).contains("trained on images of 32 x 32, these are 64 x 64"));

    std::fs::write(folder.path().join("data/images/p03.png"), "no picture").unwrap();
    let output = run(folder.path(), &predict);
    assert_eq!(output.status.code(), Some(INPUT));
    let text = stderr(&output);
    assert!(text.contains("warning: data/images/p03.png: neither JPEG nor PNG"), "{text}");
    assert_eq!(text.lines().last(), Some("error: 1 of 12 pictures could not be read"));
    assert!(stdout(&output).contains("11") && folder.path().join("predictions/masks/p11.png").exists());
    assert!(!folder.path().join("predictions/masks/p03.png").exists());
}

#[test]
fn an_adapter_on_random_weights_finds_its_model() {
    let folder = scratch();
    let output = succeeds(folder.path(), &with("train", &["--out", "run", "--rank", "2", "--seed", "7"]));
    let remedy = "export --model random --seed 7 --out DIR";
    assert!(stderr(&output).contains(remedy), "{}", stderr(&output));
    let merge = ["export", "--model", "random", "--adapter", "run/final", "--merge", "--out", "m"];
    fails(folder.path(), &merge, USAGE, &["--seed"]);
    let export: Vec<&str> = remedy.split(' ').map(|word| if word == "DIR" { "base" } else { word }).collect();
    succeeds(folder.path(), &export);
    let eval = ["eval", "--data", "data", "--split", "run", "--model", "base", "--adapter", "run/final", "--json"];
    let row: Value = serde_json::from_slice(&succeeds(folder.path(), &eval).stdout).expect("JSON");
    let record = std::fs::read(folder.path().join("run/all_metrics.json")).expect("record");
    let record: Value = serde_json::from_slice(&record).expect("JSON");
    let loss = |row: &Value| row["eval_loss"].as_f64().expect("a loss");
    assert!((loss(&row) - loss(&record["final_evaluation"])).abs() < 1e-5, "{row} {record}");
}

#[test]
fn prepare_packs_a_folder_that_trains() {
    let folder = scratch();
    let output = succeeds(folder.path(), &["prepare", "data", "--out", "p.pack", "--size", "32", "--json"]);
    let json: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!((&json["images"], &json["size"]), (&12.into(), &32.into()));
    let train: Vec<&str> =
        ["train", "--data", "p.pack", "--model", "random", "--epochs", "1", "--batch-size", "4", "--out", "run"].into();
    succeeds(folder.path(), &train);
    assert!(!folder.path().join("cache").exists(), "a packed file needs no cache");
    let text = stdout(&succeeds(folder.path(), &["prepare", "data", "--out", "p.pack", "--size", "32"]));
    let share = format!("{:.1} % of the pixels", 100.0 * json["foreground"].as_f64().unwrap());
    assert!(text.contains(&share) && text.contains("53 kB"), "{text}");
}
