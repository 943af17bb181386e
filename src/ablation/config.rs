//! The resolved configuration of a run, `run_config.json` in its folder, and how two of them are compared.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::source::Identity;
use crate::dataset::{PackedDataset, Split};
use crate::error::{Error, Kind, Result};
use crate::files;
use crate::report::RESULT;
use crate::train::options::TrainOptions;

pub(super) const FILE: &str = "run_config.json";

/// Everything that determined a run's numbers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunConfig {
    /// Name of the run.
    pub name: String,
    /// Version of this program.
    pub version: String,
    /// Method, hyper-parameters, protocol.
    pub options: TrainOptions,
    /// The images.
    pub data: DataIdentity,
    /// How they were divided.
    pub split: SplitIdentity,
    /// The model it started from.
    pub model: Identity,
    /// The adapter it started from.
    pub adapter: Option<Identity>,
    /// The GPU it was trained on, by the vendor's name; none for the CPU. Another kind rounds differently.
    pub device: Option<String>,
}

/// What identifies a packed dataset.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DataIdentity {
    /// What `--data` named.
    pub path: String,
    /// Fingerprint of the packed pixels and masks, in hexadecimal.
    pub fingerprint: String,
    /// Number of images.
    pub images: usize,
    /// Side of the square images, pixels.
    pub size: usize,
}

impl DataIdentity {
    /// The identity of `data`, which `--data path` named.
    pub fn new(path: &Path, data: &PackedDataset) -> Self {
        Self {
            path: path.display().to_string(),
            fingerprint: format!("{:016x}", data.fingerprint()),
            images: data.len(),
            size: data.size(),
        }
    }
}

/// What identifies a split.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SplitIdentity {
    /// Images for training.
    pub train: usize,
    /// Images for validation.
    pub val: usize,
    /// CRC-32 over both lists in their order, in hexadecimal.
    pub fingerprint: String,
}

impl SplitIdentity {
    /// The identity of `split`.
    pub fn new(split: &Split) -> Self {
        let mut crc = crc32fast::Hasher::new();
        for list in [&split.train, &split.val] {
            crc.update(&(list.len() as u64).to_le_bytes());
            for &i in list {
                crc.update(&(i as u64).to_le_bytes());
            }
        }
        let fingerprint = format!("{:08x}", crc.finalize());
        Self { train: split.train.len(), val: split.val.len(), fingerprint }
    }
}

impl RunConfig {
    /// Writes the configuration into the run's folder.
    ///
    /// # Errors
    /// [`Kind::Io`](crate::error::Kind::Io) if the file cannot be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        files::replace_json(&folder.join(FILE), self)
    }

    /// Refuses a folder that holds a begun or finished run of another configuration. Paths and the program's version may
    /// differ; what they lead to may not.
    ///
    /// # Errors
    /// [`Kind::Usage`](crate::error::Kind::Usage) that names the differences and the remedy;
    /// [`Kind::Input`](crate::error::Kind::Input) if the file there cannot be understood.
    pub fn check(&self, folder: &Path) -> Result<()> {
        if !begun(folder) {
            return Ok(());
        }
        let differences = self.differences(folder)?;
        if differences.is_empty() {
            return Ok(());
        }
        let device = differences.iter().any(|difference| difference.starts_with("device "));
        let remedy = if device { "choose the device with --device, another --out" } else { "choose another --out" };
        Err(Error::usage(format!(
            "{}: holds a run with other settings ({}); {remedy} or delete this folder",
            folder.display(),
            differences.join(", ")
        )))
    }

    /// The leaves of the configuration, for [`unfair`].
    ///
    /// # Errors
    /// A defect: it cannot be expressed as JSON.
    pub fn leaves(&self) -> Result<Leaves> {
        // Through text, so that numbers are as they are written.
        let json = serde_json::to_string(self).and_then(|text| serde_json::from_str(&text));
        let defect = |e| Error::new(Kind::Internal, format!("cannot express a configuration: {e}"));
        json.map(|json| flatten(&json)).map_err(defect)
    }

    fn differences(&self, folder: &Path) -> Result<Vec<String>> {
        let path = folder.join(FILE);
        let remedy = "delete this folder to train the run anew";
        let text = std::fs::read_to_string(&path)
            .map_err(|e| Error::input(&path, format!("cannot be read ({e}), so the run there is unknown; {remedy}")))?;
        let unknown = |e: serde_json::Error| Error::input(&path, format!("not a run's configuration ({e}); {remedy}"));
        let there = flatten(&serde_json::from_str(&text).map_err(unknown)?);
        let here = self.leaves()?;
        let names: BTreeSet<&String> = there.keys().chain(here.keys()).collect();
        let differs = |name: &&String| counts(name) && there.get(*name) != here.get(*name);
        let describe = |name: &String| match name.strip_suffix(".fingerprint") {
            Some(what) => format!("{} changed", identified(what)),
            None => format!("{} {} there, {} here", label(name), show(&there, name), show(&here, name)),
        };
        Ok(names.into_iter().filter(differs).map(describe).collect())
    }
}

