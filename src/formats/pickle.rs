//! A pickle machine that knows what a PyTorch state dict is made of, and nothing else.
//!
//! A pickle is a program; Python's own machine calls whatever it names. This one has no call: `REDUCE` on one of three
//! known functions builds a value of this module, any other global is refused by name before it could be used. Values
//! live in an arena and refer to each other by index, so nesting costs no stack, and each opcode adds at most one value:
//! memory is bounded by the pickle's length, which [`LONGEST_PICKLE`] bounds.

use std::collections::HashMap;

use super::element::{Element, MOST_DIMENSIONS, check_name, quoted};

/// Longest pickle that is run, in bytes. The largest SegFormer's has 300 KB.
pub(super) const LONGEST_PICKLE: u64 = 4 << 20;

/// What to do about a file that holds anything but tensors by name.
const REMEDY: &str =
    "only a bare state dict is read: in Python, torch.save(model.state_dict(), ...) or model.save_pretrained(...)";

/// A run of numbers, stored in its own entry of the archive.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Storage {
    /// Name of the entry.
    pub key: String,
    pub element: Element,
    /// Numbers in it.
    pub len: usize,
}

/// A view of a storage. Every index it reaches lies inside, and it has no more elements than the storage.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct TensorView {
    /// Index into [`Tensors::storages`].
    pub storage: usize,
    /// In elements.
    pub offset: usize,
    pub shape: Vec<usize>,
    /// In elements.
    pub strides: Vec<usize>,
}

/// What a state dict's pickle describes.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Tensors {
    pub storages: Vec<Storage>,
    /// By name, in the file's order.
    pub tensors: Vec<(String, TensorView)>,
}

#[derive(Clone, Copy, PartialEq)]
enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Storage(Element),
}

/// A value on the machine's stack; indices refer to the machine's arenas.
#[derive(Clone, Copy, PartialEq)]
enum Value {
    None,
    Bool,
    Int(i64),
    Global(Global),
    Text(usize),
    Tuple(usize),
    Dict(usize),
    Storage(usize),
    Tensor(usize),
}

#[derive(Default)]
struct Machine {
    stack: Vec<Value>,
    /// Heights of the stack at which a mark lies.
    marks: Vec<usize>,
    memo: HashMap<u32, Value>,
    texts: Vec<String>,
    tuples: Vec<Vec<Value>>,
    dicts: Vec<Vec<(Value, Value)>>,
    storages: Vec<Storage>,
    /// Storages by key.
    known: HashMap<String, usize>,
    tensors: Vec<TensorView>,
}

/// Runs the pickle of a state dict.
///
/// # Errors
/// What was refused, with the remedy, to be put behind the file's name.
pub(super) fn state_dict(pickle: &[u8]) -> Result<Tensors, String> {
    let mut machine = Machine::default();
    let mut input = Input { bytes: pickle, at: 0 };
    loop {
        let at = input.at;
        let op = input.take::<1>()?[0];
        if op == b'.' {
            let top = machine.pop()?;
            return machine.finish(top);
        }
        machine.step(op, at, &mut input)?;
    }
}

