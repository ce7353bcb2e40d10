//! What compilers and servers print when asked for their version.

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

/// The first two numbers of a version, `v` or `go` in front or not.
pub(crate) fn major_minor(version: &str) -> Option<(u32, u32)> {
    let digits = version.trim_start_matches(|c: char| !c.is_ascii_digit());
    let mut parts = digits.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// The version in `go version go1.26.8 linux/amd64`.
pub(crate) fn go(output: &str) -> Option<(u32, u32)> {
    output.split_whitespace().find_map(|word| word.strip_prefix("go").and_then(major_minor))
}

/// The version in the first line that a server prints for `--version`:
/// `Kubernetes v1.36.3`, `etcd Version: 3.6.8`; without the `v`.
pub(crate) fn server(output: &str) -> Option<&str> {
    let word = output.lines().next()?.split_whitespace().last()?;
    let version = word.trim_start_matches('v');
    version.starts_with(|c: char| c.is_ascii_digit()).then_some(version)
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

    #[test]
    fn minor_versions_are_numbers_not_text() {
        assert!(major_minor("1.9") < major_minor("1.10"));
        assert_eq!(major_minor("v1.36.3"), Some((1, 36)));
        assert_eq!(major_minor("nightly"), None);
    }

    #[test]
    fn go_and_the_servers_say_their_version() {
        assert_eq!(go("go version go1.26.8 linux/amd64"), Some((1, 26)));
        assert_eq!(go("go version go1.27rc1 linux/amd64"), Some((1, 27)));
        assert_eq!(go("bash: go: command not found"), None);
        assert_eq!(server("Kubernetes v1.36.3\n"), Some("1.36.3"));
        assert_eq!(server("etcd Version: 3.6.8\nGit SHA: Not provided\n"), Some("3.6.8"));
        assert_eq!(server("usage: etcd"), None);
    }
}
