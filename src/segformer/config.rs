//! The sizes of a SegFormer, as Hugging Face's `config.json` states them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::backend::Window;

/// Configuration of a SegFormer for semantic segmentation. Field names are those of `config.json`
/// (transformers, `SegformerConfig`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SegformerConfig {
    /// Colour channels of the input.
    pub num_channels: usize,
    /// Number of stages.
    pub num_encoder_blocks: usize,
    /// Transformer blocks per stage.
    pub depths: Vec<usize>,
    /// Side (= stride) of the sequence-reduction convolution per stage; 1 for none.
    pub sr_ratios: Vec<usize>,
    /// Channels per stage.
    pub hidden_sizes: Vec<usize>,
    /// Kernel side of the overlap patch embedding per stage; the padding is half of it.
    pub patch_sizes: Vec<usize>,
    /// Stride of the overlap patch embedding per stage.
    pub strides: Vec<usize>,
    /// Attention heads per stage.
    pub num_attention_heads: Vec<usize>,
    /// Mix-FFN expansion per stage.
    pub mlp_ratios: Vec<usize>,
    /// Activation of the Mix-FFN; only `gelu` (the erf form) is supported.
    pub hidden_act: String,
    /// Dropout in attention output and Mix-FFN; only 0 is supported.
    pub hidden_dropout_prob: f32,
    /// Dropout of attention probabilities; only 0 is supported.
    pub attention_probs_dropout_prob: f32,
    /// Dropout before the classifier.
    pub classifier_dropout_prob: f32,
    /// Standard deviation of fresh weights.
    pub initializer_range: f32,
    /// Largest stochastic-depth rate; block k of n has rate `drop_path_rate * k / (n - 1)`.
    pub drop_path_rate: f32,
    /// Channels of the MLP decoder.
    pub decoder_hidden_size: usize,
    /// Label that the loss leaves out, as it does all that are no class: it must be none.
    pub semantic_loss_ignore_index: i64,
    /// Class names by decimal index.
    pub id2label: BTreeMap<String, String>,
}

impl Default for SegformerConfig {
    fn default() -> Self {
        Self {
            num_channels: 3,
            num_encoder_blocks: 4,
            depths: vec![2, 2, 2, 2],
            sr_ratios: vec![8, 4, 2, 1],
            hidden_sizes: vec![32, 64, 160, 256],
            patch_sizes: vec![7, 3, 3, 3],
            strides: vec![4, 2, 2, 2],
            num_attention_heads: vec![1, 2, 5, 8],
            mlp_ratios: vec![4, 4, 4, 4],
            hidden_act: "gelu".into(),
            hidden_dropout_prob: 0.0,
            attention_probs_dropout_prob: 0.0,
            classifier_dropout_prob: 0.1,
            initializer_range: 0.02,
            drop_path_rate: 0.1,
            decoder_hidden_size: 256,
            semantic_loss_ignore_index: 255,
            id2label: [("0", "background"), ("1", "polyp")].map(|(k, v)| (k.into(), v.into())).into(),
        }
    }
}

impl SegformerConfig {
    /// Number of classes.
    pub fn num_labels(&self) -> usize {
        self.id2label.len()
    }

    /// Checks that the sizes fit together and lie within what this program supports.
    ///
    /// # Errors
    /// One line that names the offending field.
    pub fn validate(&self) -> Result<(), String> {
        let stages = self.num_encoder_blocks;
        if !(1..=8).contains(&stages) {
            return Err(format!("num_encoder_blocks is {stages}; 1 to 8 are supported"));
        }
        let lists: [(&str, &[usize], usize); 7] = [
            ("depths", &self.depths, 64),
            ("sr_ratios", &self.sr_ratios, 64),
            ("hidden_sizes", &self.hidden_sizes, 4096),
            ("patch_sizes", &self.patch_sizes, 31),
            ("strides", &self.strides, 31),
            ("num_attention_heads", &self.num_attention_heads, 64),
            ("mlp_ratios", &self.mlp_ratios, 16),
        ];
        for (name, list, most) in lists {
            if list.len() != stages {
                return Err(format!("{name} has {} entries, num_encoder_blocks is {stages}", list.len()));
            }
            if let Some(bad) = list.iter().find(|&&v| v == 0 || v > most) {
                return Err(format!("{name} holds {bad}; 1 to {most} is supported"));
            }
        }
        for (i, (&c, &h)) in self.hidden_sizes.iter().zip(&self.num_attention_heads).enumerate() {
            if c % h != 0 {
                return Err(format!("hidden_sizes[{i}] = {c} is not a multiple of num_attention_heads[{i}] = {h}"));
            }
        }
        if self.num_channels != 3 {
            return Err(format!("num_channels is {}; only RGB (3) is supported", self.num_channels));
        }
        if self.hidden_act != "gelu" {
            return Err(format!("hidden_act is {:?}; only \"gelu\" is supported", self.hidden_act));
        }
        if self.hidden_dropout_prob != 0.0 || self.attention_probs_dropout_prob != 0.0 {
            return Err("hidden_dropout_prob and attention_probs_dropout_prob must be 0".into());
        }
        for (name, p) in
            [("classifier_dropout_prob", self.classifier_dropout_prob), ("drop_path_rate", self.drop_path_rate)]
        {
            if !(0.0..1.0).contains(&p) {
                return Err(format!("{name} is {p}; it must lie in [0, 1)"));
            }
        }
        if !(1..=8192).contains(&self.decoder_hidden_size) {
            return Err(format!("decoder_hidden_size is {}; 1 to 8192 is supported", self.decoder_hidden_size));
        }
        if !(2..=255).contains(&self.num_labels()) {
            return Err(format!("{} labels; 2 to 255 are supported", self.num_labels()));
        }
        if let Some(i) = (0..self.num_labels()).find(|i| !self.id2label.contains_key(&i.to_string())) {
            return Err(format!("id2label lacks \"{i}\""));
        }
        let ignored = self.semantic_loss_ignore_index;
        if (0..self.num_labels() as i64).contains(&ignored) {
            return Err(format!(
                "semantic_loss_ignore_index is {ignored}, a class; only a label that is none is supported"
            ));
        }
        Ok(())
    }

    /// Checks that pictures of `size`² leave every stage at least as many tokens a side as its sequence reduction joins.
    ///
    /// # Errors
    /// One line that names the offending field.
    pub fn check_size(&self, size: usize) -> Result<(), String> {
        let mut tokens = size;
        for (s, (&side, &stride)) in self.patch_sizes.iter().zip(&self.strides).enumerate() {
            tokens = Window { side, stride, padding: side / 2 }.out(tokens);
            let ratio = self.sr_ratios[s];
            if ratio > tokens {
                return Err(format!(
                    "sr_ratios[{s}] = {ratio} joins more tokens a side than the {tokens} that {size} x {size} pixels leave there"
                ));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::SegformerConfig;

    #[test]
    fn pictures_must_leave_what_a_sequence_reduction_joins() {
        let published = SegformerConfig::default();
        let sides = [32, 64, 512, 1024];
        assert!(sides.iter().all(|&size| published.check_size(size) == Ok(())));
        let wide = SegformerConfig { sr_ratios: vec![8, 4, 8, 1], ..published };
        let problem = wide.check_size(64).expect_err("4 tokens a side");
        assert!(problem.starts_with("sr_ratios[2] = 8 ") && problem.contains("the 4 that 64 x 64"), "{problem}");
        assert_eq!(wide.check_size(128), Ok(()));
    }
}
