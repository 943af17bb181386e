//! Module names under transformers 4 and 5.
//!
//! Full checkpoints carry version-4 names whichever version wrote them; adapters carry those of the version that wrote
//! them. Inside the program names are version 4's.

/// Modules inside a transformer block, under versions 4 and 5. The rest (`mlp.dwconv.dwconv`) have kept their names.
const BLOCK: [(&str, &str); 10] = [
    ("layer_norm_1", "layernorm_before"),
    ("layer_norm_2", "layernorm_after"),
    ("attention.self.query", "attention.q_proj"),
    ("attention.self.key", "attention.k_proj"),
    ("attention.self.value", "attention.v_proj"),
    ("attention.self.sr", "attention.sequence_reduction.sequence_reduction"),
    ("attention.self.layer_norm", "attention.sequence_reduction.layer_norm"),
    ("attention.output.dense", "attention.o_proj"),
    ("mlp.dense1", "mlp.fc1"),
    ("mlp.dense2", "mlp.fc2"),
];

/// The decoder's linear layers, one per stage, under versions 4 and 5.
const HEAD: (&str, &str) = ("decode_head.linear_c", "decode_head.linear_projections");

/// The version-4 name of a module or tensor. A version-4 name, or one that is no SegFormer module's, comes back as it is.
pub fn to_v4(name: &str) -> String {
    if let Some((stage, rest)) = name.strip_prefix("segformer.stages.").and_then(index) {
        for module in ["patch_embeddings", "layer_norm"] {
            if let Some(rest) = below(rest, module) {
                return format!("segformer.encoder.{module}.{stage}{rest}");
            }
        }
        if let Some((block, rest)) = rest.strip_prefix("blocks.").and_then(index) {
            let rest = renamed(rest, BLOCK.iter().map(|&(v4, v5)| (v5, v4)));
            return format!("segformer.encoder.block.{stage}.{block}.{rest}");
        }
    }
    renamed(name, [(HEAD.1, HEAD.0)])
}

/// The version-5 name of a module or tensor. A version-5 name, or one that is no SegFormer module's, comes back as it is.
pub fn to_v5(name: &str) -> String {
    if let Some(rest) = name.strip_prefix("segformer.encoder.") {
        for module in ["patch_embeddings", "layer_norm"] {
            if let Some((stage, rest)) = below(rest, module).and_then(|rest| index(rest.strip_prefix('.')?)) {
                let dot = if rest.is_empty() { "" } else { "." };
                return format!("segformer.stages.{stage}.{module}{dot}{rest}");
            }
        }
        if let Some((stage, rest)) = rest.strip_prefix("block.").and_then(index)
            && let Some((block, rest)) = index(rest)
        {
            return format!("segformer.stages.{stage}.blocks.{block}.{}", renamed(rest, BLOCK));
        }
    }
    renamed(name, [HEAD])
}

/// The version-4 form of a target pattern: a full name or the end of one, from a dot on. One without a counterpart comes back as it is.
pub fn pattern_to_v4(pattern: &str) -> String {
    // `q_proj` becomes `query`, not `self.query`: the last component is what people write.
    let short = |v4: &str| v4.rsplit('.').next().unwrap_or(v4).to_owned();
    translated(pattern, to_v4(pattern), BLOCK.into_iter().chain([HEAD]).map(|(v4, v5)| (v5, v4)), short)
}

/// The version-5 form of a target pattern: a full name or the end of one, from a dot on. One without a counterpart comes back as it is.
pub fn pattern_to_v5(pattern: &str) -> String {
    // `sr` becomes `sequence_reduction.sequence_reduction`: its last component alone also matches the module around it.
    let short = |v5: &str| v5.split_once('.').map_or(v5, |(_, rest)| rest).to_owned();
    translated(pattern, to_v5(pattern), BLOCK.into_iter().chain([HEAD]), short)
}