/// The leaves of the configuration of every finished run in the folders under `out`; a run without one that can be read is
/// left out.
pub fn finished(out: &Path) -> Vec<Leaves> {
    let mut folders: Vec<_> = std::fs::read_dir(out).into_iter().flatten().flatten().map(|e| e.path()).collect();
    folders.sort();
    let read = |folder: PathBuf| {
        let text = folder.join(RESULT).is_file().then(|| std::fs::read_to_string(folder.join(FILE)).ok());
        serde_json::from_str(&text??).ok().map(|json| flatten(&json))
    };
    folders.into_iter().filter_map(read).collect()
}

/// Why `runs` are no fair comparison: settings, with their values, that differ although the grid does not vary them. None if
/// there are none.
pub fn unfair(runs: &[Leaves]) -> Option<String> {
    /// Settings named, and values of each.
    const MOST: (usize, usize) = (6, 4);
    let is = |run: &Leaves, name: &str, value: &str| run.get(name).is_some_and(|v| v == value);
    // Each run of the notebook's protocol draws its own split; where all have one, its fingerprint says as much as its sizes.
    let own_splits = runs.iter().any(|run| is(run, "options.protocol", "notebook"));
    let told = |name: &str| {
        if own_splits { name == "split.fingerprint" } else { ["split.train", "split.val"].contains(&name) }
    };
    let names: BTreeSet<&String> = runs.iter().flat_map(BTreeMap::keys).collect();
    let mut settings = Vec::new();
    for name in names {
        let varied = ["kind", "rank", "alpha"].iter().any(|part| name.strip_prefix("options.method.") == Some(part));
        // What is kept and how it is named shapes no number.
        let harmless = ["options.keep_checkpoints", "options.hf_names"].contains(&name.as_str());
        if !counts(name) || varied || harmless || told(name) {
            continue;
        }
        // Full fine-tuning has none of LoRA's settings.
        let lora_only = name.starts_with("options.method.");
        let mut values = Vec::new();
        for run in runs.iter().filter(|run| !lora_only || is(run, "options.method.kind", "lora")) {
            let value = show(run, name);
            if !values.contains(&value) {
                values.push(value);
            }
        }
        if values.len() > 1 {
            settings.push(match name.strip_suffix(".fingerprint") {
                Some(what) => identified(what).to_string(),
                None => format!("{} {}", label(name), some_of(values, MOST.1, ", ")),
            });
        }
    }
    (!settings.is_empty()).then(|| some_of(settings, MOST.0, "; "))
}

/// At most `most` of `items`, and how many there are besides.
fn some_of(mut items: Vec<String>, most: usize, between: &str) -> String {
    let more = items.len().saturating_sub(most);
    items.truncate(most);
    if more > 0 {
        items.push(format!("and {more} more"));
    }
    items.join(between)
}

/// Whether a leaf says how a run's numbers came about, rather than where things lay.
fn counts(name: &str) -> bool {
    !["name", "version"].contains(&name) && !name.ends_with(".path")
}

/// A leaf's name for people.
fn label(name: &str) -> &str {
    let name = name.strip_prefix("options.").unwrap_or(name);
    name.strip_prefix("method.").unwrap_or(name)
}

/// What a fingerprint stands for.
fn identified(field: &str) -> &str {
    match field {
        "data" => "the images",
        "split" => "the split",
        "model" => "the model",
        "adapter" => "the adapter",
        other => other,
    }
}

/// A leaf's value for people, of bounded length.
fn show(leaves: &Leaves, name: &str) -> String {
    const LONGEST: usize = 60;
    let text = match leaves.get(name) {
        None if name == "device" => "CPU".into(),
        None => "unset".into(),
        Some(value) => value.to_string(),
    };
    match text.char_indices().nth(LONGEST) {
        Some((at, _)) => format!("{}...", &text[..at]),
        None => text,
    }
}

/// Whether a folder holds results or checkpoints that a run of another configuration would damage.
fn begun(folder: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(folder) else { return false };
    entries.flatten().any(|entry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        name == RESULT || name == "training_history.csv" || name.starts_with("checkpoint-")
    })
}

/// The leaves of a JSON document by dotted name.
pub type Leaves = BTreeMap<String, Value>;

