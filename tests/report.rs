//! The files of a run and of a grid: complete, exact, whole, and safe for odd records.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::Path;

use segpeft_native::error::Kind;
use segpeft_native::report;
use segpeft_native::train::options::{LoraOptions, Method};
use segpeft_native::train::record::{ExtraMetrics, HistoryRow, RunRecord};

const NOTEBOOK: &str = "loss,grad_norm,learning_rate,epoch,step,eval_loss,eval_mean_iou,eval_mean_dice,eval_accuracy,\
    eval_runtime,eval_samples_per_second,eval_steps_per_second,train_runtime,train_samples_per_second,\
    train_steps_per_second,total_flos,train_loss";

fn evaluation(epoch: f64, dice: f64) -> HistoryRow {
    HistoryRow {
        epoch,
        step: epoch as u64 * 4,
        eval_loss: Some(1.0 - dice),
        eval_mean_iou: Some(dice * dice),
        eval_mean_dice: Some(dice),
        eval_accuracy: Some(0.1 + 0.2),
        eval_runtime: Some(16.7471),
        extra: Some(ExtraMetrics {
            eval_dice_per_class: vec![Some(0.97), Some(2.0 * dice - 0.97)],
            eval_iou_per_class: vec![Some(0.94), Some(1.0 / 3.0)],
            eval_accuracy_per_class: vec![Some(0.99), Some(0.8)],
            eval_image_mean_dice: 0.75,
            eval_image_mean_iou: 0.625,
            eval_notebook_mean_iou: Some(0.4375),
            eval_notebook_accuracy: Some(0.875),
        }),
        ..Default::default()
    }
}

fn record(name: &str, lora: Option<(usize, f64)>, dice: f64) -> RunRecord {
    let mut history = Vec::new();
    for epoch in 1..=6 {
        let epoch = f64::from(epoch);
        history.push(HistoryRow {
            loss: Some(1.0 / (epoch + 0.1)),
            grad_norm: Some(1e-7 / 3.0),
            learning_rate: Some(7.5e-5),
            epoch,
            step: epoch as u64 * 4,
            ..Default::default()
        });
        history.push(evaluation(epoch, dice * (1.0 - 0.5 / epoch)));
    }
    history.push(HistoryRow {
        epoch: 6.0,
        step: 24,
        train_runtime: Some(100.0),
        total_flos: Some(6.96822943186944e17),
        train_loss: Some(0.4),
        ..Default::default()
    });
    history.push(evaluation(6.0, dice));
    RunRecord {
        name: name.into(),
        method: lora.map_or(Method::Fft, |(rank, alpha)| {
            Method::Lora(LoraOptions { rank, alpha, dropout: 0.0, targets: vec!["query".into()], train_head: false })
        }),
        trainable_parameters: lora.map_or(3_714_658, |(rank, _)| 8192 * rank as u64),
        total_parameters: 3_714_658 + lora.map_or(0, |(rank, _)| 8192 * rank as u64),
        best_epoch: 6,
        training_time: 123.456,
        final_evaluation: evaluation(6.0, dice),
        final_evaluation_train: evaluation(6.0, dice),
        training_history: history,
    }
}

/// Writes the runs into their folders under `out`, as training does.
fn finish(out: &Path, records: &[RunRecord]) {
    for record in records {
        let dir = out.join(&record.name);
        fs::create_dir_all(&dir).unwrap();
        report::run::finish(&dir, record).unwrap();
    }
}

fn grid() -> Vec<RunRecord> {
    vec![
        record("lora_r16_alpha16", Some((16, 16.0)), 0.88),
        record("lora_r4_alpha16", Some((4, 16.0)), 0.86),
        record("lora_r4_alpha4", Some((4, 4.0)), 0.80),
        record("segformer_fft_baseline", None, 0.90),
    ]
}

fn picture(path: &Path) -> image::RgbImage {
    image::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())).into_rgb8()
}

/// Pixels within a little of a colour.
fn count(picture: &image::RgbImage, colour: [u8; 3]) -> usize {
    picture.pixels().filter(|p| p.0.iter().zip(colour).all(|(a, b)| a.abs_diff(b) < 12)).count()
}

fn temporary_files(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    names.filter(|n| n.ends_with(".tmp")).collect()
}

