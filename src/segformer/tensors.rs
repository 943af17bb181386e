//! The numbers of a model on a device: parameters, what products read of them, and their gradients.

use crate::backend::Backend;

/// Position of a tensor in the tables of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Id(pub usize);

/// One tensor.
pub struct Tensor<B: Backend> {
    /// Full-precision value.
    pub value: B::Full,
    /// The value with its adapter merged in.
    pub merged: Option<B::Full>,
    /// What products read: the merged value, or the value, rounded to activations' storage. None where there is nothing to
    /// round ([`crate::backend::Memory::unrounded`]).
    pub product: Option<B::Act>,
}

impl<B: Backend> Tensor<B> {
    /// Full-precision value with its adapter merged in, if it has one.
    pub fn effective(&self) -> &B::Full {
        self.merged.as_ref().unwrap_or(&self.value)
    }
}

/// Parameters and what is derived from them.
pub struct Tensors<B: Backend>(Vec<Tensor<B>>);

/// All tensors at once, each for one user.
pub struct EachTensor<'a, B: Backend>(Vec<Option<&'a mut Tensor<B>>>);

impl<'a, B: Backend> EachTensor<'a, B> {
    /// The tensor `id`, which nobody may have taken before.
    pub fn take(&mut self, id: Id) -> &'a mut Tensor<B> {
        match self.0[id.0].take() {
            Some(tensor) => tensor,
            None => unreachable!("tensor {} is used twice at once", id.0),
        }
    }
}

impl<B: Backend> Tensors<B> {
    /// Zeroed tensors of the given lengths; `product` and `merged` say which need those forms.
    pub fn new(backend: &B, lengths: &[usize], product: impl Fn(Id) -> bool, merged: impl Fn(Id) -> bool) -> Self {
        let tensor = |(i, &n): (usize, &usize)| {
            let value = backend.full(n);
            let rounds = product(Id(i)) && B::unrounded(&value).is_none();
            Tensor { value, merged: merged(Id(i)).then(|| backend.full(n)), product: rounds.then(|| backend.act(n)) }
        };
        Self(lengths.iter().enumerate().map(tensor).collect())
    }

    /// Full-precision value.
    pub fn value(&self, id: Id) -> &B::Full {
        &self.0[id.0].value
    }

    /// Full-precision value to write.
    pub fn value_mut(&mut self, id: Id) -> &mut B::Full {
        &mut self.0[id.0].value
    }

    /// Full-precision value with its adapter merged in, if it has one.
    pub fn effective(&self, id: Id) -> &B::Full {
        self.0[id.0].effective()
    }

    /// What products read.
    pub fn product(&self, id: Id) -> &B::Act {
        let tensor = &self.0[id.0];
        match tensor.product.as_ref().or_else(|| B::unrounded(tensor.effective())) {
            Some(product) => product,
            None => unreachable!("tensor {} is read by a product but not declared so", id.0),
        }
    }

    /// All tensors, for operations that read some and write others.
    pub fn each(&mut self) -> EachTensor<'_, B> {
        EachTensor(self.0.iter_mut().map(Some).collect())
    }

    /// Writes the values of two different tensors.
    pub fn write_two(&mut self, first: Id, second: Id, write: impl FnOnce(&mut B::Full, &mut B::Full)) {
        let Ok([first, second]) = self.0.get_disjoint_mut([first.0, second.0]) else {
            unreachable!("tensors {} and {} are one", first.0, second.0)
        };
        write(&mut first.value, &mut second.value);
    }

    /// Refreshes what products read of `id`.
    pub fn refresh(&mut self, backend: &B, id: Id) {
        if let Tensor { value, merged, product: Some(product) } = &mut self.0[id.0] {
            backend.cast(merged.as_ref().unwrap_or(value), product);
        }
    }
}

/// All gradients at once, each for one user; absent where none is wanted.
pub struct EachGradient<'a, B: Backend>(Vec<Option<&'a mut B::Full>>);

impl<'a, B: Backend> EachGradient<'a, B> {
    /// The gradient of `id`, if it is wanted and was not taken before.
    pub fn take(&mut self, id: Id) -> Option<&'a mut B::Full> {
        self.0[id.0].take()
    }

    /// The same, to be read by several.
    pub fn take_shared(&mut self, id: Id) -> Option<&'a B::Full> {
        self.take(id).map(|gradient| &*gradient)
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

    /// All gradients, for operations that read some and write others.
    pub fn each(&mut self) -> EachGradient<'_, B> {
        EachGradient(self.0.iter_mut().map(Option::as_mut).collect())
    }

    /// Sets all gradients to zero.
    pub fn clear(&mut self, backend: &B) {
        backend.zero_all(&mut self.0.iter_mut().flatten().collect::<Vec<_>>());
    }

    /// Adds other slots' gradients, in order.
    pub fn add(&mut self, backend: &B, others: &[Self]) {
        let others_of = |i: usize| others.iter().filter_map(|other| other.0[i].as_ref()).collect::<Vec<_>>();
        let sums = self.0.iter_mut().enumerate().filter_map(|(i, own)| Some((others_of(i), own.as_mut()?)));
        backend.add_all(&mut sums.filter(|(others, _)| !others.is_empty()).collect::<Vec<_>>());
    }
}
