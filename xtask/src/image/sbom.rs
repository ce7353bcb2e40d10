//! The bill of materials: everything that is linked into the binary, as CycloneDX 1.6 (ECMA-424) in
//! JSON.
//!
//! It lists what cargo links for this one program, not the whole workspace: normal dependencies
//! with the features of a build of the package alone, without procedural macros; the same for the
//! embedded kernel programs; and what the compiler adds, Rust's standard library and the C library.
//! It contains neither a time nor a random number: the same binary gives the same document.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::{Value, json};
use sluice_cluster::process::Cmd;

use crate::version::Rustc;
use crate::workspace::Workspace;

/// CycloneDX in JSON, as registered.
pub(super) const MEDIA_TYPE: &str = "application/vnd.cyclonedx+json";

/// The programs that a package can be linked into, in the words of the document.
const AGENT: &str = "agent";
const KERNEL: &str = "kernel programs";

/// The target of the kernel programs.
const BPF: &str = "bpfel-unknown-none";

/// Returns the document about the binary of this tree with that digest.
pub(super) fn of(workspace: &Workspace, digest: &str) -> Result<Vec<u8>> {
    let rustc = Cmd::new("rustc").dir(workspace.root()).arg("-vV").stdout()?;
    let rustc = Rustc::parse(&rustc).context("cannot read `rustc -vV`")?;
    let mut packages = Packages::default();
    packages.read(AGENT, &tree(workspace, "sluice", &rustc.host)?)?;
    packages.read(KERNEL, &tree(workspace, "sluice-ebpf", BPF)?)?;
    let lock = workspace.root().join("Cargo.lock");
    let text =
        fs::read_to_string(&lock).with_context(|| format!("cannot read {}", lock.display()))?;
    let sums = checksums(&text)?;
    let mut system = vec![library("rust-std", &rustc.release, "MIT OR Apache-2.0")];
    if rustc.host.ends_with("-gnu") {
        system.push(library("glibc", &glibc()?, "LGPL-2.1-or-later"));
    }
    let document = document(&packages, &sums, &system, digest)?;
    let mut text = serde_json::to_string_pretty(&document)?;
    text.push('\n');
    Ok(text.into_bytes())
}

/// Returns what cargo would link for a package alone: one line each, depth first, after its depth.
fn tree(workspace: &Workspace, package: &str, target: &str) -> Result<String> {
    workspace
        .cargo()
        .args([
            "tree",
            "--locked",
            "--edges",
            "normal,no-proc-macro",
            "--no-dedupe",
            "--prefix",
            "depth",
        ])
        .args(["--format", "|{p}|{l}", "--package", package, "--target", target])
        .stdout()
        .with_context(|| format!("cannot list what is linked into {package}"))
}

/// Returns this machine's C library, which a static binary contains.
fn glibc() -> Result<String> {
    let answer = Cmd::new("getconf").arg("GNU_LIBC_VERSION").stdout()?;
    let version =
        answer.trim().strip_prefix("glibc ").context("getconf does not tell glibc's version")?;
    Ok(version.to_owned())
}

/// A package by name and version.
type Id = (String, String);

#[derive(Default)]
struct Packages {
    found: BTreeMap<Id, Package>,
    /// The root of each tree.
    roots: Vec<Id>,
}

#[derive(Default)]
struct Package {
    license: String,
    /// Whether its source is in this tree.
    is_own: bool,
    parts: BTreeSet<&'static str>,
    needs: BTreeSet<Id>,
}

impl Packages {
    /// Adds the lines of a tree.
    fn read(&mut self, part: &'static str, tree: &str) -> Result<()> {
        let mut path: Vec<Id> = Vec::new();
        for line in tree.lines().filter(|line| !line.is_empty()) {
            let [depth, package, license] =
                line.split('|').collect::<Vec<_>>().try_into().map_err(|_| unknown(line))?;
            let depth: usize = depth.parse().map_err(|_| unknown(line))?;
            let mut words = package.split_whitespace();
            let (Some(name), Some(version)) =
                (words.next(), words.next().and_then(|v| v.strip_prefix('v')))
            else {
                return Err(unknown(line));
            };
            let id: Id = (name.to_owned(), version.to_owned());
            path.truncate(depth);
            let entry = self.found.entry(id.clone()).or_default();
            // Before cargo used SPDX's grammar, a slash meant "or".
            entry.license = license.replace(" / ", " OR ").replace('/', " OR ");
            entry.is_own = words.next().is_some_and(|place| place.starts_with('('));
            let _new = entry.parts.insert(part);
            match path.last() {
                None => self.roots.push(id.clone()),
                Some(above) => {
                    let above = self.found.get_mut(above).context("a package without a place")?;
                    let _new = above.needs.insert(id.clone());
                }
            }
            path.push(id);
        }
        if path.is_empty() {
            bail!("cargo names no package of the {part}");
        }
        Ok(())
    }
}

fn unknown(line: &str) -> anyhow::Error {
    anyhow::anyhow!("cargo tree printed a line of another form: {line}")
}

/// Returns the checksums of packages' archives, from Cargo.lock.
fn checksums(lock: &str) -> Result<BTreeMap<Id, String>> {
    #[derive(Deserialize)]
    struct Lock {
        package: Vec<Locked>,
    }
    #[derive(Deserialize)]
    struct Locked {
        name: String,
        version: String,
        checksum: Option<String>,
    }
    let lock: Lock = toml::from_str(lock).context("cannot read Cargo.lock")?;
    Ok(lock
        .package
        .into_iter()
        .filter_map(|package| Some(((package.name, package.version), package.checksum?)))
        .collect())
}

fn purl((name, version): &Id) -> String {
    format!("pkg:cargo/{name}@{version}")
}