#[test]
fn history_has_the_notebooks_columns_and_every_digit() {
    let dir = tempfile::tempdir().unwrap();
    let run = record("lora_r4_alpha4", Some((4, 4.0)), 0.8491);
    report::run::write_history(dir.path(), &run.training_history).unwrap();
    let text = fs::read_to_string(dir.path().join("training_history.csv")).unwrap();
    let header: Vec<&str> = text.lines().next().unwrap().split(',').collect();
    assert_eq!(header[..17].join(","), NOTEBOOK);
    assert_eq!(
        header[17..].join(","),
        "eval_dice_class0,eval_dice_class1,eval_iou_class0,eval_iou_class1,eval_accuracy_class0,eval_accuracy_class1,\
         eval_image_mean_dice,eval_image_mean_iou,eval_notebook_mean_iou,eval_notebook_accuracy"
    );
    assert_eq!(text.lines().count(), run.training_history.len() + 1);
    for (line, row) in text.lines().skip(1).zip(&run.training_history) {
        let cells: BTreeMap<&str, &str> = header.iter().copied().zip(line.split(',')).collect();
        assert_eq!(line.split(',').count(), header.len());
        let exact = |name: &str, value: Option<f64>| match value {
            None => assert_eq!(cells[name], "", "{name}"),
            Some(v) => assert_eq!(cells[name].parse::<f64>().unwrap().to_bits(), v.to_bits(), "{name}"),
        };
        exact("loss", row.loss);
        exact("grad_norm", row.grad_norm);
        exact("learning_rate", row.learning_rate);
        exact("epoch", Some(row.epoch));
        assert_eq!(cells["step"].parse::<u64>().unwrap(), row.step);
        exact("eval_loss", row.eval_loss);
        exact("eval_mean_iou", row.eval_mean_iou);
        exact("eval_mean_dice", row.eval_mean_dice);
        exact("eval_accuracy", row.eval_accuracy);
        exact("eval_runtime", row.eval_runtime);
        exact("train_runtime", row.train_runtime);
        exact("total_flos", row.total_flos);
        exact("train_loss", row.train_loss);
        let extra = row.extra.as_ref();
        exact("eval_dice_class1", extra.and_then(|e| e.eval_dice_per_class[1]));
        exact("eval_iou_class1", extra.and_then(|e| e.eval_iou_per_class[1]));
        exact("eval_image_mean_dice", extra.map(|e| e.eval_image_mean_dice));
        exact("eval_notebook_accuracy", extra.and_then(|e| e.eval_notebook_accuracy));
    }
}

#[test]
fn plots_of_a_run_show_their_lines() {
    let dir = tempfile::tempdir().unwrap();
    let run = record("lora_r4_alpha4", Some((4, 4.0)), 0.85);
    report::run::draw(dir.path(), &run.name, &[]).unwrap();
    let empty = picture(&dir.path().join("Dice_over_Epochs.png"));
    report::run::draw(dir.path(), &run.name, &run.training_history).unwrap();
    let dice = picture(&dir.path().join("Dice_over_Epochs.png"));
    let losses = picture(&dir.path().join("Losses_over_Epochs.png"));
    assert_eq!(dice.dimensions(), (960, 640));
    let (blue, green, orange) = ([31, 99, 181], [0, 134, 96], [214, 94, 0]);
    assert!(count(&dice, blue) > 1000 && count(&dice, green) > 1000);
    assert!(count(&losses, blue) > 1000 && count(&losses, orange) > 700);
    assert!(count(&empty, blue) < 200, "only the legend shows the colour");
    // Numbers that are not finite have no place, and do no harm.
    let mut broken = run.training_history.clone();
    broken[1].eval_loss = Some(f64::NAN);
    broken[3].eval_mean_dice = Some(f64::INFINITY);
    report::run::draw(dir.path(), &run.name, &broken).unwrap();
    assert!(count(&picture(&dir.path().join("Losses_over_Epochs.png")), blue) > 1000);
    assert_eq!(temporary_files(dir.path()), [""; 0]);
}

#[test]
fn a_record_survives_the_disk_bit_for_bit() {
    let out = tempfile::tempdir().unwrap();
    finish(out.path(), &grid());
    let read = report::read_records(out.path()).unwrap();
    let names: Vec<_> = read.iter().map(|r| r.name.as_str()).collect();
    assert_eq!(names, ["segformer_fft_baseline", "lora_r4_alpha4", "lora_r4_alpha16", "lora_r16_alpha16"]);
    for run in grid() {
        assert_eq!(*read.iter().find(|r| r.name == run.name).unwrap(), run);
    }
    let path = out.path().join("lora_r4_alpha4/all_metrics.json");
    let json: serde_json::Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    assert!(json["training_history"].is_array());
    assert_eq!(json["final_evaluation"]["eval_mean_dice"], 0.80);
    assert_eq!(json["training_time"], 123.456);
}

