//! Efficient self-attention: LayerNorm, keys and values from tokens reduced by a strided convolution, output product,
//! residual.

use super::affine::Affine;
use super::model::{Pass, Scratch};
use super::norm::{Behind, Branch, Front, Norm, Normed, Takes};
use super::tensors::Gradients;
use crate::backend::{
    AttentionInputs, AttentionOutputs, AttentionShape, AttentionWeights, Backend, Deltas, Dropout, Grid, NormBack,
    Window,
};

/// The layer.
pub struct AttentionLayer {
    /// LayerNorm before it.
    pub norm: Norm,
    /// Q.
    pub query: Affine,
    /// K.
    pub key: Affine,
    /// V.
    pub value: Affine,
    /// Output product.
    pub output: Affine,
    /// Sequence reduction: convolution and LayerNorm.
    pub reduction: Option<(Affine, Norm)>,
    /// Geometry of the sequence reduction.
    pub window: Window,
    /// Heads.
    pub heads: usize,
    /// Channels.
    pub channels: usize,
    /// Whether gradients must reach its input.
    pub input_gradient: bool,
    /// Whether anything in it is trained.
    pub trains: bool,
}

/// What the backward pass needs besides the layer's input.
pub struct AttentionActs<B: Backend> {
    /// Q, if it is [kept](AttentionLayer::keeps_queries).
    pub q: Option<B::Act>,
    /// Reduced tokens before their LayerNorm, and what that made of them.
    pub reduced: Option<(B::Act, Normed<B>)>,
    /// What the sequence reduction gathered, if kept.
    pub patches: Option<B::Act>,
    /// K.
    pub k: B::Act,
    /// V.
    pub v: B::Act,
    /// Attention output before the output product, if it is stored.
    pub o: B::Act,
    /// Logarithms of the softmax denominators, if they are stored.
    pub lse: B::Full,
}

impl AttentionLayer {
    /// The grid of keys.
    pub fn keys(&self, grid: Grid) -> Grid {
        grid.through(self.window)
    }

    fn shape(&self, grid: Grid) -> AttentionShape {
        AttentionShape {
            images: grid.images,
            heads: self.heads,
            head: self.channels / self.heads,
            queries: grid.area(),
            keys: self.keys(grid).area(),
        }
    }

    /// Whether the backend makes the queries' side in one operation; `keep`: with what a backward pass needs.
    pub fn fuses<B: Backend>(&self, backend: &B, grid: Grid, keep: bool) -> bool {
        let is_plain = self.query.side.is_none() && self.output.side.is_none();
        is_plain && backend.fuses_attention(self.shape(grid), keep)
    }

    /// Whether Q is kept for the backward pass: made again, it must be the same to the bit, and what one operation made with what
    /// stands behind it need not be what the product alone makes.
    pub fn keeps_queries<B: Backend>(&self, backend: &B, grid: Grid) -> bool {
        backend.remembers() || self.fuses(backend, grid, true)
    }

    /// Whether the backend goes back from the gradients of Q and of the reduced tokens to the stream's in one operation.
    fn joins_input<B: Backend>(&self, backend: &B, grid: Grid) -> bool {
        let is_plain = |convolution: &Affine| convolution.side.is_none() && self.query.side.is_none();
        let reduces = self.reduction.as_ref().is_some_and(|(convolution, _)| is_plain(convolution));
        reduces && backend.joins_attention_input(grid, self.channels, self.window)
    }

    /// Whether the backend goes back through the LayerNorm behind and the output product in one operation, where the
    /// product's weight is trained.
    pub fn joins_output<B: Backend>(&self, backend: &B, grid: Grid) -> bool {
        self.output.side.is_none() && backend.joins_attention_output(self.shape(grid))
    }

    /// What the way back begins with.
    pub fn takes<B: Backend>(&self, backend: &B, grid: Grid, gradients: &Gradients<B>) -> Takes {
        let joins = gradients.get(self.output.weight).is_some() && self.joins_output(backend, grid);
        if joins { Takes::Normed } else { Takes::Product }
    }

