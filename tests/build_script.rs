//! Where the build looks for nvcc.
#![allow(missing_docs)]

#[allow(dead_code)]
#[path = "../build.rs"]
mod build;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// What the build finds with these variables alone.
fn found(variables: &[(&str, &Path)]) -> Result<Option<PathBuf>, String> {
    build::find_nvcc(|name| Some(OsString::from(variables.iter().find(|(n, _)| *n == name)?.1)))
}

#[test]
fn a_variable_that_names_no_nvcc_is_an_error_that_names_it() {
    let folder = tempfile::tempdir().expect("scratch folder");
    let (toolkit, empty) = (folder.path().join("cuda"), folder.path().join("empty"));
    let nvcc = toolkit.join("bin/nvcc");
    std::fs::create_dir_all(toolkit.join("bin")).expect("folder");
    std::fs::create_dir(&empty).expect("folder");
    std::fs::write(&nvcc, "").expect("file");

    assert_eq!(found(&[("NVCC", &nvcc)]), Ok(Some(nvcc.clone())));
    assert_eq!(found(&[("NVCC", Path::new("nvcc")), ("PATH", &toolkit.join("bin"))]), Ok(Some(nvcc.clone())));
    assert_eq!(found(&[("NVCC", Path::new("")), ("CUDA_HOME", &toolkit)]), Ok(None), "asks for none");
    assert_eq!(found(&[("NVCC", &nvcc), ("CUDA_HOME", &empty)]), Ok(Some(nvcc.clone())), "says enough");
    assert_eq!(found(&[("CUDA_HOME", Path::new("")), ("CUDA_PATH", &toolkit)]), Ok(Some(nvcc.clone())));
    assert_eq!(found(&[("PATH", &toolkit.join("bin"))]), Ok(Some(nvcc)));

    for name in ["NVCC", "CUDA_HOME", "CUDA_PATH"] {
        let problem = found(&[(name, &empty), ("PATH", &toolkit.join("bin"))]).expect_err("names none");
        assert!(problem.starts_with(&format!("{name}={}: ", empty.display())), "{problem}");
    }
    let problem = found(&[("NVCC", Path::new("nvcc")), ("PATH", &empty)]).expect_err("names none");
    assert!(problem.starts_with("NVCC=nvcc: "), "{problem}");
}