#[test]
fn the_archive_holds_results_and_nothing_in_passing() {
    let out = tempfile::tempdir().unwrap();
    let run = record("lora_r4_alpha4", Some((4, 4.0)), 0.8);
    let dir = out.path().join(&run.name);
    for (path, bytes) in [
        ("final/adapter_model.safetensors", "weights"),
        ("checkpoint-24/adapter_model.safetensors", "weights"),
        ("checkpoint-24/optimizer.safetensors", "moments"),
        ("config.json", "{}"),
        ("run.lock", ""),
        (".hidden", ""),
        ("final/.model.12.tmp", ""),
        ("old_results.zip", "old"),
        ("all_metrics.json", "of an earlier run"),
    ] {
        let path = dir.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    report::run::finish(&dir, &run).unwrap();
    // A second time, the first archive must not be packed into the second.
    report::run::finish(&dir, &run).unwrap();
    let mut zip = zip::ZipArchive::new(fs::File::open(dir.join("lora_r4_alpha4_results.zip")).unwrap()).unwrap();
    let mut names: Vec<String> = zip.file_names().map(|n| n.unwrap().into_owned()).collect();
    names.sort();
    let expected = [
        "Dice_over_Epochs.png",
        "Losses_over_Epochs.png",
        "all_metrics.json",
        "checkpoint-24/adapter_model.safetensors",
        "config.json",
        "final/adapter_model.safetensors",
        "training_history.csv",
    ];
    assert_eq!(names, expected.map(|n| format!("lora_r4_alpha4/{n}")));
    let mut inside = Vec::new();
    zip.by_name("lora_r4_alpha4/all_metrics.json").unwrap().read_to_end(&mut inside).unwrap();
    assert_eq!(inside, fs::read(dir.join("all_metrics.json")).unwrap());
}

#[test]
fn the_grid_answers_the_question() {
    let out = tempfile::tempdir().unwrap();
    report::grid::write(out.path(), &grid(), Some("These runs were not equal.".into())).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&fs::read(out.path().join("summary.json")).unwrap()).unwrap();
    assert_eq!(
        json["headline"],
        "LoRA keeps 97.8 % of full fine-tuning's Dice (0.8800 of 0.9000) at r = 16, α = 16, training 3.4 % of the \
         parameters."
    );
    assert_eq!(json["remarks"][0], "These runs were not equal.");
    assert_eq!(json["best_lora"], "lora_r16_alpha16");
    assert_eq!(json["fft"], "segformer_fft_baseline");
    assert_eq!(json["runs"][1]["percent_of_fft_dice"].as_f64().unwrap(), 100.0 * 0.80 / 0.90);

    let csv = fs::read_to_string(out.path().join("summary.csv")).unwrap();
    let lines: Vec<&str> = csv.lines().collect();
    assert_eq!(lines.len(), 5);
    assert!(lines[1].starts_with("segformer_fft_baseline,fft,,,,3714658,100.0,0.9,"), "{}", lines[1]);
    assert!(lines[3].starts_with("lora_r4_alpha16,lora,4,16.0,4.0,32768,"), "{}", lines[3]);

    let markdown = fs::read_to_string(out.path().join("summary.md")).unwrap();
    assert!(markdown.contains("parameters.\n\n- These runs were not equal.\n"), "{markdown}");
    assert!(markdown.contains(
        "| **lora_r16_alpha16** | **16** | **16** | **1** | **131,072** | **3.41** | **0.8800** | **97.8** |"
    ));
    let columns = |line: &str| line.matches('|').count();
    let table: Vec<&str> = markdown.lines().filter(|l| l.starts_with('|')).collect();
    assert_eq!(table.len(), 6);
    assert!(table.iter().all(|l| columns(l) == columns(table[0])));

    for (name, colours) in [
        ("dice_vs_training_time.png", vec![[190, 30, 45], [128, 64, 196], [24, 108, 204]]),
        ("lora_alpha_vs_dice.png", vec![[190, 30, 45], [128, 64, 196]]),
        ("epochs_vs_dice.png", vec![[190, 30, 45], [31, 99, 181]]),
        ("epochs_vs_loss.png", vec![[190, 30, 45], [31, 99, 181]]),
    ] {
        let figure = picture(&out.path().join(name));
        assert_eq!(figure.dimensions(), (1440, 960));
        for colour in colours {
            assert!(count(&figure, colour) > 250, "{name} lacks {colour:?}");
        }
    }
    let page = fs::read_to_string(out.path().join("index.html")).unwrap();
    assert!(page.contains("<ul>\n<li>These runs were not equal.</li>"));
    for part in ["LoRA keeps 97.8&nbsp;%", "lora_alpha_vs_dice.png", "href=\"lora_r4_alpha16/training_history.csv\""] {
        assert!(page.contains(part), "the page lacks {part}");
    }
    for foreign in ["http://", "https://", "<script"] {
        assert!(!page.contains(foreign), "the page is not self-contained: {foreign}");
    }
    assert_eq!(page.matches("class=\"none\"").count(), 1, "r = 16 was not run at alpha/r = 4");
    assert_eq!(temporary_files(out.path()), [""; 0]);
}