    /// `y = x + drop·attention(norm(x))`, and the LayerNorm behind, unless what follows makes that; `normed` is norm(x).
    pub fn forward<B: Backend>(
        &self,
        pass: &Pass<'_, B>,
        x: &B::Act,
        grid: Grid,
        drop: Option<Dropout>,
        normed: &Normed<B>,
        acts: &mut AttentionActs<B>,
        y: &mut B::Act,
        behind: Option<(&Norm, &mut Normed<B>)>,
        scratch: &mut Scratch<B>,
    ) {
        let backend = pass.backend;
        let (rows, key_rows) = (grid.rows(), self.keys(grid).rows());
        let Scratch { tokens: [t0, t1, ..], wide: [patches, room], side, .. } = scratch;
        let normed = normed.out.as_ref().unwrap_or(t0);
        let source = match (&self.reduction, &mut acts.reduced) {
            (Some((convolution, norm)), Some((raw, Normed { out, stats }))) => {
                let goes_back = self.trains || self.input_gradient;
                let kept = (acts.patches.as_mut(), raw, stats, goes_back);
                let out = out.as_mut().unwrap_or(t1);
                norm.convolve(pass, convolution, (normed, grid), self.window, kept, out, None, patches, side);
                &*out
            }
            _ => normed,
        };
        self.key.forward(pass, source, key_rows, &mut acts.k, side);
        self.value.forward(pass, source, key_rows, &mut acts.v, side);
        let shape = self.shape(grid);
        if self.fuses(backend, grid, pass.keeps()) {
            let weights = AttentionWeights { query: self.query.operands(pass), output: self.output.operands(pass) };
            let kept = acts.q.as_mut().filter(|_| pass.keeps()).map(|q| (q, &mut acts.o, &mut acts.lse));
            let outputs = AttentionOutputs { y, kept };
            backend.attention_branch(x, normed, &acts.k, &acts.v, shape, &weights, drop, outputs);
            if let Some((norm, Normed { out, stats })) = behind {
                norm.forward(pass, y, rows, out.as_mut().unwrap_or(t0), stats);
            }
            return;
        }
        let q = acts.q.as_mut().unwrap_or(room);
        self.query.forward(pass, normed, rows, q, side);
        backend.attention(q, &acts.k, &acts.v, shape, &mut acts.o, &mut acts.lse);
        match behind {
            Some((norm, normed)) => {
                self.output.join_and_norm(pass, x, &acts.o, grid, drop, t1, normed.joint(y, norm), t0, side);
            }
            None => self.output.join(pass, x, &acts.o, grid, drop, t1, y, side),
        }
    }

    /// The y of the forward pass again: cheap enough not to be kept for the backward pass. Leaves `tokens[0]` of `scratch`
    /// alone.
    pub fn join<B: Backend>(
        &self,
        pass: &Pass<'_, B>,
        x: &B::Act,
        grid: Grid,
        drop: Option<Dropout>,
        acts: &AttentionActs<B>,
        y: &mut B::Act,
        scratch: &mut Scratch<B>,
    ) {
        let Scratch { tokens: [_, branch, ..], side, .. } = scratch;
        if self.fuses(pass.backend, grid, pass.keeps()) {
            pass.backend.attention_join(x, &acts.o, self.shape(grid), self.output.operands(pass), drop, y);
        } else {
            self.output.join(pass, x, &acts.o, grid, drop, branch, y, side);
        }
    }