/// peft's matching rule: the module's full name equals the pattern or ends in `.` + pattern.
pub fn matches(module: &str, pattern: &str) -> bool {
    module.strip_suffix(pattern).is_some_and(|front| front.is_empty() || front.ends_with('.'))
}

fn translated<'a>(
    pattern: &str,
    as_full_name: String,
    table: impl Iterator<Item = (&'a str, &'a str)>,
    short: impl Fn(&str) -> String,
) -> String {
    if as_full_name != pattern {
        return as_full_name;
    }
    for (from, to) in table {
        if from == pattern {
            return to.to_owned();
        }
        // `layer_norm` is the end of several modules' names, most of which have kept it.
        if matches(from, pattern) && pattern != "layer_norm" {
            return short(to);
        }
    }
    pattern.to_owned()
}

/// `name` with the module at its front renamed by the first row of `table` that fits.
fn renamed<'a>(name: &str, table: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
    let row = table.into_iter().find_map(|(from, to)| below(name, from).map(|rest| format!("{to}{rest}")));
    row.unwrap_or_else(|| name.to_owned())
}

/// What follows `module` in `name`: nothing, or something that begins with a dot.
fn below<'a>(name: &'a str, module: &str) -> Option<&'a str> {
    name.strip_prefix(module).filter(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// Splits `3.rest` (or `3`) into the number, still as text, and the rest.
fn index(name: &str) -> Option<(&str, &str)> {
    let (number, rest) = name.split_once('.').unwrap_or((name, ""));
    let digits = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
    digits.then_some((number, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_and_modules_change_both_ways() {
        for (v4, v5) in [
            ("segformer.encoder.patch_embeddings.3", "segformer.stages.3.patch_embeddings"),
            ("segformer.encoder.layer_norm.0.bias", "segformer.stages.0.layer_norm.bias"),
            (
                "segformer.encoder.block.2.17.attention.self.layer_norm.weight",
                "segformer.stages.2.blocks.17.attention.sequence_reduction.layer_norm.weight",
            ),
            (
                "segformer.encoder.block.0.0.attention.self.query.lora_A.weight",
                "segformer.stages.0.blocks.0.attention.q_proj.lora_A.weight",
            ),
            ("decode_head.linear_c.1.proj", "decode_head.linear_projections.1.proj"),
            ("decode_head.batch_norm.running_var", "decode_head.batch_norm.running_var"),
        ] {
            assert_eq!(to_v5(v4), v5);
            assert_eq!(to_v4(v5), v4);
            assert_eq!(to_v4(v4), v4);
            assert_eq!(to_v5(v5), v5);
        }
    }

    #[test]
    fn what_is_no_module_stays() {
        for name in
            ["", "segformer.encoder.block.x.0.mlp", "segformer.stages.", "segformer.encoder.layer_normal.1", "ü.é"]
        {
            assert_eq!(to_v5(name), name);
            assert_eq!(to_v4(name), name);
        }
    }

    #[test]
    fn patterns_change_both_ways() {
        for (v4, v5) in [
            ("query", "q_proj"),
            ("key", "k_proj"),
            ("value", "v_proj"),
            ("attention.output.dense", "attention.o_proj"),
            ("dense", "o_proj"),
            ("mlp.dense1", "mlp.fc1"),
            ("dense2", "fc2"),
            ("sr", "sequence_reduction.sequence_reduction"),
            ("linear_c", "linear_projections"),
            ("decode_head", "decode_head"),
            ("layer_norm", "layer_norm"),
            ("mlp.dense.1", "mlp.dense.1"),
            ("segformer.encoder.block.0.1.mlp.dense1", "segformer.stages.0.blocks.1.mlp.fc1"),
        ] {
            assert_eq!(pattern_to_v5(v4), v5);
            assert_eq!(pattern_to_v4(v5), v4);
        }
    }

    #[test]
    fn patterns_match_whole_components() {
        assert!(matches("a.attention.self.query", "query"));
        assert!(matches("query", "query"));
        assert!(!matches("a.subquery", "query"));
        assert!(!matches("a.query.b", "query"));
    }
}
