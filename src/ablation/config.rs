//! The resolved configuration of a run, `run_config.json` in its folder, and how two of them are compared.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::source::Identity;
use crate::dataset::{PackedDataset, Split};
use crate::error::{Error, Result};
use crate::files;
use crate::train::options::TrainOptions;

const FILE: &str = "run_config.json";

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
        let differences = self.differences(folder, &[])?;
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

    /// Differences of a neighbouring run in `folder` from this one, other than the method: empty if the two can be compared.
    ///
    /// # Errors
    /// Those of [`RunConfig::check`] for a file that cannot be understood.
    pub fn check_neighbour(&self, folder: &Path) -> Result<Vec<String>> {
        if !begun(folder) || !folder.join(FILE).exists() {
            return Ok(Vec::new());
        }
        self.differences(folder, &["options.method", "split."])
    }

    fn differences(&self, folder: &Path, ignored: &[&str]) -> Result<Vec<String>> {
        let path = folder.join(FILE);
        let remedy = "delete this folder to train the run anew";
        let text = std::fs::read_to_string(&path)
            .map_err(|e| Error::input(&path, format!("cannot be read ({e}), so the run there is unknown; {remedy}")))?;
        let unknown = |e: serde_json::Error| Error::input(&path, format!("not a run's configuration ({e}); {remedy}"));
        let there = flatten(&serde_json::from_str(&text).map_err(unknown)?);
        // Through text, so that both sides hold numbers as they are written.
        let here = serde_json::to_string(self).and_then(|text| serde_json::from_str(&text)).map_err(unknown)?;
        let here = flatten(&here);
        let names: BTreeSet<&String> = there.keys().chain(here.keys()).collect();
        let counts = |name: &&String| {
            !(["name", "version"].contains(&name.as_str())
                || name.ends_with(".path")
                || ignored.iter().any(|prefix| name.starts_with(prefix)))
        };
        let show = |side: &BTreeMap<String, Value>, name: &str| side.get(name).map_or("unset".into(), Value::to_string);
        let differs = |name: &&String| there.get(*name) != here.get(*name);
        let describe = |name: &String| {
            let label = name.strip_prefix("options.").unwrap_or(name);
            format!("{label} {} there, {} here", show(&there, name), show(&here, name))
        };
        Ok(names.into_iter().filter(counts).filter(differs).map(describe).collect())
    }
}

/// Whether a folder holds results or checkpoints that a run of another configuration would damage.
fn begun(folder: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(folder) else { return false };
    entries.flatten().any(|entry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        name == "all_metrics.json" || name == "training_history.csv" || name.starts_with("checkpoint-")
    })
}

/// The leaves of a JSON document by dotted name; `null` counts as absent, a list as one leaf.
fn flatten(value: &Value) -> BTreeMap<String, Value> {
    fn walk(value: &Value, name: &str, leaves: &mut BTreeMap<String, Value>) {
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
    use crate::error::Kind;

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
        std::fs::write(folder.path().join("all_metrics.json"), "").unwrap();
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
        assert_eq!(other.check_neighbour(folder.path()).unwrap().len(), 2);
    }

    #[test]
    fn damaged_or_missing_configuration_of_a_begun_run() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("all_metrics.json"), "").unwrap();
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