    /// Turns `d`, the gradient of y, into the gradient of x, and sums the parameters' gradients. With `drop`, `tokens[0]` of
    /// `scratch` holds the branch's gradient; it is left holding that of `before`, if x was made by adding that and it is wanted.
    /// If the way back [takes in](AttentionLayer::takes) that through the LayerNorm `behind`, `tokens[5]` holds the gradient of
    /// what that made, `d` is the gradient of the stream behind it, and its parameters' gradients are summed, too.
    pub fn backward<B: Backend>(
        &self,
        pass: &Pass<'_, B>,
        x: &B::Act,
        grid: Grid,
        drop: Option<Dropout>,
        before: Option<Branch<'_>>,
        behind: Behind<'_, B>,
        normed: &Normed<B>,
        acts: &AttentionActs<B>,
        d: &mut B::Act,
        gradients: &mut Gradients<B>,
        scratch: &mut Scratch<B>,
    ) {
        if !self.input_gradient && !self.trains {
            return;
        }
        let backend = pass.backend;
        let (rows, key_rows) = (grid.rows(), self.keys(grid).rows());
        let Scratch { tokens: [t0, t1, t2, t3, t4, t5], wide: [patches, room], deltas, side, stats } = scratch;

        // Output product. Afterwards t1 is the gradient of the attention output.
        let shape = self.shape(grid);
        let joins = self.takes(backend, grid, gradients) == Takes::Normed;
        let mut each = gradients.each();
        let deltas = if let Some(dw) = each.take(self.output.weight).filter(|_| joins) {
            let weight = pass.tensors.product(self.output.weight);
            let bias = self.output.bias.and_then(|id| each.take(id));
            let Behind { norm, x, stats } = behind;
            let parameters = norm.parameters(&mut each);
            let norm = NormBack { dy: &*t5, x, stats, gamma: pass.tensors.value(norm.gamma) };
            backend.attention_output_backward(norm, drop, &acts.o, weight, shape, d, t1, deltas, dw, parameters, bias);
            Deltas::Made(deltas)
        } else {
            let branch = if drop.is_some() { &*t0 } else { &*d };
            if self.output.trains(gradients) {
                self.output.backward_weights(pass, &acts.o, branch, rows, gradients, side);
            }
            self.output.backward_input(pass, branch, rows, t1, false, side);
            Deltas::Of(&acts.o)
        };

        // What the products read: the normalised x, and, below, the normalised reduced tokens.
        let x_stats = &normed.stats;
        let normed = self.norm.output(pass, x, rows, normed, t0, stats);
        let q = match &acts.q {
            Some(q) => q,
            None => {
                self.query.forward(pass, normed, rows, room, side);
                &*room
            }
        };

        // Attention. t2, t3, t4: gradients of q, k, v.
        backend.attention_backward(q, &acts.k, &acts.v, deltas, &acts.lse, t1, shape, t2, t3, t4);

        let below = self.input_gradient || gradients.get(self.norm.gamma).is_some();
        let is_read = self.key.trains(gradients) || self.value.trains(gradients);
        let source = match (&self.reduction, &acts.reduced) {
            (Some((_, norm)), Some((raw, reduced))) if is_read => norm.output(pass, raw, key_rows, reduced, t1, stats),
            _ => normed,
        };
        let is_joint = below && self.input_gradient && self.joins_input(backend, grid);
        // Q's bias, where the joint operation sums the gradients of Q's parameters.
        let query_bias = self.query.bias.filter(|&bias| {
            let needed = [self.norm.gamma, self.norm.beta, self.query.weight, bias];
            let all_wanted = needed.into_iter().all(|id| gradients.get(id).is_some());
            is_joint && backend.sums_attention_query(self.channels) && all_wanted
        });
        if self.query.trains(gradients) && query_bias.is_none() {
            self.query.backward_params(pass, normed, t2, rows, gradients, side);
        }
        if self.key.trains(gradients) {
            self.key.backward_weights(pass, source, t3, key_rows, gradients, side);
            if let Some(db) = self.key.bias.and_then(|id| gradients.get_mut(id)) {
                backend.key_shift_gradient(t3, key_rows, self.channels, db);
            }
        }
        if self.value.trains(gradients) {
            self.value.backward_params(pass, source, t4, key_rows, gradients, side);
        }

        // Towards the LayerNorm: t5 collects the gradient of its output, unless the backend goes on to the stream at once; and
        // before, that of the reduced tokens, from which that of the convolution is made, t1.
        match (&self.reduction, &acts.reduced) {
            (Some((convolution, norm)), Some((raw, Normed { stats: raw_stats, .. }))) => {
                let trains = convolution.trains(gradients);
                if below || trains || gradients.get(norm.gamma).is_some() {
                    self.key.backward_input(pass, t3, key_rows, t5, false, side);
                    self.value.backward_input(pass, t4, key_rows, t5, true, side);
                    let dx = Some((&mut *t1, false));
                    norm.backward(pass, t5, raw, raw_stats, key_rows, gradients, dx, Front::product(convolution));
                    if trains {
                        let (tokens, kept) = ((normed, grid), acts.patches.as_ref());
                        convolution.backward_convolution(pass, tokens, self.window, kept, t1, gradients, patches, side);
                    }
                }
            }
            _ if below => {
                self.key.backward_input(pass, t3, key_rows, t5, false, side);
                self.value.backward_input(pass, t4, key_rows, t5, true, side);
            }
            _ => {}
        }
        if !below {
            return;
        }
        let front = before.map_or(Front::none(), |before| Front::branch(before, grid, t0));
        match &self.reduction {
            Some((convolution, _)) if is_joint => {
                let tensors = pass.tensors;
                let inputs = AttentionInputs {
                    query: tensors.product(self.query.weight),
                    reduction: tensors.product(convolution.weight),
                    window: self.window,
                    x,
                    stats: x_stats,
                    affine: (tensors.value(self.norm.gamma), tensors.value(self.norm.beta)),
                    channels: self.channels,
                };
                let mut each = gradients.each();
                let (parameters, front) = (self.norm.parameters(&mut each), front.wanted(&mut each));
                let query = query_bias.and_then(|bias| each.take(self.query.weight).zip(each.take(bias)));
                backend.attention_input_backward(t2, t1, &inputs, grid, d, parameters, query, front);
            }
            reduction => {
                self.query.backward_input(pass, t2, rows, t5, reduction.is_none(), side);
                if let Some((convolution, _)) = reduction {
                    convolution.backward_tokens(pass, t1, (t5, grid), self.window, patches, side);
                }
                let dx = self.input_gradient.then_some((d, true));
                self.norm.backward(pass, t5, x, x_stats, rows, gradients, dx, front);
            }
        }
    }
}
