//! The numbers of a model on a device: parameters, what products read of them, and their gradients.

use crate::backend::{Backend, Transpose};

/// Position of a tensor in the tables of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Id(pub usize);

/// One tensor.
struct Tensor<B: Backend> {
    value: B::Full,
    /// The value with its adapter merged in.
    merged: Option<B::Full>,
    /// What products read: the merged value, or the value, rounded to activations' storage.
    product: Option<B::Act>,
}

/// Parameters and what is derived from them.
pub struct Tensors<B: Backend>(Vec<Option<Tensor<B>>>);

impl<B: Backend> Tensors<B> {
    /// Zeroed tensors of the given lengths; `product` and `merged` say which need those forms.
    pub fn new(backend: &B, lengths: &[usize], product: impl Fn(Id) -> bool, merged: impl Fn(Id) -> bool) -> Self {
        let tensor = |(i, &n): (usize, &usize)| Tensor {
            value: backend.full(n),
            merged: merged(Id(i)).then(|| backend.full(n)),
            product: product(Id(i)).then(|| backend.act(n)),
        };
        Self(lengths.iter().enumerate().map(|entry| Some(tensor(entry))).collect())
    }

    fn tensor(&self, id: Id) -> &Tensor<B> {
        match &self.0[id.0] {
            Some(tensor) => tensor,
            None => unreachable!("tensor {} is read while it is made", id.0),
        }
    }

    /// Full-precision value.
    pub fn value(&self, id: Id) -> &B::Full {
        &self.tensor(id).value
    }

    /// Full-precision value with its adapter merged in, if it has one.
    pub fn effective(&self, id: Id) -> &B::Full {
        let tensor = self.tensor(id);
        tensor.merged.as_ref().unwrap_or(&tensor.value)
    }

    /// What products read.
    pub fn product(&self, id: Id) -> &B::Act {
        match &self.tensor(id).product {
            Some(product) => product,
            None => unreachable!("tensor {} is read by a product but not declared so", id.0),
        }
    }

    /// Writes the value of `id`, which may read other tensors.
    pub fn write<R>(&mut self, id: Id, write: impl FnOnce(&Self, &mut B::Full) -> R) -> R {
        let Some(mut tensor) = self.0[id.0].take() else { unreachable!("tensor {} is made from itself", id.0) };
        let result = write(self, &mut tensor.value);
        self.0[id.0] = Some(tensor);
        result
    }

    /// Writes the values of two different tensors.
    pub fn write_two(&mut self, first: Id, second: Id, write: impl FnOnce(&mut B::Full, &mut B::Full)) {
        let Ok([Some(first), Some(second)]) = self.0.get_disjoint_mut([first.0, second.0]) else {
            unreachable!("tensors {} and {} are one", first.0, second.0)
        };
        write(&mut first.value, &mut second.value);
    }

    /// Merges an adapter: `value + scale·B·A`; `size` is (outputs, inputs, rank).
    pub fn merge(&mut self, backend: &B, id: Id, (a, b): (Id, Id), size: (usize, usize, usize), scale: f64) {
        let Some(mut tensor) = self.0[id.0].take() else { unreachable!("tensor {} is its own adapter", id.0) };
        if let Some(merged) = &mut tensor.merged {
            backend.scale(1.0, &tensor.value, merged);
            backend.matrix_product(self.value(b), self.value(a), Transpose::None, size, scale, merged, true);
        }
        self.0[id.0] = Some(tensor);
    }

    /// Refreshes what products read of `id`.
    pub fn refresh(&mut self, backend: &B, id: Id) {
        if let Some(Tensor { value, merged, product: Some(product) }) = &mut self.0[id.0] {
            backend.cast(merged.as_ref().unwrap_or(value), product);
        }
    }
}

/// Gradients that one slot of units sums up; absent where none is wanted.
pub struct Gradients<B: Backend>(Vec<Option<B::Full>>);

impl<B: Backend> Gradients<B> {
    /// Zeroed gradients for the tensors that `wanted` names.
    pub fn new(backend: &B, lengths: &[usize], wanted: impl Fn(Id) -> bool) -> Self {
        Self(lengths.iter().enumerate().map(|(i, &n)| wanted(Id(i)).then(|| backend.full(n))).collect())
    }

    /// The gradient of `id`, if wanted.
    pub fn get(&self, id: Id) -> Option<&B::Full> {
        self.0[id.0].as_ref()
    }

    /// The gradient of `id` to add to, if wanted.
    pub fn get_mut(&mut self, id: Id) -> Option<&mut B::Full> {
        self.0[id.0].as_mut()
    }

    /// The gradients of two different tensors at once, if both are wanted.
    pub fn pair_mut(&mut self, first: Id, second: Id) -> Option<(&mut B::Full, &mut B::Full)> {
        let [first, second] = self.0.get_disjoint_mut([first.0, second.0]).ok()?;
        Some((first.as_mut()?, second.as_mut()?))
    }

    /// Sets all gradients to zero.
    pub fn clear(&mut self, backend: &B) {
        for gradient in self.0.iter_mut().flatten() {
            backend.zero(gradient);
        }
    }

    /// Adds another slot's gradients.
    pub fn add(&mut self, backend: &B, other: &Self) {
        for (own, other) in self.0.iter_mut().zip(&other.0) {
            if let (Some(own), Some(other)) = (own, other) {
                backend.add(other, own);
            }
        }
    }
}
