//! Reads what a compiler prints when asked for its version.

use sluice_cluster::version::major_minor;

/// The parts of `rustc -vV` that decide whether it can build the eBPF object.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Rustc {
    /// `1.96.0`, `1.97.0-nightly`.
    pub(crate) release: String,
    /// The triple it compiles for by default.
    pub(crate) host: String,
    /// The major version of its LLVM, which the BPF linker must match.
    pub(crate) llvm_major: u32,
}

impl Rustc {
    /// Reads the output of `rustc -vV`.
    pub(crate) fn parse(output: &str) -> Option<Self> {
        let field = |name: &str| {
            output
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
                .map(str::trim)
        };
        Some(Self {
            release: field("release")?.to_owned(),
            host: field("host")?.to_owned(),
            llvm_major: field("LLVM version")?.split('.').next()?.parse().ok()?,
        })
    }

    /// Whether the release is at least `minimum` (`1.95`).
    pub(crate) fn is_at_least(&self, minimum: &str) -> bool {
        matches!(
            (major_minor(&self.release), major_minor(minimum)),
            (Some(release), Some(minimum)) if release >= minimum
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rustc_says_its_release_host_and_llvm() {
        let output = "rustc 1.97.0-nightly (e50aa6fba 2026-05-19)\nbinary: rustc\nhost: x86_64-unknown-linux-gnu\n\
                      release: 1.97.0-nightly\nLLVM version: 22.1.4\n";
        let rustc = Rustc::parse(output).expect("a whole answer");
        assert_eq!(rustc.release, "1.97.0-nightly");
        assert_eq!(rustc.host, "x86_64-unknown-linux-gnu");
        assert_eq!(rustc.llvm_major, 22);
        assert!(rustc.is_at_least("1.95"));
        assert!(rustc.is_at_least("1.97.0"));
        assert!(!rustc.is_at_least("1.98"));
        assert_eq!(Rustc::parse("error: toolchain is not installed"), None);
    }
}
