//! Puts the BPF object where the binary includes it from: the file that `SLUICE_BPF_OBJECT` names,
//! else `target/bpf/sluice.o` of the workspace, else an empty file (which the binary complains
//! about when it runs).

use std::path::PathBuf;
use std::{env, fs, io};

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-env-changed=SLUICE_BPF_OBJECT");
    let variable = |name| env::var_os(name).map(PathBuf::from);
    let manifest = variable("CARGO_MANIFEST_DIR").unwrap_or_default();
    let object =
        variable("SLUICE_BPF_OBJECT").unwrap_or_else(|| manifest.join("../target/bpf/sluice.o"));
    println!("cargo::rerun-if-changed={}", object.display());
    let bytes = match fs::read(&object) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            println!(
                "cargo::warning=no BPF object at {}: the binary will not load one",
                object.display()
            );
            Vec::new()
        }
        Err(error) => return Err(error),
    };
    fs::write(variable("OUT_DIR").unwrap_or_default().join("sluice.o"), bytes)
}
