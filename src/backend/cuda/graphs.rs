//! Pieces of a step that come again and again: recorded once, then repeated by the device without the host's help.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::Ordering;

use super::memory::locked;
use super::pictures::{Addresses, Brought, Part, bytes_to_bring};
use super::{Argument, Cuda, Device};
use crate::backend::{AdamW, Batch, Dropout, Inputs, Sample};
use crate::error::Kind;
use crate::{Error, Result};

/// Batches that one recording takes at most: the driver keeps every launch of it, beside what a run has planned.
const WHOLE: usize = 16;

/// What the caller says that a piece of work depends on, and where its inputs lie.
type Key = (Vec<u64>, Brought);

/// A piece of work that was done once, so that all it needs is there.
struct Work<D: Device> {
    /// Its recording, if there is one.
    graph: Option<D::Graph>,
    /// Whether the run at hand has asked for it.
    used: bool,
}

/// Pieces of work met so far.
struct Known<D: Device> {
    works: HashMap<Key, Work<D>>,
    /// Arrays that were gone when the recordings were last used.
    gone: usize,
}

/// The same, behind a mutex.
pub(super) struct Graphs<D: Device>(Mutex<Known<D>>);

impl<D: Device> Known<D> {
    fn forget(&mut self) {
        self.works.values_mut().for_each(|work| work.graph = None);
    }
}

impl<D: Device> Graphs<D> {
    pub(super) fn new() -> Self {
        Self(Mutex::new(Known { works: HashMap::new(), gone: 0 }))
    }

    /// Forgets the recordings, which name memory that is about to go.
    pub(super) fn forget(&self) {
        locked(&self.0).forget();
    }

    /// Forgets what the run at hand has not asked for, so that runs leave no more and more of it.
    pub(super) fn renew(&self) {
        locked(&self.0).works.retain(|_, work| std::mem::take(&mut work.used));
    }
}

/// Inputs of the work at hand, as the caller announced them and as they lie on the device.
pub(super) struct Announced {
    /// Of each batch where its samples stand on the host, and how many: they are borrowed for as long as this lives; and its
    /// step.
    batches: Vec<((*const (), usize), u32)>,
    size: usize,
    rates: Option<[f32; 3]>,
    at: Brought,
}

// SAFETY: the pointers are only compared.
unsafe impl Send for Announced {}