/// `null` counts as absent, a list as one leaf.
fn flatten(value: &Value) -> Leaves {
    fn walk(value: &Value, name: &str, leaves: &mut Leaves) {
        match value {
            Value::Object(fields) => {
                for (field, value) in fields {
                    let name = if name.is_empty() { field.clone() } else { format!("{name}.{field}") };
                    walk(value, &name, leaves);
                }
            }
            Value::Null => {}
            leaf => drop(leaves.insert(name.into(), leaf.clone())),
        }
    }
    let mut leaves = BTreeMap::new();
    walk(value, "", &mut leaves);
    leaves
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::options::{LoraOptions, Method, Protocol};

    fn config() -> RunConfig {
        let identity = Identity { path: "model".into(), fingerprint: "01".into() };
        RunConfig {
            name: "run".into(),
            version: "0.1.0".into(),
            options: TrainOptions { drop_path: Some(0.1), ..TrainOptions::default() },
            data: DataIdentity { path: "data".into(), fingerprint: "02".into(), images: 10, size: 32 },
            split: SplitIdentity::new(&Split { train: (0..8).collect(), val: vec![8, 9] }),
            model: identity,
            adapter: None,
            device: None,
        }
    }

    #[test]
    fn the_same_run_may_continue_from_other_paths() {
        let folder = tempfile::tempdir().unwrap();
        config().write(folder.path()).unwrap();
        std::fs::write(folder.path().join(RESULT), "").unwrap();
        let mut moved = config();
        moved.version = "9".into();
        moved.model.path = "elsewhere".into();
        moved.data.path = "elsewhere".into();
        moved.check(folder.path()).unwrap();
    }

    #[test]
    fn another_run_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        config().write(folder.path()).unwrap();
        let mut other = config();
        other.options.lr = 0.001;
        other.options.drop_path = None;
        other.check(folder.path()).expect("nothing has been trained there yet");
        std::fs::create_dir(folder.path().join("checkpoint-4")).unwrap();
        let error = other.check(folder.path()).unwrap_err();
        assert_eq!(error.kind, Kind::Usage);
        let text = error.to_string();
        assert!(
            text.contains("lr 0.0005 there, 0.001 here") && text.contains("drop_path 0.1 there, unset here"),
            "{text}"
        );
        let mut changed = config();
        changed.data.fingerprint = "03".into();
        let text = changed.check(folder.path()).unwrap_err().to_string();
        assert!(text.contains("(the images changed)"), "{text}");
    }

    fn lora(rank: usize, change: impl FnOnce(&mut LoraOptions, &mut RunConfig)) -> Leaves {
        let targets = vec!["query".into()];
        let mut lora = LoraOptions { rank, alpha: rank as f64, dropout: 0.0, targets, train_head: false };
        let mut run = config();
        change(&mut lora, &mut run);
        run.options.method = Method::Lora(lora);
        run.leaves().unwrap()
    }

    #[test]
    fn what_the_grid_varies_is_fair() {
        let elsewhere = lora(8, |_, run| {
            run.name = "other".into();
            run.data.path = "elsewhere".into();
            run.options.keep_checkpoints = 5;
        });
        assert_eq!(unfair(&[config().leaves().unwrap(), lora(4, |_, _| ()), elsewhere]), None);
        let own_split = |train: usize| {
            lora(train, |_, run| {
                run.options.protocol = Protocol::Notebook;
                run.split = SplitIdentity::new(&Split { train: vec![train], val: vec![0] });
            })
        };
        assert_eq!(unfair(&[own_split(1), own_split(2)]), None);
        let mut larger = own_split(1);
        larger.insert("split.train".into(), 70.into());
        assert_eq!(unfair(&[own_split(2), larger]).as_deref(), Some("split.train 1, 70"));
        assert_eq!(unfair(&[]), None);
    }

    #[test]
    fn other_differences_are_named_briefly() {
        let head = lora(4, |lora, _| lora.train_head = true);
        let text = unfair(&[config().leaves().unwrap(), lora(4, |_, _| ()), head]).unwrap();
        assert_eq!(text, "train_head false, true");
        let other = |epochs: usize| {
            lora(4, |_, run| {
                run.options.epochs = epochs;
                run.options.drop_path = None;
                run.device = Some("a GPU".into());
                run.data.fingerprint = "03".into();
            })
        };
        let text = unfair(&[lora(4, |_, _| ()), other(2), other(50)]).unwrap();
        assert_eq!(text, "the images; device CPU, \"a GPU\"; drop_path 0.1, unset; epochs 50, 2");
        let many: Vec<_> = (0..9).map(other).collect();
        assert!(unfair(&many).unwrap().ends_with("epochs 0, 1, 2, 3, and 5 more"));
    }

    #[test]
    fn damaged_or_missing_configuration_of_a_begun_run() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(RESULT), "").unwrap();
        assert_eq!(config().check(folder.path()).unwrap_err().kind, Kind::Input);
        std::fs::write(folder.path().join(FILE), "{").unwrap();
        assert_eq!(config().check(folder.path()).unwrap_err().kind, Kind::Input);
    }

    #[test]
    fn order_matters_in_a_split() {
        let split =
            |train: &[usize], val: &[usize]| SplitIdentity::new(&Split { train: train.into(), val: val.into() });
        assert_ne!(split(&[0, 1], &[2]), split(&[1, 0], &[2]));
        assert_ne!(split(&[0, 1], &[2]), split(&[0], &[1, 2]));
    }
}
