//! Reading and writing safetensors.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensorError, SafeTensors, View};

use super::element::{Element, MOST_DIMENSIONS, check_name, quoted};
use super::{HostData, HostTensor, StateDict, file};
use crate::error::{Error, Kind, Result};
use crate::files;

/// The metadata that transformers and peft expect in their files.
pub const PT_METADATA: &[(&str, &str)] = &[("format", "pt")];

/// Longest header that is parsed, in bytes. The largest SegFormer's has 150 KB.
const LONGEST_HEADER: u64 = 8 << 20;

const _: () = assert!(cfg!(target_endian = "little"), "tensors are written as they lie in memory, little-endian");

/// Reads every tensor of a safetensors file: F16, BF16, F32 and F64 as f32, integers as i64.
///
/// # Errors
/// A missing or malformed file, an unsupported number type, NaN or infinity: one line that names file and tensor.
pub fn read_safetensors(path: &Path) -> Result<StateDict> {
    let bytes = file::map(path)?;
    if let Some(length) = bytes.first_chunk().map(|b| u64::from_le_bytes(*b))
        && length > LONGEST_HEADER
    {
        let problem = format!("its header claims {length} bytes: no safetensors file of a SegFormer, or damaged");
        return Err(Error::input(path, format!("{problem}; fetch it again")));
    }
    let parsed = SafeTensors::deserialize(&bytes).map_err(|e| {
        Error::input(path, format!("is not a sound safetensors file: {}; fetch it again", describe(&e)))
    })?;
    let mut tensors = StateDict::new();
    for (name, view) in parsed.iter() {
        check_name(name).map_err(|e| Error::input(path, e))?;
        let of_tensor = |problem: String| Error::input(path, format!("tensor {} {problem}", quoted(name)));
        let element = element(view.dtype())
            .ok_or_else(|| of_tensor(format!("has the unsupported type {:?}; save it as F32", view.dtype())))?;
        if view.shape().len() > MOST_DIMENSIONS {
            return Err(of_tensor(format!("has {} dimensions; at most {MOST_DIMENSIONS}", view.shape().len())));
        }
        let data = element.decode(view.data()).map_err(of_tensor)?;
        tensors.insert(name.to_owned(), HostTensor { shape: view.shape().to_vec(), data });
    }
    Ok(tensors)
}

/// Writes `tensors` in place of `path` in one step, with `metadata` in the header.
///
/// The bytes depend on the arguments alone as long as `metadata` has at most one entry.
///
/// # Errors
/// The file cannot be written; then its previous contents stay.
pub fn write_safetensors(path: &Path, tensors: &StateDict, metadata: &[(&str, &str)]) -> Result<()> {
    let metadata: HashMap<String, String> = metadata.iter().map(|&(k, v)| (k.into(), v.into())).collect();
    let bytes = safetensors::serialize(tensors, (!metadata.is_empty()).then_some(metadata))
        .map_err(|e| Error::new(Kind::Internal, format!("{}: cannot encode: {}", path.display(), describe(&e))))?;
    files::replace(path, &bytes)
}

impl View for &HostTensor {
    fn dtype(&self) -> Dtype {
        match self.data {
            HostData::F32(_) => Dtype::F32,
            HostData::I64(_) => Dtype::I64,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match &self.data {
            HostData::F32(numbers) => bytemuck::cast_slice(numbers).into(),
            HostData::I64(numbers) => bytemuck::cast_slice(numbers).into(),
        }
    }

    fn data_len(&self) -> usize {
        self.data().len()
    }
}

fn element(dtype: Dtype) -> Option<Element> {
    Some(match dtype {
        Dtype::F16 => Element::F16,
        Dtype::BF16 => Element::Bf16,
        Dtype::F32 => Element::F32,
        Dtype::F64 => Element::F64,
        Dtype::U8 => Element::U8,
        Dtype::I8 => Element::I8,
        Dtype::U16 => Element::U16,
        Dtype::I16 => Element::I16,
        Dtype::U32 => Element::U32,
        Dtype::I32 => Element::I32,
        Dtype::U64 => Element::U64,
        Dtype::I64 => Element::I64,
        _ => return None,
    })
}

/// The library's error as one line without raw text from the file.
fn describe(error: &SafeTensorError) -> String {
    match error {
        SafeTensorError::HeaderTooSmall => "it is shorter than a header".into(),
        SafeTensorError::InvalidHeaderLength => "the file ends within the header".into(),
        SafeTensorError::InvalidHeader(_) => "the header is not UTF-8".into(),
        SafeTensorError::InvalidHeaderDeserialization(e) => {
            format!("the header is not valid: {}", e.to_string().escape_debug())
        }
        SafeTensorError::InvalidOffset(name) => {
            format!("the bytes of tensor {} overlap others or leave a gap", quoted(name))
        }
        SafeTensorError::TensorInvalidInfo => "a tensor's shape does not fit its number of bytes".into(),
        SafeTensorError::MetadataIncompleteBuffer => "the file is truncated or too long".into(),
        SafeTensorError::ValidationOverflow => "a tensor's shape overflows".into(),
        other => other.to_string().escape_debug().to_string(),
    }
}
