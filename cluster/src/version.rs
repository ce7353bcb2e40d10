//! Reads the versions that programs print.

/// Returns the first two numbers of a version, with or without a `v` or `go` before them.
pub fn major_minor(version: &str) -> Option<(u32, u32)> {
    let digits = version.trim_start_matches(|c: char| !c.is_ascii_digit());
    let mut parts = digits.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// Returns the version in `go version go1.26.8 linux/amd64`.
pub(crate) fn go(output: &str) -> Option<(u32, u32)> {
    output.split_whitespace().find_map(|word| word.strip_prefix("go").and_then(major_minor))
}

/// Returns the version in the first line that a server prints for `--version`
/// (`Kubernetes v1.36.3`, `etcd Version: 3.6.8`), without the `v`.
pub(crate) fn server(output: &str) -> Option<&str> {
    let word = output.lines().next()?.split_whitespace().last()?;
    let version = word.trim_start_matches('v');
    version.starts_with(|c: char| c.is_ascii_digit()).then_some(version)
}

#[cfg(test)]
mod tests {
    use super::*;

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
