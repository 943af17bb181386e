//! Operations that one kernel does in place of several, and how to do without one of them.

/// Operations that one kernel does in place of several. All can be done apart, more slowly if the kernel is worth having: that
/// is what `doctor --apart` measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Joint {
    /// Pixels gathered, multiplied and normalised, and the way back.
    EmbedPixels,
    /// Overlapping windows of tokens multiplied and normalised.
    EmbedTokens,
    /// The way back through these windows to the tokens, and through those of the third stage's sequence reduction.
    EmbedTokensBackward,
    /// The gradients of their weights.
    EmbedTokensBackwardWeights,
    /// Windows of the sequence reduction multiplied and normalised.
    ReduceTokens,
    /// The gradients of its weights.
    ReduceTokensBackwardWeights,
    /// Queries, attention, output product and residual.
    AttentionBranch,
    /// The way back through the LayerNorm behind attention and its output product, with the weight's gradient.
    AttentionOutputBackward,
    /// The gradients of a square weight and of its bias.
    LinearBackwardSquare,
    /// The way back in front of attention.
    AttentionInputBackward,
    /// A Mix-FFN, with the LayerNorms around it.
    MixFfn,
    /// The way back through it.
    MixFfnBackward,
    /// The first stage's product where the stages are joined.
    JoinTokens,
    /// The decoder from the stages to the logits, in evaluation.
    ClassifyStages,
    /// The gradient of the first stage's tokens where that of the joined stages is made.
    ClassifyBackwardTokens,
    /// That of the first stage's weight there, too.
    ClassifyBackwardTokensAll,
}

impl Joint {
    /// All there are.
    pub const ALL: [Self; 16] = [
        Self::EmbedPixels,
        Self::EmbedTokens,
        Self::EmbedTokensBackward,
        Self::EmbedTokensBackwardWeights,
        Self::ReduceTokens,
        Self::ReduceTokensBackwardWeights,
        Self::AttentionBranch,
        Self::AttentionOutputBackward,
        Self::LinearBackwardSquare,
        Self::AttentionInputBackward,
        Self::MixFfn,
        Self::MixFfnBackward,
        Self::JoinTokens,
        Self::ClassifyStages,
        Self::ClassifyBackwardTokens,
        Self::ClassifyBackwardTokensAll,
    ];

    /// The kernel's name, without its channels.
    pub fn name(self) -> &'static str {
        match self {
            Self::EmbedPixels => "embed_pixels",
            Self::EmbedTokens => "embed_tokens",
            Self::EmbedTokensBackward => "embed_tokens_backward",
            Self::EmbedTokensBackwardWeights => "embed_tokens_backward_weights",
            Self::ReduceTokens => "reduce_tokens",
            Self::ReduceTokensBackwardWeights => "reduce_tokens_backward_weights",
            Self::AttentionBranch => "attention_branch",
            Self::AttentionOutputBackward => "attention_output_backward",
            Self::LinearBackwardSquare => "linear_backward_square",
            Self::AttentionInputBackward => "attention_input_backward",
            Self::MixFfn => "mix_ffn",
            Self::MixFfnBackward => "mix_ffn_backward",
            Self::JoinTokens => "join_tokens",
            Self::ClassifyStages => "classify_stages",
            Self::ClassifyBackwardTokens => "classify_backward_tokens",
            Self::ClassifyBackwardTokensAll => "classify_backward_tokens_all",
        }
    }
}
