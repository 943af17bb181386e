//! Compiles the CUDA kernels into one fatbin, if there is an nvcc; without one the crate builds for the CPU alone.
//!
//! Looked for in this order: `NVCC`, `CUDA_HOME`, `CUDA_PATH`, `PATH`, the usual places, and the folder that
//! `tools/get-nvcc.sh` fills. An empty `NVCC` asks for none; `SEGPEFT_REQUIRE_CUDA=1` makes a missing one an error.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Machine code for these, and PTX of the first for newer ones.
const ARCHITECTURES: [&str; 4] = ["80", "86", "89", "90"];

fn find_nvcc() -> Option<PathBuf> {
    let path = |name: &str| env::var_os(name).map(PathBuf::from);
    if path("NVCC").is_some_and(|path| path.as_os_str().is_empty()) {
        return None;
    }
    let mut candidates: Vec<PathBuf> = path("NVCC").into_iter().collect();
    candidates.extend(["CUDA_HOME", "CUDA_PATH"].iter().filter_map(|name| Some(path(name)?.join("bin/nvcc"))));
    candidates.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()).map(|folder| folder.join("nvcc")));
    candidates.extend(["/usr/local/cuda/bin/nvcc", "/opt/cuda/bin/nvcc"].map(PathBuf::from));
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    candidates.push(here.join(".cuda/nvidia/cu13/bin/nvcc"));
    candidates.into_iter().find(|path| path.is_file())
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
    println!("cargo:rerun-if-changed=kernels");
    for name in ["NVCC", "CUDA_HOME", "CUDA_PATH", "SEGPEFT_REQUIRE_CUDA"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    match find_nvcc() {
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