#[test]
fn incomplete_grids_are_reported_as_far_as_they_go() {
    let all = grid();
    let mut unmeasured = record("lora_r8_alpha8", Some((8, 8.0)), 0.5);
    unmeasured.final_evaluation.eval_mean_dice = Some(f64::NAN);
    unmeasured.final_evaluation.extra = None;
    unmeasured.training_history.clear();
    unmeasured.training_time = f64::NAN;
    unmeasured.total_parameters = 0;
    let odd = record("a|b, \"<i>\" & 100%", Some((0, -1.0)), 0.4);
    for (runs, says) in [
        (vec![all[3].clone()], "no LoRA run has finished"),
        (vec![all[0].clone()], "no full fine-tuning run"),
        (vec![unmeasured.clone()], "No run has finished"),
        (vec![unmeasured, all[3].clone()], "no LoRA run has finished"),
        (vec![odd, all[3].clone()], "LoRA keeps 44.4 %"),
    ] {
        let out = tempfile::tempdir().unwrap();
        report::grid::write(out.path(), &runs, None).unwrap();
        let markdown = fs::read_to_string(out.path().join("summary.md")).unwrap();
        assert!(markdown.contains(says), "{markdown}");
        let page = fs::read_to_string(out.path().join("index.html")).unwrap();
        for bad in ["NaN", "inf", "<i>", "href=\"a|b"] {
            assert!(!page.contains(bad) && !markdown.contains("NaN"), "the page of {says:?} says {bad}");
        }
        serde_json::from_slice::<serde_json::Value>(&fs::read(out.path().join("summary.json")).unwrap()).unwrap();
    }
}

#[test]
fn bad_records_and_folders_end_in_one_line() {
    let out = tempfile::tempdir().unwrap();
    finish(out.path(), &grid()[..1]);
    let bad = out.path().join("lora_r4_alpha4");
    fs::create_dir_all(&bad).unwrap();
    for text in ["", "{\"name\": 3}", "[[[[", "final_evaluation:\n  epoch: 50.0\n"] {
        fs::write(bad.join("all_metrics.json"), text).unwrap();
        let error = report::read_records(out.path()).unwrap_err();
        assert_eq!(error.kind, Kind::Input);
        let message = error.to_string();
        assert!(
            message.contains("lora_r4_alpha4/all_metrics.json") && message.contains("delete its folder"),
            "{message}"
        );
        assert_eq!(message.lines().count(), 1);
    }
    let error = report::read_records(&out.path().join("nowhere")).unwrap_err();
    assert_eq!(error.kind, Kind::Input);
    let error = report::grid::write(out.path(), &[], None).unwrap_err();
    assert!(error.to_string().contains("no finished run"));

    // An unwritable place: a file where a folder should be.
    let file = out.path().join("file");
    fs::write(&file, "whole").unwrap();
    let error = report::grid::write(&file, &grid(), None).unwrap_err();
    assert_eq!(error.kind, Kind::Io);
    assert_eq!(fs::read_to_string(&file).unwrap(), "whole");
    assert!(report::run::finish(&file, &grid()[0]).is_err());
}

#[test]
fn a_failed_write_leaves_the_old_file_whole() {
    let dir = tempfile::tempdir().unwrap();
    let run = record("lora_r4_alpha4", Some((4, 4.0)), 0.8);
    report::run::finish(dir.path(), &run).unwrap();
    let before = fs::read(dir.path().join("all_metrics.json")).unwrap();
    // The archive cannot take its place, so the run must not be marked as finished with new numbers.
    let archive = dir.path().join("lora_r4_alpha4_results.zip");
    fs::remove_file(&archive).unwrap();
    fs::create_dir_all(archive.join("in the way")).unwrap();
    let mut other = run.clone();
    other.training_time = 1.0;
    assert_eq!(report::run::finish(dir.path(), &other).unwrap_err().kind, Kind::Io);
    assert_eq!(fs::read(dir.path().join("all_metrics.json")).unwrap(), before);
    assert_eq!(temporary_files(dir.path()), [""; 0]);
}
