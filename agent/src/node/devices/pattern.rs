//! Patterns of device names as in a shell: `*` matches any run of characters, `?` matches one.

use super::Role;

/// Patterns that decide a device's role before anything is detected.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Patterns {
    roles: Vec<(String, Role)>,
}

impl Patterns {
    /// Collects the patterns of each role.
    #[must_use]
    pub fn new(edge: &[String], uplink: &[String], fabric: &[String]) -> Self {
        let of = |patterns: &[String], role| {
            patterns.iter().map(move |p| (p.clone(), role)).collect::<Vec<_>>()
        };
        Self {
            roles: [of(edge, Role::Edge), of(uplink, Role::Uplink), of(fabric, Role::Fabric)]
                .concat(),
        }
    }

    /// Returns the role of the first pattern that matches a device's name.
    #[must_use]
    pub fn role(&self, name: &str) -> Option<Role> {
        self.roles.iter().find(|(pattern, _)| matches(pattern, name)).map(|(_, role)| *role)
    }
}

/// Whether a pattern matches a whole name.
#[must_use]
pub fn matches(pattern: &str, name: &str) -> bool {
    let mut pattern_chars = pattern.chars();
    match pattern_chars.next() {
        None => name.is_empty(),
        Some('*') => {
            let rest = pattern_chars.as_str();
            name.char_indices()
                .map(|(at, _)| at)
                .chain([name.len()])
                .any(|at| name.get(at..).is_some_and(|name| matches(rest, name)))
        }
        Some(wanted) => {
            let mut name_chars = name.chars();
            name_chars.next().is_some_and(|found| wanted == '?' || wanted == found)
                && matches(pattern_chars.as_str(), name_chars.as_str())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn a_pattern_matches_the_whole_name() {
        assert!(matches("eth0", "eth0"));
        assert!(!matches("eth", "eth0"));
        assert!(!matches("eth0", "eth"));
    }

    #[test]
    fn a_star_matches_any_run() {
        assert!(matches("cali*", "cali0123"));
        assert!(matches("*", ""));
        assert!(matches("e*0", "enp3s0"));
        assert!(!matches("e*1", "enp3s0"));
    }

    #[test]
    fn a_question_mark_matches_one_character() {
        assert!(matches("eth?", "eth1"));
        assert!(!matches("eth?", "eth10"));
    }
}
