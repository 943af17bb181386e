//! Reading `pytorch_model.bin`: a zip archive with a pickle that describes the tensors and one entry per storage.
//!
//! Entries must be stored without compression, as torch writes them, so every byte that is read exists in the file and
//! no archive expands. Storages together may not be longer than the file, tensors together not longer than four times.

use std::io::{Cursor, Read};
use std::path::Path;

use zip::{CompressionMethod, ZipArchive};

use super::element::quoted;
use super::pickle::{self, LONGEST_PICKLE, TensorView};
use super::{HostTensor, StateDict, file};
use crate::error::{self, Error};

/// Reads a state dict that `torch.save` of PyTorch 1.6 or later has written, without executing anything in it.
/// F16, BF16, F32 and F64 come as f32, integers as i64.
///
/// # Errors
/// A missing, malformed or hostile file, anything but tensors by name in it, NaN or infinity: one line that names the file.
pub fn read_torch(path: &Path) -> error::Result<StateDict> {
    let bytes = file::map(path)?;
    read(&bytes).map_err(|problem| Error::input(path, problem))
}

fn read(bytes: &[u8]) -> Result<StateDict, String> {
    if !bytes.starts_with(b"PK") {
        return Err(if bytes.starts_with(b"\x80") {
            "is in PyTorch's format from before 1.6; load it in Python and save it anew with model.save_pretrained(...)"
        } else {
            "is no PyTorch state dict; fetch it again"
        }
        .into());
    }
    let archive = ZipArchive::new(Cursor::new(bytes)).map_err(|e| format!("is no sound zip archive: {}", plain(&e)))?;
    let mut archive = Archive { archive, longest: bytes.len() as u64 };
    let folder = archive.folder()?;
    if archive.archive.index_for_name(&format!("{folder}/byteorder")).is_some()
        && archive.entry(&format!("{folder}/byteorder"), |n| n < 16)? != b"little"
    {
        return Err("holds big-endian numbers; save it anew on a little-endian machine".into());
    }
    let described = pickle::state_dict(&archive.entry(&format!("{folder}/data.pkl"), |n| n <= LONGEST_PICKLE)?)?;

    let file = bytes.len();
    let lengths = described.storages.iter().map(|s| s.len.checked_mul(s.element.size()));
    let stored = lengths.clone().try_fold(0usize, |sum, n| sum.checked_add(n?));
    if stored.is_none_or(|n| n > file) {
        return Err("declares more numbers than the file holds; fetch it again".into());
    }
    let view_bytes = |t: &TensorView| t.shape.iter().product::<usize>() * described.storages[t.storage].element.size();
    if described.tensors.iter().try_fold(0usize, |n, (_, t)| n.checked_add(view_bytes(t))).is_none_or(|n| n / 4 > file)
    {
        return Err("declares tensors that repeat the file's contents more than four times; fetch it again".into());
    }

    // Storage by storage, so that only one is held beside the result.
    let mut tensors = described.tensors;
    tensors.sort_by_key(|(_, view)| view.storage);
    let mut held = (usize::MAX, Vec::new());
    let mut state = StateDict::new();
    for (name, view) in tensors {
        let storage = &described.storages[view.storage];
        if held.0 != view.storage {
            let expected = (storage.len * storage.element.size()) as u64;
            held = (view.storage, archive.entry(&format!("{folder}/data/{}", storage.key), |n| n == expected)?);
        }
        let of_tensor = |problem: String| format!("tensor {} {problem}", quoted(&name));
        let data = storage.element.decode(&gathered(&held.1, &view, storage.element.size())).map_err(of_tensor)?;
        if state.insert(name.clone(), HostTensor { shape: view.shape, data }).is_some() {
            return Err(of_tensor("occurs twice; fetch the file again".into()));
        }
    }
    Ok(state)
}

/// The bytes of a view's elements in C order; elements have `size` bytes.
fn gathered(storage: &[u8], view: &TensorView, size: usize) -> Vec<u8> {
    let count = view.shape.iter().product::<usize>();
    let mut bytes = Vec::with_capacity(count * size);
    if count == 0 {
        return bytes;
    }
    // The longest run of trailing dimensions that lie densely is copied at once.
    let mut run = 1;
    let mut dense = view.shape.len();
    while dense > 0 && (view.strides[dense - 1] == run || view.shape[dense - 1] == 1) {
        run *= view.shape[dense - 1];
        dense -= 1;
    }
    let mut index = vec![0; dense];
    loop {
        let at: usize = view.offset + index.iter().zip(&view.strides).map(|(i, stride)| i * stride).sum::<usize>();
        bytes.extend_from_slice(&storage[at * size..(at + run) * size]);
        let Some(axis) = (0..dense).rev().find(|&axis| index[axis] + 1 < view.shape[axis]) else { return bytes };
        index[axis] += 1;
        index[axis + 1..].fill(0);
    }
}

/// A zip archive whose entries are stored, not compressed.
struct Archive<'a> {
    archive: ZipArchive<Cursor<&'a [u8]>>,
    /// Length of the file, in bytes.
    longest: u64,
}

impl Archive<'_> {
    /// The one folder at the top that holds `data.pkl`.
    fn folder(&self) -> Result<String, String> {
        let mut folders = self.archive.file_names_raw().filter_map(|name| {
            let folder = name.strip_suffix(b"/data.pkl")?;
            (!folder.contains(&b'/')).then(|| String::from_utf8(folder.to_vec()).ok()).flatten()
        });
        match (folders.next(), folders.next()) {
            (Some(folder), None) => Ok(folder),
            (None, _) => Err("is a zip archive without data.pkl, not a PyTorch state dict; check the path".into()),
            (Some(_), Some(_)) => Err("holds several data.pkl; fetch it again".into()),
        }
    }

    /// Reads an entry and checks its CRC. `fits` tells whether its length in bytes is as expected.
    fn entry(&mut self, name: &str, fits: impl Fn(u64) -> bool) -> Result<Vec<u8>, String> {
        let unsound =
            |e: &dyn std::fmt::Display| format!("entry {} is unsound ({}); fetch it again", quoted(name), plain(e));
        let mut entry = self.archive.by_name(name).map_err(|e| unsound(&e))?;
        if entry.compression() != CompressionMethod::Stored {
            let remedy = "torch stores without compression: save it anew with torch.save";
            return Err(format!("entry {} is compressed; {remedy}", quoted(name)));
        }
        let size = entry.size();
        if !fits(size) || size != entry.compressed_size() || size > self.longest {
            return Err(unsound(&format!("its length of {size} bytes is not what the state dict declares")));
        }
        let mut bytes = Vec::with_capacity(size as usize);
        entry.by_ref().take(size + 1).read_to_end(&mut bytes).map_err(|e| unsound(&e))?;
        if bytes.len() as u64 != size {
            return Err(unsound(&"the file ends within it"));
        }
        Ok(bytes)
    }
}

/// A library's message as one line.
fn plain(message: &dyn std::fmt::Display) -> String {
    message.to_string().escape_debug().to_string()
}
