//! Which modules carry adapters: peft's matching rule, presets, and the table shown before training.

use crate::formats::names::{self, matches};
use crate::segformer::{Module, ModuleKind};
use crate::{Error, Result};

/// A module that carries an adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct Match {
    /// The module.
    pub module: Module,
    /// The pattern that matched it first.
    pub pattern: String,
}

impl Match {
    /// Parameters of an adapter of rank `rank` here.
    pub fn parameters(&self, rank: usize) -> usize {
        let area = self.module.side() * self.module.side();
        rank * (self.module.inputs * area + self.module.outputs)
    }
}

/// The patterns of a named set, if `name` is one.
///
/// `attention`: query, key, value and output of every block, which is what the notebook's list really matches;
/// `notebook`: that list itself; `attention+ffn`: the Mix-FFN's linear modules too; `all-linear`: every `nn.Linear`,
/// the decoder's included.
pub fn preset(name: &str) -> Option<Vec<String>> {
    const ATTENTION: [&str; 4] = ["query", "key", "value", "attention.output.dense"];
    let extra: &[&str] = match name {
        "attention" => &[],
        "notebook" => &["mlp.dense.1", "mlp.dense.2"],
        "attention+ffn" => &["mlp.dense1", "mlp.dense2"],
        "all-linear" => {
            &["mlp.dense1", "mlp.dense2", "linear_c.0.proj", "linear_c.1.proj", "linear_c.2.proj", "linear_c.3.proj"]
        }
        _ => return None,
    };
    Some(ATTENTION.iter().chain(extra).map(|s| (*s).to_string()).collect())
}

/// The modules that `patterns` select, in model order, and the patterns that matched nothing. A module matches a pattern by
/// peft's rule ([`names::matches`]), under its name in transformers 4 or 5. `excluded` modules (a fully trained head) are passed over.
///
/// # Errors
/// When a pattern names a module that cannot carry an adapter (normalisation, container, depth-wise convolution).
pub fn select(
    modules: &[Module],
    patterns: &[String],
    excluded: impl Fn(&str) -> bool,
) -> Result<(Vec<Match>, Vec<String>)> {
    let mut found = Vec::new();
    let mut used = vec![false; patterns.len()];
    for module in modules {
        let modern = names::to_v5(&module.name);
        let hit = patterns.iter().position(|p| matches(&module.name, p) || matches(&modern, p));
        let Some(hit) = hit else { continue };
        used[hit] = true;
        if excluded(&module.name) {
            continue;
        }
        match module.kind {
            ModuleKind::Linear | ModuleKind::Convolution { .. } => {}
            _ => {
                let what = match module.kind {
                    ModuleKind::Depthwise => "a depth-wise convolution",
                    ModuleKind::LayerNorm | ModuleKind::BatchNorm => "a normalisation",
                    _ => "a container without weights",
                };
                return Err(Error::usage(format!(
                    "--targets {}: it matches {}, {what}, which cannot carry an adapter; name linear modules or \
                         convolutions",
                    patterns[hit], module.name
                )));
            }
        }
        found.push(Match { module: module.clone(), pattern: patterns[hit].clone() });
    }
    let unused = patterns.iter().zip(used).filter(|(_, used)| !used).map(|(p, _)| p.clone()).collect();
    Ok((found, unused))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::segformer::{SegformerConfig, modules};

    fn selected(patterns: &[String]) -> (Vec<Match>, Vec<String>) {
        select(&modules(&SegformerConfig::default()), patterns, |_| false).expect("valid patterns")
    }

    #[test]
    fn the_notebooks_list_reaches_attention_alone() {
        let (found, unused) = selected(&preset("notebook").expect("preset"));
        assert_eq!(found.len(), 32);
        assert_eq!(unused, ["mlp.dense.1", "mlp.dense.2"]);
        assert_eq!(found.iter().map(|m| m.parameters(16)).sum::<usize>(), 8192 * 16);
        assert_eq!(selected(&preset("attention").expect("preset")).0.len(), 32);
    }

    #[test]
    fn presets_grow() {
        assert_eq!(selected(&preset("attention+ffn").expect("preset")).0.len(), 48);
        assert_eq!(selected(&preset("all-linear").expect("preset")).0.len(), 52);
    }

    #[test]
    fn names_of_transformers_5_are_understood() {
        let (found, unused) = selected(&["q_proj".into(), "mlp.fc1".into()]);
        assert_eq!((found.len(), unused.len()), (16, 0));
    }

    #[test]
    fn what_cannot_carry_an_adapter_is_refused() {
        let modules = modules(&SegformerConfig::default());
        for pattern in ["layer_norm_1", "mlp", "dwconv.dwconv"] {
            let error = select(&modules, &[pattern.into()], |_| false).expect_err(pattern);
            assert!(error.to_string().contains(pattern));
        }
    }
}
