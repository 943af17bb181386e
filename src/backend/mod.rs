//! The operations the model is written in.