/// What of the pictures is brought: their labels too, if all have them.
fn parts(inputs: &Inputs<'_>) -> &'static [Part] {
    let mut samples = inputs.batches.iter().flat_map(|batch| batch.samples);
    let labelled = samples.all(|sample| sample.labels.len() >= Part::Labels.len(inputs.size));
    if labelled { &[Part::Pixels, Part::Labels] } else { &[Part::Pixels] }
}

fn identity(samples: &[Sample<'_>]) -> (*const (), usize) {
    (samples.as_ptr().cast(), samples.len())
}

/// What AdamW takes anew at every update: 1 - lr·weight decay, lr / (1 - beta1^t), sqrt(1 - beta2^t).
fn rates(update: &AdamW) -> [f32; 3] {
    let ([beta1, beta2], steps) = (update.betas, update.step as f64);
    let rates = [
        1.0 - update.lr * update.weight_decay,
        update.lr / (1.0 - beta1.powf(steps)),
        (1.0 - beta2.powf(steps)).sqrt(),
    ];
    rates.map(|x| x as f32)
}

impl<D: Device> Cuda<D> {
    /// Brings `inputs` to the device, then repeats `work`: the first time it is done, the second time recorded, from then on
    /// the recording is replayed.
    pub(super) fn repeat_work(&self, key: &[u64], inputs: &Inputs<'_>, work: &mut dyn FnMut()) {
        if locked(&self.announced).is_some() {
            return work();
        }
        let rates = inputs.update.as_ref().map(rates);
        let at = match (inputs.batches, rates) {
            ([], None) => Brought::default(),
            _ => self.bring(rates.unwrap_or_default(), inputs.batches, inputs.size, parts(inputs)),
        };
        let batches = inputs.batches.iter().map(|batch| (identity(batch.samples), batch.step)).collect();
        *locked(&self.announced) = Some(Announced { batches, size: inputs.size, rates, at: at.clone() });
        self.repeat_announced((key.to_vec(), at), work);
        *locked(&self.announced) = None;
    }

    /// Whether work on all batches is recorded as a whole: if they are few, and what it takes from the host fits into the room
    /// that the largest takes with its pictures, which any run has planned. What goes with pictures that stay on the device does.
    pub(super) fn records_all(&self, inputs: &Inputs<'_>) -> bool {
        let (batches, size) = (inputs.batches, inputs.size);
        let largest = batches.iter().max_by_key(|batch| batch.samples.len()).map_or(&[][..], std::slice::from_ref);
        let all = bytes_to_bring(batches, size, self.missing(batches, size, parts(inputs)));
        let records = self.device().records() && locked(&self.refusal).is_none();
        records && batches.len() <= WHOLE && all <= bytes_to_bring(largest, size, &[Part::Pixels, Part::Labels])
    }

    fn repeat_announced(&self, key: Key, work: &mut dyn FnMut()) {
        if !self.device().records() || locked(&self.refusal).is_some() {
            return work();
        }
        {
            let mut known = locked(&self.graphs.0);
            let gone = self.gone.load(Ordering::Relaxed);
            if known.gone != gone {
                known.gone = gone;
                known.forget();
            }
            let Some(found) = known.works.get_mut(&key) else {
                drop(known);
                work();
                locked(&self.graphs.0).works.insert(key, Work { graph: None, used: true });
                return;
            };
            found.used = true;
            if let Some(graph) = &found.graph {
                // SAFETY: what was recorded names rooms and tables, which live as long as this unless recordings are
                // forgotten, pictures likewise, and arrays, of which none has gone since.
                return self.attempt(|device| unsafe { device.replay(graph) }).unwrap_or_default();
            }
        }
        if locked(&self.failure).is_some() {
            return;
        }
        let recorded = self.device().record(work);
        let failed = locked(&self.failure).take();
        match failed.map_or(recorded, Err) {
            Ok(graph) => {
                // SAFETY: as above.
                self.attempt(|device| unsafe { device.replay(&graph) });
                if let Some(found) = locked(&self.graphs.0).works.get_mut(&key) {
                    found.graph = Some(graph);
                }
            }
            Err(defect) if defect.kind == Kind::Internal => *locked(&self.failure) = Some(defect),
            // Nothing has been done yet, and what cannot be recorded may well be done.
            Err(refusal) => {
                *locked(&self.refusal) = Some(refusal);
                work();
            }
        }
    }

    fn not_announced(&self, what: &str) {
        self.attempt(|_| -> Result<()> {
            Err(Error::new(
                Kind::Internal,
                format!(
                    "repeated work reads {what} that were not announced: a defect in segpeft-native, please report it"
                ),
            ))
        });
    }

    /// Where a part of `samples`, and what goes with it, lies: as announced, or brought now, until the next call.
    pub(super) fn samples_at(&self, samples: &[Sample<'_>], size: usize, part: Part) -> Addresses {
        let Some(announced) = &*locked(&self.announced) else {
            return self.bring([0.0; 3], &[Batch { samples, step: 0 }], size, &[part]).batches[0];
        };
        let mut batches = announced.batches.iter().zip(&announced.at.batches);
        match batches.find(|((known, _), at)| *known == identity(samples) && at.part(part) != 0) {
            Some((_, at)) if announced.size == size => *at,
            _ => {
                self.not_announced("pictures");
                Addresses::default()
            }
        }
    }

    /// A dropout as the six arguments that kernels take; none keeps everything.
    pub(super) fn dropout_arguments(&self, drop: Option<Dropout>) -> [Argument; 6] {
        let Some(Dropout { rate, stream, first }) = drop.filter(|drop| drop.rate > 0.0) else {
            let zero = Argument::U32(0);
            return [zero, zero, zero, Argument::pointer(0), Argument::U64(0), Argument::F32(0.0)];
        };
        let [key0, key1, site, step] = stream.identity();
        let at = match &*locked(&self.announced) {
            None => self.bring([0.0; 3], &[Batch { samples: &[], step }], 0, &[]).batches[0].step,
            Some(announced) => match announced.batches.iter().position(|&(_, known)| known == step) {
                Some(i) => announced.at.batches[i].step,
                None => {
                    self.not_announced("random numbers");
                    0
                }
            },
        };
        let [key0, key1, site] = [key0, key1, site].map(Argument::U32);
        [key0, key1, site, Argument::pointer(at), Argument::U64(first), Argument::F32(rate)]
    }

    /// The factor of what a dropout keeps, as an argument.
    pub(super) fn kept_factor(drop: Option<Dropout>) -> Argument {
        Argument::F32(drop.map_or(1.0, |drop| 1.0 / (1.0 - drop.rate)))
    }

    /// Where what changes from update to update lies.
    pub(super) fn rates_at(&self, update: &AdamW) -> Argument {
        let rates = rates(update);
        let at = match &*locked(&self.announced) {
            None => self.bring(rates, &[], 0, &[]).rates,
            Some(announced) => {
                if announced.rates != Some(rates) {
                    self.not_announced("rates");
                }
                announced.at.rates
            }
        };
        Argument::pointer(at)
    }
}