impl Machine {
    fn step(&mut self, op: u8, at: usize, input: &mut Input<'_>) -> Result<(), String> {
        match op {
            0x80 => match input.take::<1>()?[0] {
                2..=5 => {}
                other => return Err(format!("its pickle has protocol {other}; 2 to 5 are known")),
            },
            // FRAME: a hint on reading ahead.
            0x95 => drop(input.take::<8>()?),
            b'(' => self.marks.push(self.stack.len()),
            b'N' => self.stack.push(Value::None),
            0x88 | 0x89 => self.stack.push(Value::Bool),
            b'J' => self.stack.push(Value::Int(i32::from_le_bytes(input.take()?).into())),
            b'K' => self.stack.push(Value::Int(input.take::<1>()?[0].into())),
            b'M' => self.stack.push(Value::Int(u16::from_le_bytes(input.take()?).into())),
            // LONG1
            0x8a => {
                let length = input.take::<1>()?[0].into();
                let bytes = input.slice(length)?;
                let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
                let mut wide = [if negative { 0xff } else { 0 }; 8];
                wide.get_mut(..length).ok_or("its pickle holds an integer beyond 64 bits")?.copy_from_slice(bytes);
                self.stack.push(Value::Int(i64::from_le_bytes(wide)));
            }
            b'X' => {
                let length = u32::from_le_bytes(input.take()?);
                self.push_text(input.slice(length as usize)?)?;
            }
            // SHORT_BINUNICODE
            0x8c => {
                let length = input.take::<1>()?[0];
                self.push_text(input.slice(length.into())?)?;
            }
            b')' => self.push_tuple(Vec::new()),
            0x85 => self.tuple_of(1)?,
            0x86 => self.tuple_of(2)?,
            0x87 => self.tuple_of(3)?,
            b't' => {
                let items = self.pop_to_mark()?;
                self.push_tuple(items);
            }
            b'}' => self.push_dict(),
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.dict_on_top()?.push((key, value));
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                let (pairs, rest) = items.as_chunks::<2>();
                if !rest.is_empty() {
                    return Err(damaged("a key without a value"));
                }
                self.dict_on_top()?.extend(pairs.iter().map(|&[key, value]| (key, value)));
            }
            // BUILD: `OrderedDict.__dict__`, in which torch keeps the versions of the modules.
            b'b' => {
                let state = self.pop()?;
                self.dict_on_top()?;
                if !matches!(state, Value::Dict(_)) {
                    return Err(damaged("a state that is no dict"));
                }
            }
            b'q' => self.memoize(input.take::<1>()?[0].into())?,
            b'r' => self.memoize(u32::from_le_bytes(input.take()?))?,
            // MEMOIZE
            0x94 => self.memoize(self.memo.len() as u32)?,
            b'h' => self.recall(input.take::<1>()?[0].into())?,
            b'j' => self.recall(u32::from_le_bytes(input.take()?))?,
            b'c' => {
                let (module, name) = (input.line()?, input.line()?);
                self.stack.push(Value::Global(global(module, name)?));
            }
            // STACK_GLOBAL
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let found = global(self.text(module)?, self.text(name)?)?;
                self.stack.push(Value::Global(found));
            }
            b'Q' => {
                let id = self.pop()?;
                self.load_storage(id)?;
            }
            b'R' => {
                let (arguments, function) = (self.pop()?, self.pop()?);
                self.reduce(function, arguments)?;
            }
            other => return Err(format!("its pickle holds opcode 0x{other:02x} at byte {at}; {REMEDY}")),
        }
        Ok(())
    }

    /// Builds what the call of a known function yields.
    fn reduce(&mut self, function: Value, arguments: Value) -> Result<(), String> {
        let arguments = self.tuple(arguments)?;
        match (function, arguments) {
            (Value::Global(Global::OrderedDict), []) => self.push_dict(),
            // (tensor, requires_grad, backward_hooks)
            (Value::Global(Global::RebuildParameter), &[tensor @ Value::Tensor(_), _, _]) => self.stack.push(tensor),
            // (storage, offset, size, stride, requires_grad, backward_hooks[, metadata])
            (
                Value::Global(Global::RebuildTensor),
                &[Value::Storage(storage), Value::Int(offset), Value::Tuple(size), Value::Tuple(stride), _, _]
                | &[Value::Storage(storage), Value::Int(offset), Value::Tuple(size), Value::Tuple(stride), _, _, _],
            ) => {
                let (shape, strides) = (self.extents(size)?, self.extents(stride)?);
                let offset = usize::try_from(offset).map_err(|_| damaged("a negative offset"))?;
                check_view(&self.storages[storage], offset, &shape, &strides)?;
                self.stack.push(Value::Tensor(self.tensors.len()));
                self.tensors.push(TensorView { storage, offset, shape, strides });
            }
            _ => return Err(damaged("a call with unknown arguments")),
        }
        Ok(())
    }

    /// Replaces `("storage", type, key, location, length)` by the storage.
    fn load_storage(&mut self, id: Value) -> Result<(), String> {
        let &[tag, Value::Global(Global::Storage(element)), key, _location, Value::Int(len)] = self.tuple(id)? else {
            return Err(damaged("a reference to something that is no storage"));
        };
        let (tag, key) = (self.text(tag)?, self.text(key)?.to_owned());
        if tag != "storage" || key.is_empty() || key.len() > 64 || !key.bytes().all(|b| b.is_ascii_alphanumeric()) {
            return Err(damaged("a reference to something that is no storage"));
        }
        let len = usize::try_from(len).map_err(|_| damaged("a storage of negative length"))?;
        let storage = Storage { key: key.clone(), element, len };
        let index = *self.known.entry(key).or_insert_with(|| {
            self.storages.push(storage.clone());
            self.storages.len() - 1
        });
        if self.storages[index] != storage {
            return Err(damaged("one storage with two types or lengths"));
        }
        self.stack.push(Value::Storage(index));
        Ok(())
    }

    /// The tensors of the dict that the pickle leaves.
    fn finish(self, top: Value) -> Result<Tensors, String> {
        let Value::Dict(dict) = top else { return Err(format!("holds no dict of tensors; {REMEDY}")) };
        let mut tensors = Vec::new();
        for &(key, value) in &self.dicts[dict] {
            let name = self.text(key)?;
            check_name(name)?;
            let Value::Tensor(tensor) = value else {
                return Err(format!("its entry {} is no tensor; {REMEDY}", quoted(name)));
            };
            tensors.push((name.to_owned(), self.tensors[tensor].clone()));
        }
        Ok(Tensors { storages: self.storages, tensors })
    }

    /// Takes the top of the stack, which must lie above the last mark.
    fn pop(&mut self) -> Result<Value, String> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err(damaged("too few values on the stack"));
        }
        self.stack.pop().ok_or_else(|| damaged("too few values on the stack"))
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Value>, String> {
        let mark = self.marks.pop().ok_or_else(|| damaged("no mark on the stack"))?;
        Ok(self.stack.split_off(mark))
    }

    fn tuple_of(&mut self, count: usize) -> Result<(), String> {
        let mut items = Vec::with_capacity(count);
        for _ in 0..count {
            items.push(self.pop()?);
        }
        items.reverse();
        self.push_tuple(items);
        Ok(())
    }

    fn push_tuple(&mut self, items: Vec<Value>) {
        self.stack.push(Value::Tuple(self.tuples.len()));
        self.tuples.push(items);
    }

    fn push_dict(&mut self) {
        self.stack.push(Value::Dict(self.dicts.len()));
        self.dicts.push(Vec::new());
    }

    fn push_text(&mut self, bytes: &[u8]) -> Result<(), String> {
        let text = std::str::from_utf8(bytes).map_err(|_| damaged("text that is not UTF-8"))?;
        self.stack.push(Value::Text(self.texts.len()));
        self.texts.push(text.to_owned());
        Ok(())
    }

    fn memoize(&mut self, key: u32) -> Result<(), String> {
        let top = self.pop()?;
        self.stack.push(top);
        self.memo.insert(key, top);
        Ok(())
    }

    fn recall(&mut self, key: u32) -> Result<(), String> {
        let value = *self.memo.get(&key).ok_or_else(|| damaged("a reference to nothing"))?;
        self.stack.push(value);
        Ok(())
    }

    fn dict_on_top(&mut self) -> Result<&mut Vec<(Value, Value)>, String> {
        match self.stack.last() {
            Some(&Value::Dict(dict)) => Ok(&mut self.dicts[dict]),
            _ => Err(damaged("entries for something that is no dict")),
        }
    }

    fn text(&self, value: Value) -> Result<&str, String> {
        match value {
            Value::Text(text) => Ok(&self.texts[text]),
            _ => Err(format!("its pickle holds a name that is no text; {REMEDY}")),
        }
    }

    fn tuple(&self, value: Value) -> Result<&[Value], String> {
        match value {
            Value::Tuple(tuple) => Ok(&self.tuples[tuple]),
            _ => Err(damaged("arguments that are no tuple")),
        }
    }

    /// A tuple of sizes or strides.
    fn extents(&self, tuple: usize) -> Result<Vec<usize>, String> {
        let items = &self.tuples[tuple];
        if items.len() > MOST_DIMENSIONS {
            return Err(damaged("a tensor of too many dimensions"));
        }
        let extent = |item: &Value| match *item {
            Value::Int(n) => usize::try_from(n).map_err(|_| damaged("a negative size or stride")),
            _ => Err(damaged("a size or stride that is no integer")),
        };
        items.iter().map(extent).collect()
    }
}

