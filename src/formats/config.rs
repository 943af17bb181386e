//! `config.json` and `preprocessor_config.json`.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::element::quoted;
use super::file;
use crate::error::{Error, Result};
use crate::files;
use crate::segformer::SegformerConfig;

const PREPROCESSOR: &str = "preprocessor_config.json";

/// Reads and validates a SegFormer's `config.json`. Fields that do not shape the network are ignored.
pub(super) fn read(path: &Path) -> Result<SegformerConfig> {
    let mut fields = file::read_json(path)?;
    match fields.get("model_type").and_then(Value::as_str) {
        Some("segformer") => {}
        Some(other) => {
            let problem = format!("model_type is {}; only \"segformer\" is supported", quoted(other));
            return Err(Error::input(path, problem));
        }
        None => return Err(Error::input(path, "has no model_type \"segformer\"; is it a SegFormer's config.json?")),
    }
    fields.retain(|_, value| !value.is_null());
    if !fields.contains_key("id2label") {
        // Hugging Face leaves two unnamed labels out altogether.
        let count = match fields.get("num_labels") {
            None => 2,
            Some(value) => value.as_u64().filter(|&n| n <= 255).ok_or_else(|| {
                Error::input(path, format!("num_labels is {}; 2 to 255 are supported", quoted(&value.to_string())))
            })?,
        };
        let names: Map<_, _> = (0..count).map(|i| (i.to_string(), format!("LABEL_{i}").into())).collect();
        fields.insert("id2label".into(), names.into());
    }
    let config: SegformerConfig = serde_json::from_value(Value::Object(fields.clone())).map_err(|e| {
        let alone = |(name, value): (&String, &Value)| {
            serde_json::from_value::<SegformerConfig>(json!({ name: value })).is_err().then(|| name.clone())
        };
        let field = fields.iter().find_map(alone).unwrap_or_default();
        Error::input(path, format!("{field}: {}", e.to_string().escape_debug()))
    })?;
    config.validate().map_err(|problem| Error::input(path, problem))?;
    Ok(config)
}

/// Writes `config.json` for transformers 4 and 5.
pub(super) fn write(path: &Path, config: &SegformerConfig) -> Result<()> {
    #[derive(Serialize)]
    struct ConfigFile<'a> {
        architectures: [&'a str; 1],
        model_type: &'a str,
        #[serde(flatten)]
        config: &'a SegformerConfig,
        label2id: BTreeMap<&'a str, usize>,
        /// As published configurations have it; the model never reads it (its norms use 1e-5).
        layer_norm_eps: f64,
        reshape_last_stage: bool,
        dtype: &'a str,
    }
    let ids = config.id2label.iter().filter_map(|(id, name)| Some((name.as_str(), id.parse().ok()?)));
    files::replace_json(
        path,
        &ConfigFile {
            architectures: ["SegformerForSemanticSegmentation"],
            model_type: "segformer",
            config,
            label2id: ids.collect(),
            layer_norm_eps: 1e-6,
            reshape_last_stage: true,
            dtype: "float32",
        },
    )
}

/// The side of the square images that the `preprocessor_config.json` in `dir` resizes to, if it states one.
pub fn image_size(dir: &Path) -> Option<usize> {
    let fields = file::read_json(&dir.join(PREPROCESSOR)).ok()?;
    if fields.get("do_resize") == Some(&Value::Bool(false)) {
        return None;
    }
    let number = |value: Option<&Value>| value.and_then(Value::as_u64);
    // As releases of transformers have written it: a number, the shortest edge, or both extents.
    let size = match fields.get("size")? {
        Value::Object(size) => match (number(size.get("height")), number(size.get("width"))) {
            (Some(height), Some(width)) => (height == width).then_some(height),
            _ => number(size.get("shortest_edge")),
        },
        size => size.as_u64(),
    };
    usize::try_from(size?).ok()
}

/// Writes `preprocessor_config.json` into `dir`: images resized to `size` x `size` pixels, rescaled to 0..1, ImageNet mean and
/// deviation.
///
/// # Errors
/// `dir` cannot be written.
pub fn write_image_size(dir: &Path, size: usize) -> Result<()> {
    files::replace_json(
        &dir.join(PREPROCESSOR),
        &json!({
            "image_processor_type": "SegformerImageProcessor",
            "do_resize": true,
            "size": { "height": size, "width": size },
            "resample": 2,
            "do_rescale": true,
            "rescale_factor": 1.0 / 255.0,
            "do_normalize": true,
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
            "do_reduce_labels": false,
        }),
    )
}
