//! Compiles the kernels with the C++ compiler, and writes the table from their names to the functions. With
//! `SEGPEFT_SANITIZE_TO`, makes a shared library of that name instead, under AddressSanitizer and
//! UndefinedBehaviorSanitizer.

use std::fmt::Write;
use std::path::Path;

/// Launch bounds and names of the kernels in a file: `KERNEL(bounds) name(`.
fn kernels(source: &str) -> impl Iterator<Item = (&str, &str)> {
    source.split("\nKERNEL(").skip(1).map(|rest| {
        let (bounds, rest) = rest.split_once(") ").expect("KERNEL(bounds) name(");
        (bounds, rest.split_once('(').expect("KERNEL(bounds) name(").0)
    })
}

/// What compiles a file by itself, in its namespace, behind the headers that all files share: with a function that launches its
/// kernels by name, and returns whether it knows the name.
fn unit(headers: &str, space: &str, include: &str, source: &str) -> String {
    let mut text = format!("{headers}namespace {space} {{\n#include \"{include}\"\n");
    let mut table = String::new();
    for (bounds, name) in kernels(source) {
        // In the namespace, where the names of the file's constants mean something.
        writeln!(text, "constexpr unsigned bound_{name} = host::first({bounds});").expect("text");
        writeln!(
            table,
            "    if (name == \"{name}\") return problem = host::call({space}::{name}, {space}::bound_{name}, launch, \
             kinds, values, count), true;"
        )
        .expect("text");
    }
    text + "}\n" + &signature(space) + " {\n" + &table + "    return false;\n}\n"
}

fn signature(space: &str) -> String {
    format!(
        "bool call_{space}(std::string& problem, const std::string& name, const host::Launch& launch, \
         const host::Kind* kinds, const void* const* values, size_t count)"
    )
}

fn main() {
    let root = Path::new("..");
    println!("cargo:rerun-if-changed=.");
    println!("cargo:rerun-if-env-changed=SEGPEFT_SANITIZE_TO");
    let out = std::path::PathBuf::from(std::env::var_os("OUT_DIR").expect("OUT_DIR"));
    let write = |name: &str, text: &str| {
        std::fs::write(out.join(name), text).expect("the build folder can be written");
        out.join(name)
    };
    let extension = |path: &Path, wanted: &str| path.extension().is_some_and(|found| found == wanted);
    let mut files: Vec<_> = std::fs::read_dir(root)
        .expect("the kernels' folder")
        .map(|entry| entry.expect("the kernels' folder").path())
        .filter(|path| extension(path, "cu") || extension(path, "cuh"))
        .collect();
    for path in &files {
        println!("cargo:rerun-if-changed={}", path.display());
    }
    files.retain(|path| extension(path, "cu") && !path.ends_with("all.cu"));
    files.sort();
    files.push("planted.cu".into());
    let all = std::fs::read_to_string(root.join("all.cu")).expect("all.cu");
    let headers: String = all.lines().filter(|line| line.ends_with(".cuh\"")).flat_map(|line| [line, "\n"]).collect();

    let mut build = cc::Build::new();
    let mut table = String::from("#include \"cuda_bf16.h\"\n");
    // Tried one after the other.
    let mut calls = String::new();
    for path in &files {
        let source = std::fs::read_to_string(path).expect("a kernel file");
        let [space, include] = [path.file_stem(), path.file_name()].map(|name| name.expect("a name").to_string_lossy());
        // What nvcc compiles must be what is tested.
        let included = all.contains(&format!("namespace {space} {{\n#include \"{include}\"\n}}\n"));
        assert!(included || space == "planted", "all.cu lacks {include}");
        build.file(write(&format!("{space}.cpp"), &unit(&headers, &space, &include, &source)));
        writeln!(table, "{};", signature(&space)).expect("text");
        writeln!(calls, "    if (call_{space}(problem, name, launch, kinds, values, count)) return problem;")
            .expect("text");
    }
    table += "std::string host_call(const std::string& name, const host::Launch& launch, const host::Kind* kinds,\n\
         const void* const* values, size_t count) {\n    std::string problem;\n";
    table += &calls;
    table += "    return \"is no kernel\";\n}\n";
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
        .file(write("table.cpp", &table));
    let Some(library) = std::env::var_os("SEGPEFT_SANITIZE_TO") else { return build.compile("host_kernels") };
    build.flag("-fsanitize=address,undefined").flag("-fno-sanitize-recover=undefined").flag("-g1").pic(true);
    let objects = build.compile_intermediates();
    let mut link = build.get_compiler().to_command();
    let linked = link.args(["-shared", "-Wl,-Bsymbolic", "-o"]).arg(&library).args(objects).status();
    assert!(linked.is_ok_and(|status| status.success()), "{} cannot be linked", library.display());
}