/// Checks that a view stays inside its storage and repeats none of it by more than its size.
fn check_view(storage: &Storage, offset: usize, shape: &[usize], strides: &[usize]) -> Result<(), String> {
    let outside = || damaged("a tensor that reaches outside its storage");
    if shape.len() != strides.len() {
        return Err(damaged("a tensor with more sizes than strides, or fewer"));
    }
    let count = shape.iter().try_fold(1usize, |n, &extent| n.checked_mul(extent)).ok_or_else(outside)?;
    if count == 0 {
        return Ok(());
    }
    let last = shape.iter().zip(strides).try_fold(offset, |last, (&extent, &stride)| {
        (extent - 1).checked_mul(stride).and_then(|step| last.checked_add(step))
    });
    if count > storage.len || last.is_none_or(|last| last >= storage.len) {
        return Err(outside());
    }
    Ok(())
}

/// The global `module.name`, if a state dict may use it.
fn global(module: &str, name: &str) -> Result<Global, String> {
    Ok(match (module, name) {
        ("collections", "OrderedDict") => Global::OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2") => Global::RebuildTensor,
        ("torch._utils", "_rebuild_parameter") => Global::RebuildParameter,
        ("torch", "HalfStorage") => Global::Storage(Element::F16),
        ("torch", "BFloat16Storage") => Global::Storage(Element::Bf16),
        ("torch", "FloatStorage") => Global::Storage(Element::F32),
        ("torch", "DoubleStorage") => Global::Storage(Element::F64),
        ("torch", "ByteStorage") => Global::Storage(Element::U8),
        ("torch", "CharStorage") => Global::Storage(Element::I8),
        ("torch", "ShortStorage") => Global::Storage(Element::I16),
        ("torch", "IntStorage") => Global::Storage(Element::I32),
        ("torch", "LongStorage") => Global::Storage(Element::I64),
        _ => {
            let wanted = quoted(&format!("{module}.{name}"));
            return Err(format!("its pickle asks for {wanted}, which was refused (nothing in it was run); {REMEDY}"));
        }
    })
}

