//! Compiles the kernels with the C++ compiler, and writes the table from their names to the functions.

use std::fmt::Write;
use std::path::Path;

/// Launch bounds and names of the kernels in a file: `KERNEL(bounds) name(`.
fn kernels(source: &str) -> impl Iterator<Item = (&str, &str)> {
    source.split("\nKERNEL(").skip(1).map(|rest| {
        let (bounds, rest) = rest.split_once(") ").expect("KERNEL(bounds) name(");
        (bounds, rest.split_once('(').expect("KERNEL(bounds) name(").0)
    })
}

fn main() {
    let root = Path::new("..");
    println!("cargo:rerun-if-changed=..");
    let mut bounds_of = String::new();
    let mut table = String::from(
        "std::string host_call(const std::string& name, const host::Launch& launch, const host::Kind* kinds,\n\
         const void* const* values, size_t count) {\n",
    );
    let mut files: Vec<_> = std::fs::read_dir(root)
        .expect("the kernels' folder")
        .map(|entry| entry.expect("the kernels' folder").path())
        .filter(|path| path.extension().is_some_and(|e| e == "cu") && !path.ends_with("all.cu"))
        .collect();
    files.sort();
    files.push("planted.cu".into());
    for path in &files {
        let source = std::fs::read_to_string(path).expect("a kernel file");
        let space = path.file_stem().expect("a name").to_string_lossy();
        for (bounds, name) in kernels(&source) {
            // In the file's namespace, where the names of its constants mean something.
            writeln!(bounds_of, "namespace {space} {{ constexpr unsigned bound_{name} = host::first({bounds}); }}")
                .expect("text");
            writeln!(
                table,
                "    if (name == \"{name}\") \
                 return host::call({space}::{name}, {space}::bound_{name}, launch, kinds, values, count);"
            )
            .expect("text");
        }
    }
    table += "    return \"is no kernel\";\n}\n";
    let out = std::path::PathBuf::from(std::env::var_os("OUT_DIR").expect("OUT_DIR"));
    let sources = "#include \"all.cu\"\nnamespace planted {\n#include \"planted.cu\"\n}\n";
    std::fs::write(out.join("table.cpp"), [sources, &bounds_of, &table].concat()).expect("the build folder can be written");
    let mut build = cc::Build::new();
    println!("cargo:rerun-if-env-changed=SEGPEFT_SANITIZE");
    if std::env::var_os("SEGPEFT_SANITIZE").is_some() {
        build.flag("-fsanitize=address,undefined").flag("-fno-sanitize-recover=undefined").flag("-g");
        println!("cargo:rustc-link-lib=asan");
        println!("cargo:rustc-link-lib=ubsan");
    }
    build
        .cpp(true)
        .std("c++17")
        .opt_level(2)
        .flag("-fno-strict-aliasing")
        .flag("-Wdouble-promotion")
        .flag("-Wno-unused-function")
        .flag("-Wno-unknown-pragmas")
        .include(root)
        .include(".")
        .file("host.cpp")
        .file("launch.cpp")
        .file(out.join("table.cpp"))
        .compile("host_kernels");
}
