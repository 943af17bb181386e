//! Compiles the CUDA kernels into one fatbin, if there is an nvcc; without one the crate builds for the CPU alone.
//!
//! Looked for in this order: `NVCC`, `CUDA_HOME`, `CUDA_PATH`, `PATH`, the usual places, and the folder that
//! `tools/get-nvcc.sh` fills. One of the first three that is set must name one; an empty `NVCC` asks for none, and
//! `SEGPEFT_REQUIRE_CUDA=1` makes a missing one an error.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Machine code for these, and PTX of the first for newer ones.
const ARCHITECTURES: [&str; 4] = ["80", "86", "89", "90"];

/// The nvcc to compile with, if there is one; `variable` reads the environment.
///
/// # Errors
/// When a variable names one that is not there: to pass it over would build something else than was asked for.
pub fn find_nvcc(variable: impl Fn(&str) -> Option<OsString>) -> Result<Option<PathBuf>, String> {
    let named = |name: &str| variable(name).map(PathBuf::from);
    let in_path = |name: &Path| {
        let folders = variable("PATH").unwrap_or_default();
        env::split_paths(&folders).map(|folder| folder.join(name)).find(|path| path.is_file())
    };
    if let Some(nvcc) = named("NVCC") {
        if nvcc.as_os_str().is_empty() {
            return Ok(None);
        }
        // A name alone is looked for as a shell does.
        let found = if nvcc.components().count() == 1 { in_path(&nvcc) } else { Some(nvcc.clone()) };
        return match found.filter(|path| path.is_file()) {
            Some(path) => Ok(Some(path)),
            None => Err(format!(
                "NVCC={}: there is no such file; name an nvcc, or leave it empty to build for the CPU alone",
                nvcc.display()
            )),
        };
    }
    for name in ["CUDA_HOME", "CUDA_PATH"] {
        if let Some(folder) = named(name).filter(|folder| !folder.as_os_str().is_empty()) {
            let nvcc = folder.join("bin/nvcc");
            return match nvcc.is_file() {
                true => Ok(Some(nvcc)),
                false => Err(format!(
                    "{name}={}: there is no bin/nvcc in it; name a CUDA toolkit, unset it, or name an nvcc in NVCC",
                    folder.display()
                )),
            };
        }
    }
    let mut usual: Vec<PathBuf> = ["/usr/local/cuda/bin/nvcc", "/opt/cuda/bin/nvcc"].map(PathBuf::from).into();
    usual.push(PathBuf::from(variable("CARGO_MANIFEST_DIR").unwrap_or_default()).join(".cuda/nvidia/cu13/bin/nvcc"));
    Ok(in_path(Path::new("nvcc")).or_else(|| usual.into_iter().find(|path| path.is_file())))
}

fn compile(nvcc: &Path, to: &Path) {
    let mut command = Command::new(nvcc);
    command.args(["-std=c++17", "-O3", "-fatbin", "-Werror", "all-warnings", "-Xptxas", "-Werror,-warn-spills"]);
    for sm in ARCHITECTURES {
        command.args(["-gencode", &format!("arch=compute_{sm},code=sm_{sm}")]);
    }
    let [oldest, ..] = ARCHITECTURES;
    command.args(["-gencode", &format!("arch=compute_{oldest},code=compute_{oldest}")]);
    let output = command.arg("--threads=0").arg("-o").arg(to).arg("kernels/all.cu").output();
    match output {
        Ok(output) if output.status.success() => {}
        Ok(output) => panic!(
            "{} failed (CUDA 13 is known to work: tools/get-nvcc.sh; an empty NVCC builds for the CPU alone):\n{}",
            nvcc.display(),
            String::from_utf8_lossy(&output.stderr)
        ),
        Err(error) => panic!("{} cannot be run: {error}", nvcc.display()),
    }
}

fn main() {
    println!("cargo:rustc-check-cfg=cfg(cuda_kernels)");
    // By file, for texts lie in that folder too; a new one is named in all.cu.
    let sources = std::fs::read_dir("kernels").into_iter().flatten().flatten().map(|entry| entry.path());
    for source in sources.filter(|path| path.extension().is_some_and(|kind| kind == "cu" || kind == "cuh")) {
        println!("cargo:rerun-if-changed={}", source.display());
    }
    for name in ["NVCC", "CUDA_HOME", "CUDA_PATH", "SEGPEFT_REQUIRE_CUDA"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    match find_nvcc(|name| env::var_os(name)).unwrap_or_else(|problem| panic!("{problem}")) {
        Some(nvcc) => {
            compile(&nvcc, &out.join("kernels.fatbin"));
            println!("cargo:rustc-cfg=cuda_kernels");
        }
        None if env::var("SEGPEFT_REQUIRE_CUDA").is_ok_and(|value| value == "1") => {
            panic!("SEGPEFT_REQUIRE_CUDA=1, but there is no nvcc: set NVCC or CUDA_HOME, or run tools/get-nvcc.sh")
        }
        None => println!("cargo:warning=no nvcc found: a build for the CPU alone; tools/get-nvcc.sh brings one"),
    }
}