fn library(name: &str, version: &str, license: &str) -> Value {
    let purl = format!("pkg:generic/{name}@{version}");
    json!({
        "type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl,
        "licenses": [{"expression": license}],
    })
}

fn component(id: &Id, package: &Package, sums: &BTreeMap<Id, String>) -> Result<Value> {
    let (name, version) = id;
    let mut value = json!({
        "type": "library", "bom-ref": purl(id), "name": name, "version": version,
        "properties": package.parts.iter().map(|part| json!({"name": "sluice:part", "value": part})).collect::<Vec<_>>(),
    });
    let fields = value.as_object_mut().context("a component is an object")?;
    if !package.license.is_empty() {
        let _none = fields.insert("licenses".into(), json!([{"expression": package.license}]));
    }
    if !package.is_own {
        let sum = sums
            .get(id)
            .with_context(|| format!("Cargo.lock has no checksum of {name} {version}"))?;
        let _none = fields.insert("purl".into(), purl(id).into());
        let _none = fields.insert("hashes".into(), json!([{"alg": "SHA-256", "content": sum}]));
    }
    Ok(value)
}

fn document(
    packages: &Packages,
    sums: &BTreeMap<Id, String>,
    system: &[Value],
    digest: &str,
) -> Result<Value> {
    let [program, kernel] = packages.roots.as_slice() else { bail!("two trees are wanted") };
    let components: Vec<_> = packages
        .found
        .iter()
        .filter(|(id, _)| *id != program)
        .map(|(id, package)| component(id, package, sums))
        .chain(system.iter().cloned().map(Ok))
        .collect::<Result<_>>()?;
    let dependencies = packages.found.iter().map(|(id, package)| {
        let mut needs: Vec<_> = package.needs.iter().map(purl).collect();
        if id == program {
            needs.push(purl(kernel));
            needs.extend(
                system.iter().filter_map(|library| Some(library["bom-ref"].as_str()?.to_owned())),
            );
        }
        json!({"ref": purl(id), "dependsOn": needs})
    });
    let license =
        packages.found.get(program).map(|package| package.license.clone()).unwrap_or_default();
    Ok(json!({
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": serial(digest),
        "version": 1,
        "metadata": {
            "lifecycles": [{"phase": "build"}],
            "component": {
                "type": "application", "bom-ref": purl(program), "name": program.0, "version": program.1,
                "licenses": [{"expression": license}],
                "hashes": [{"alg": "SHA-256", "content": digest}],
            },
        },
        "components": components,
        "dependencies": dependencies.collect::<Vec<_>>(),
    }))
}

/// Returns an identifier of a binary: a UUID of version 8 (RFC 9562, section 5.8) from its digest.
fn serial(digest: &str) -> String {
    let part = |from: usize, to: usize| digest.get(from..to).unwrap_or_default();
    format!(
        "urn:uuid:{}-{}-8{}-8{}-{}",
        part(0, 8),
        part(8, 12),
        part(12, 15),
        part(15, 18),
        part(18, 30)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_tells_who_needs_whom() -> Result<()> {
        let mut packages = Packages::default();
        packages.read(
            AGENT,
            "0|a v1.0.0 (/tree/a)|Apache-2.0\n1|b v2.0.0|MIT/Apache-2.0\n2|c v3.0.0|MIT\n1|c v3.0.0|MIT\n",
        )?;
        packages.read(KERNEL, "0|k v1.0.0 (/tree/k)|GPL-2.0-only\n1|c v3.0.0|MIT\n")?;
        let id = |name: &str, version: &str| (name.to_owned(), version.to_owned());
        let found = |name: &str, version: &str| &packages.found[&id(name, version)];
        assert_eq!(found("a", "1.0.0").needs, [id("b", "2.0.0"), id("c", "3.0.0")].into());
        assert_eq!(found("b", "2.0.0").license, "MIT OR Apache-2.0");
        assert_eq!(found("c", "3.0.0").parts, [AGENT, KERNEL].into());
        assert!(found("a", "1.0.0").is_own && !found("b", "2.0.0").is_own);
        assert!(packages.read(AGENT, "").is_err() && packages.read(AGENT, "0|a\n").is_err());

        // A package of a registry without its checksum is an error.
        let sums = |names: &[&str]| {
            names
                .iter()
                .map(|name| {
                    (id(name, if *name == "b" { "2.0.0" } else { "3.0.0" }), "00".to_owned())
                })
                .collect()
        };
        assert!(document(&packages, &sums(&["b"]), &[], "00").is_err());
        let document = document(&packages, &sums(&["b", "c"]), &[], &"0123456789abcdef".repeat(4))?;
        assert_eq!(document["serialNumber"], "urn:uuid:01234567-89ab-8cde-8f01-23456789abcd");
        let depends = |purl: &str| {
            let all = document["dependencies"].as_array().cloned().unwrap_or_default();
            all.into_iter().find(|one| one["ref"] == purl).map(|one| one["dependsOn"].clone())
        };
        let on = ["pkg:cargo/b@2.0.0", "pkg:cargo/c@3.0.0", "pkg:cargo/k@1.0.0"];
        assert_eq!(depends("pkg:cargo/a@1.0.0"), Some(json!(on)));
        Ok(())
    }

    #[test]
    fn checksums_are_cargos() -> Result<()> {
        let lock = "version = 4\n[[package]]\nname = \"a\"\nversion = \"1.0.0\"\n[[package]]\nname = \"b\"\nversion = \"2.0.0\"\nchecksum = \"12ab\"\n";
        let sums = checksums(lock)?;
        assert_eq!(sums.len(), 1);
        assert_eq!(sums[&("b".to_owned(), "2.0.0".to_owned())], "12ab");
        Ok(())
    }
}