fn damaged(what: &str) -> String {
    format!("its pickle is damaged or hostile ({what}); fetch it again")
}

/// The pickle's bytes and how far they have been read.
struct Input<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Input<'a> {
    fn slice(&mut self, length: usize) -> Result<&'a [u8], String> {
        let slice = self.bytes[self.at..].get(..length).ok_or_else(|| damaged("it ends too soon"))?;
        self.at += length;
        Ok(slice)
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let chunk = self.bytes[self.at..].first_chunk().copied().ok_or_else(|| damaged("it ends too soon"))?;
        self.at += N;
        Ok(chunk)
    }

    fn line(&mut self) -> Result<&'a str, String> {
        let length =
            self.bytes[self.at..].iter().position(|&b| b == b'\n').ok_or_else(|| damaged("it ends too soon"))?;
        let line = std::str::from_utf8(self.slice(length)?).map_err(|_| damaged("text that is not UTF-8"))?;
        self.at += 1;
        Ok(line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `{"w": tensor}` with the given numbers, as torch writes it.
    fn pickle(len: u8, offset: u8, size: [u8; 2], stride: [u8; 2]) -> Vec<u8> {
        let mut p = b"\x80\x02}q\x00X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n((".to_vec();
        p.extend(b"X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK");
        p.extend([len, b't', b'Q', b'K', offset, b'K', size[0], b'K', size[1], 0x86]);
        p.extend([b'K', stride[0], b'K', stride[1], 0x86, 0x89]);
        p.extend(b"ccollections\nOrderedDict\n)RtRs.");
        p
    }

    #[test]
    fn a_tensor_is_described() {
        let got = state_dict(&pickle(6, 0, [3, 2], [1, 3])).unwrap();
        assert_eq!(got.storages, [Storage { key: "0".into(), element: Element::F32, len: 6 }]);
        let view = TensorView { storage: 0, offset: 0, shape: vec![3, 2], strides: vec![1, 3] };
        assert_eq!(got.tensors, [("w".into(), view)]);
    }

    #[test]
    fn views_outside_the_storage_are_refused() {
        for bad in [
            pickle(6, 1, [3, 2], [1, 3]),
            pickle(6, 0, [3, 2], [2, 2]),
            pickle(6, 0, [200, 200], [0, 0]),
            pickle(0, 0, [1, 1], [1, 1]),
        ] {
            let error = state_dict(&bad).unwrap_err();
            assert!(error.contains("outside its storage"), "{error}");
        }
        assert!(state_dict(&pickle(0, 9, [0, 2], [1, 1])).is_ok());
    }

    #[test]
    fn nothing_foreign_is_run() {
        for (bad, name) in [
            (&b"cos\nsystem\nX\x02\x00\x00\x00id\x85R."[..], "\"os.system\""),
            (b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x02id\x85R.", "\"posix.system\""),
            (b"\x80\x02cbuiltins\neval\n.", "\"builtins.eval\""),
            (b"\x80\x02ctorch._utils\n_rebuild_tensor_v3\n.", "_rebuild_tensor_v3"),
            (b"\x80\x02ca\x1b\nb\n.", "\\u{1b}"),
        ] {
            let error = state_dict(bad).map(|_| ()).unwrap_err();
            assert!(error.contains("asks for") && error.contains(name), "{error}");
        }
        // INST and OBJ would make instances, EXT1 look up a registry, NEWOBJ call __new__.
        for op in [b'i', b'o', 0x81, 0x82, 0x92] {
            let error = state_dict(&[0x80, 2, b'(', op, 1, b'.']).unwrap_err();
            assert!(error.contains("opcode 0x"), "{error}");
        }
    }

    #[test]
    fn damage_anywhere_is_an_error_not_a_panic() {
        let whole = pickle(6, 0, [3, 2], [1, 3]);
        for cut in 0..whole.len() {
            assert!(state_dict(&whole[..cut]).is_err(), "cut at {cut}");
        }
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut bad = whole.clone();
                bad[at] ^= 1 << bit;
                if let Err(e) = state_dict(&bad) {
                    assert!(!e.contains('\n') && e.len() < 500, "{e}");
                }
            }
        }
    }

    #[test]
    fn machine_rules_hold() {
        for bad in [
            &b"."[..],
            b")0.",
            b"((t.",
            b"(s.",
            b"}(Nu.",
            b"NNs.",
            b"}Nb.",
            b"h\x05.",
            b"q\x00.",
            b"\x8a\x09\x01\x01\x01\x01\x01\x01\x01\x01\x01.",
            b"X\xff\xff\xff\xffabc.",
            b"\x80\x09.",
            b"N.",
            b"}NNs.",
            b"}X\x01\x00\x00\x00a}s.",
            b"}X\x01\x00\x00\x00\x07}s.",
            b"NQ.",
            b")R.",
            b"ccollections\nOrderedDict\nN\x85R.",
        ] {
            assert!(state_dict(bad).is_err(), "{bad:?}");
        }
        // A dict inside itself, and a million nested tuples, are only values that are no tensors.
        assert!(state_dict(b"}q\x00X\x01\x00\x00\x00ah\x00s.").unwrap_err().contains("no tensor"));
        let mut deep = b"}X\x01\x00\x00\x00a)".to_vec();
        deep.extend(std::iter::repeat_n(0x85, 1_000_000));
        deep.extend(b"s.");
        assert!(state_dict(&deep).unwrap_err().contains("no tensor"));
    }
}
