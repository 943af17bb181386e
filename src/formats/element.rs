//! Number types on disk, and their widening to f32 or i64.

use half::{bf16, f16};

use super::HostData;

/// Most dimensions a tensor may have. SegFormer's have at most 4.
pub(super) const MOST_DIMENSIONS: usize = 8;

/// Longest tensor name, in bytes. SegFormer's stay under 100.
const LONGEST_NAME: usize = 512;

/// A number type on disk, little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Element {
    F16,
    Bf16,
    F32,
    F64,
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    U64,
    I64,
}

impl Element {
    /// Bytes of one number.
    pub fn size(self) -> usize {
        match self {
            Self::U8 | Self::I8 => 1,
            Self::F16 | Self::Bf16 | Self::U16 | Self::I16 => 2,
            Self::F32 | Self::U32 | Self::I32 => 4,
            Self::F64 | Self::U64 | Self::I64 => 8,
        }
    }

    /// Decodes packed numbers: floating types to f32, integers to i64.
    ///
    /// # Errors
    /// What is wrong with the numbers, to be put behind the tensor's name: NaN, infinity, or outside the wider type.
    pub fn decode(self, bytes: &[u8]) -> Result<HostData, String> {
        match self {
            Self::F16 => floats(bytes, |b| f16::from_le_bytes(b).to_f32()),
            Self::Bf16 => floats(bytes, |b| bf16::from_le_bytes(b).to_f32()),
            Self::F32 => floats(bytes, f32::from_le_bytes),
            Self::F64 => floats(bytes, |b| f64::from_le_bytes(b) as f32),
            Self::U8 => Ok(integers(bytes, |[b]: [u8; 1]| i64::from(b))),
            Self::I8 => Ok(integers(bytes, |b| i64::from(i8::from_le_bytes(b)))),
            Self::U16 => Ok(integers(bytes, |b| i64::from(u16::from_le_bytes(b)))),
            Self::I16 => Ok(integers(bytes, |b| i64::from(i16::from_le_bytes(b)))),
            Self::U32 => Ok(integers(bytes, |b| i64::from(u32::from_le_bytes(b)))),
            Self::I32 => Ok(integers(bytes, |b| i64::from(i32::from_le_bytes(b)))),
            Self::U64 => match bytes.as_chunks::<8>().0.iter().position(|b| b[7] >= 0x80) {
                Some(i) => Err(format!("holds an integer beyond i64 at element {i}")),
                None => Ok(integers(bytes, i64::from_le_bytes)),
            },
            Self::I64 => Ok(integers(bytes, i64::from_le_bytes)),
        }
    }
}

fn floats<const N: usize>(bytes: &[u8], decode: impl Fn([u8; N]) -> f32) -> Result<HostData, String> {
    let numbers: Vec<f32> = bytes.as_chunks::<N>().0.iter().map(|b| decode(*b)).collect();
    match numbers.iter().position(|x| !x.is_finite()) {
        Some(i) => Err(format!("holds {} at element {i}, which no sound weight is", numbers[i])),
        None => Ok(HostData::F32(numbers)),
    }
}

fn integers<const N: usize>(bytes: &[u8], decode: impl Fn([u8; N]) -> i64) -> HostData {
    HostData::I64(bytes.as_chunks::<N>().0.iter().map(|b| decode(*b)).collect())
}

/// Refuses names that no module has: empty, very long, or with control characters.
pub(super) fn check_name(name: &str) -> Result<(), String> {
    if name.is_empty() || name.len() > LONGEST_NAME || name.chars().any(char::is_control) {
        return Err(format!("holds a tensor with the unusable name {}", quoted(name)));
    }
    Ok(())
}

/// A name from a file as it may appear in a message: escaped, and cut if very long.
pub(super) fn quoted(name: &str) -> String {
    match name.char_indices().nth(100) {
        Some((cut, _)) => format!("{:?}...", &name[..cut]),
        None => format!("{name:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_widens_exactly() {
        let f32s = |v: &[f32]| Ok(HostData::F32(v.to_vec()));
        let i64s = |v: &[i64]| Ok(HostData::I64(v.to_vec()));
        assert_eq!(Element::F16.decode(&[0x00, 0x3c, 0x01, 0x00]), f32s(&[1.0, 2f32.powi(-24)]));
        assert_eq!(Element::Bf16.decode(&[0x80, 0x3f, 0x40, 0xc0]), f32s(&[1.0, -3.0]));
        assert_eq!(Element::F32.decode(&1.5f32.to_le_bytes()), f32s(&[1.5]));
        assert_eq!(Element::F64.decode(&0.1f64.to_le_bytes()), f32s(&[0.1]));
        assert_eq!(Element::U8.decode(&[255, 0]), i64s(&[255, 0]));
        assert_eq!(Element::I8.decode(&[255, 127]), i64s(&[-1, 127]));
        assert_eq!(Element::U16.decode(&[255, 255]), i64s(&[65535]));
        assert_eq!(Element::I16.decode(&[0, 128]), i64s(&[-32768]));
        assert_eq!(Element::U32.decode(&[255; 4]), i64s(&[0xffff_ffff]));
        assert_eq!(Element::I32.decode(&[255; 4]), i64s(&[-1]));
        assert_eq!(Element::I64.decode(&i64::MIN.to_le_bytes()), i64s(&[i64::MIN]));
        assert_eq!(Element::U64.decode(&7u64.to_le_bytes()), i64s(&[7]));
    }

    #[test]
    fn what_does_not_fit_is_refused_with_its_place() {
        let mut bytes = [1.0f32, 2.0, f32::NAN].map(f32::to_le_bytes).concat();
        assert!(Element::F32.decode(&bytes).unwrap_err().contains("NaN at element 2"));
        bytes[..4].copy_from_slice(&f32::NEG_INFINITY.to_le_bytes());
        assert!(Element::F32.decode(&bytes).unwrap_err().contains("-inf at element 0"));
        assert!(Element::F64.decode(&1e300f64.to_le_bytes()).unwrap_err().contains("inf at element 0"));
        assert!(Element::F16.decode(&[0x00, 0x7c]).is_err());
        assert!(Element::Bf16.decode(&[0xc0, 0x7f]).is_err());
        assert!(Element::U64.decode(&[255; 8]).unwrap_err().contains("beyond i64"));
    }

    #[test]
    fn names_in_messages_are_one_short_line() {
        assert!(check_name("a.b.weight").is_ok());
        for bad in ["", "a\nb", "a\u{1b}[2Jb", &"x".repeat(513)] {
            let message = check_name(bad).unwrap_err();
            assert!(!message.chars().any(char::is_control) && message.len() < 200, "{message}");
        }
    }
}
