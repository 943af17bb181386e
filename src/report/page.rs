//! `index.html`: the answer, the figures, the table. One file without scripts; pictures lie beside it.

use super::RESULT;
use super::summary::{self, Row, Summary};

const STYLE: &str = include_str!("page.css");

/// Figures of the page: file, what it shows, what to look for.
const FIGURES: [(&str, &str, &str); 4] = [
    (
        "lora_alpha_vs_dice.png",
        "Dice of each LoRA run over alpha, one line per rank",
        "Dice over α, by rank. Ranks that share an α stand side by side.",
    ),
    (
        "dice_vs_training_time.png",
        "Dice of each run over its training time",
        "Dice over training time. Up and to the left is better; notes give α.",
    ),
    (
        "epochs_vs_dice.png",
        "Validation Dice over epochs of the best LoRA run and of full fine-tuning",
        "Validation Dice while training: how far behind the best LoRA run is, and from when on.",
    ),
    (
        "epochs_vs_loss.png",
        "Training and validation loss over epochs of the best LoRA run and of full fine-tuning",
        "Loss while training: a dashed line far below its solid one shows overfitting.",
    ),
];

/// Files of a run that its row links to, by what they are called there.
fn links(run: &str) -> [(String, &'static str); 5] {
    [
        ("training_history.csv".into(), "csv"),
        ("Dice_over_Epochs.png".into(), "dice"),
        ("Losses_over_Epochs.png".into(), "loss"),
        (RESULT.into(), "json"),
        (format!("{run}_results.zip"), "zip"),
    ]
}

/// The page for a grid whose runs lie in folders of their names beside it.
pub(super) fn html(summary: &Summary) -> String {
    let remarks: String = summary.remarks.iter().map(|r| format!("<li>{}</li>\n", prose(r))).collect();
    let figures: String = FIGURES
        .iter()
        .map(|(file, alt, caption)| {
            format!(
                "<figure><a href=\"{file}\"><img src=\"{file}\" alt=\"{alt}\" width=\"1440\" height=\"960\" \
                 loading=\"lazy\"></a><figcaption>{caption}</figcaption></figure>\n"
            )
        })
        .collect();
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <title>How much of full fine-tuning does LoRA keep?</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n\
         <header>\n<p class=\"question\">How much of full fine-tuning does LoRA keep, at which rank and alpha?</p>\n\
         <h1>{}</h1>\n<ul>\n{remarks}</ul>\n</header>\n{}\
         <section>\n<h2>Figures</h2>\n<div class=\"figures\">\n{figures}</div>\n</section>\n\
         <section>\n<h2>All runs</h2>\n<div class=\"wide\">\n{}</div>\n<p class=\"note\">{}</p>\n\
         <p class=\"note\">The same as <a href=\"summary.csv\">CSV</a>, <a href=\"summary.json\">JSON</a>, \
         <a href=\"summary.md\">Markdown</a>.</p>\n</section>\n</main>\n</body>\n</html>\n",
        prose(&summary.headline),
        heat_map(summary),
        table(summary),
        prose(summary::LEGEND),
    )
}

/// Rank against alpha / r: the share of full fine-tuning's Dice, or the Dice itself where there is none to compare.
fn heat_map(summary: &Summary) -> String {
    let mut ranks: Vec<usize> = summary.runs.iter().filter_map(|r| r.rank).collect();
    let mut ratios: Vec<f64> = summary.runs.iter().filter_map(|r| r.alpha_over_rank).collect();
    ranks.sort_unstable();
    ranks.dedup();
    ratios.sort_by(f64::total_cmp);
    ratios.dedup();
    if ranks.is_empty() || ratios.is_empty() {
        return String::new();
    }
    let compared = summary.runs.iter().any(|r| r.rank.is_some() && r.percent_of_fft_dice.is_some());
    let value = |row: &Row| if compared { row.percent_of_fft_dice } else { row.dice };
    let values = summary.runs.iter().filter(|r| r.rank.is_some()).filter_map(value);
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(v), b.max(v)));
    let mut text = String::from("<section>\n<h2>");
    text += if compared { "Share of full fine-tuning's Dice kept" } else { "Dice of the LoRA runs" };
    text += "</h2>\n<div class=\"wide\">\n<table class=\"heat\">\n<thead><tr><th scope=\"col\">rank</th>";
    for ratio in &ratios {
        text += &format!("<th scope=\"col\">α/r = {ratio}</th>");
    }
    text += "</tr></thead>\n<tbody>\n";
    for rank in ranks {
        text += &format!("<tr><th scope=\"row\">r = {rank}</th>");
        for &ratio in &ratios {
            let row = summary.runs.iter().find(|r| r.rank == Some(rank) && r.alpha_over_rank == Some(ratio));
            text += &match row.and_then(|row| value(row).map(|v| (row, v))) {
                Some((row, v)) => {
                    let depth = if high > low { (v - low) / (high - low) } else { 0.5 };
                    let best = if summary.best_lora.as_ref() == Some(&row.run) { " class=\"best\"" } else { "" };
                    let (big, small) = if compared {
                        (format!("{v:.1} %"), row.dice.map(|d| format!("Dice {d:.4}")).unwrap_or_default())
                    } else {
                        (format!("{v:.4}"), String::new())
                    };
                    format!(
                        "<td{best} style=\"--depth:{:.0}%\"><b>{big}</b><small>{small}</small></td>",
                        8.0 + 62.0 * depth
                    )
                }
                None => "<td class=\"none\">–</td>".into(),
            };
        }
        text += "</tr>\n";
    }
    text += "</tbody>\n</table>\n</div>\n<p class=\"note\">Framed: the best LoRA run.";
    let fft = summary.runs.iter().find(|r| Some(&r.run) == summary.fft.as_ref());
    if let Some(dice) = fft.and_then(|f| f.dice) {
        text += &format!(" 100 % is full fine-tuning's Dice, {dice:.4}.");
    }
    text + "</p>\n</section>\n"
}

fn table(summary: &Summary) -> String {
    let mut text = String::from("<table class=\"runs\">\n");
    for (i, row) in summary.runs.iter().enumerate() {
        let columns = summary::columns(row);
        if i == 0 {
            let heads: String = columns.iter().map(|(name, _)| format!("<th scope=\"col\">{name}</th>")).collect();
            text += &format!("<thead><tr>{heads}<th scope=\"col\">Files</th></tr></thead>\n<tbody>\n");
        }
        let best = if summary.best_lora.as_ref() == Some(&row.run) { " class=\"best\"" } else { "" };
        text += &format!("<tr{best}>");
        for (i, (_, cell)) in columns.iter().enumerate() {
            text += &if i == 0 {
                format!("<th scope=\"row\"><a href=\"{}/\">{}</a></th>", encode(cell), escape(cell))
            } else {
                format!("<td>{}</td>", escape(cell))
            };
        }
        let files = links(&row.run)
            .map(|(file, what)| format!("<a href=\"{}/{}\">{what}</a>", encode(&row.run), encode(&file)));
        text += &format!("<td class=\"files\">{}</td></tr>\n", files.join(" "));
    }
    text + "</tbody>\n</table>\n"
}

/// Text for HTML.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// A sentence for HTML; "r = 4" and "90 %" stay on one line.
fn prose(text: &str) -> String {
    escape(text).replace(" = ", "&nbsp;=&nbsp;").replace(" %", "&nbsp;%")
}

/// One segment of a relative address.
fn encode(segment: &str) -> String {
    let safe = |b: u8| b.is_ascii_alphanumeric() || b"-_.~".contains(&b);
    segment.bytes().map(|b| if safe(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}
