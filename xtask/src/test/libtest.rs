//! Reads the lines in which libtest sums up a test binary, and xtask a run.

use std::fmt;

/// The numbers of tests by outcome.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Tests that passed.
    pub(crate) passed: u64,
    /// Tests that failed, and binaries that died without a result.
    pub(crate) failed: u64,
    /// Ignored tests, and tests of tiers that cannot run here.
    pub(crate) skipped: u64,
}

impl Counts {
    /// Adds another sum to this one.
    pub(crate) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl Counts {
    /// Returns the number of all tests.
    pub(crate) fn all(self) -> u64 {
        self.passed + self.failed + self.skipped
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { passed, failed, skipped } = self;
        write!(f, "{passed} passed, {failed} failed")?;
        match skipped {
            0 => Ok(()),
            _ => write!(f, ", {skipped} skipped"),
        }
    }
}

/// Reads `test result: ok. 3 passed; 0 failed; 1 ignored; ...`.
///
/// The output of a forked child of a test may precede it on the same line.
pub(crate) fn parse_result(line: &str) -> Option<Counts> {
    let (_, result) = line.split_once("test result: ")?;
    let (_, counts) = result.split_once(". ")?;
    let count = |what: &str| {
        counts.split("; ").find_map(|part| part.trim().strip_suffix(what)?.trim().parse().ok())
    };
    Some(Counts { passed: count("passed")?, failed: count("failed")?, skipped: count("ignored")? })
}

/// Reads the sum that xtask itself ends with: `3 passed, 0 failed`.
fn parse_sum(line: &str) -> Option<Counts> {
    let mut counts = Counts::default();
    for (place, part) in line.split(", ").enumerate() {
        let (number, what) = part.split_once(' ')?;
        let count = match (place, what) {
            (0, "passed") => &mut counts.passed,
            (1, "failed") => &mut counts.failed,
            (2, "skipped") => &mut counts.skipped,
            _ => return None,
        };
        *count = number.parse().ok()?;
    }
    line.contains(", ").then_some(counts)
}

/// Reads `test name ... ok`.
fn parse_test(line: &str) -> Option<Counts> {
    let (_, outcome) = line.trim().strip_prefix("test ")?.rsplit_once(" ... ")?;
    let mut counts = Counts::default();
    match outcome {
        "ok" => counts.passed = 1,
        "FAILED" => counts.failed = 1,
        _ if outcome.starts_with("ignored") => counts.skipped = 1,
        _ => return None,
    }
    Some(counts)
}

/// Reads the names in a listing, which has a line `name: test` for each.
pub(crate) fn parse_list(output: &str) -> Vec<String> {
    output.lines().filter_map(|line| Some(line.strip_suffix(": test")?.to_owned())).collect()
}

/// Sums the results in a stream of output that arrives in pieces.
#[derive(Default)]
pub(crate) struct Reader {
    line: Vec<u8>,
    counts: Counts,
    results: u32,
    /// Tests reported one by one since the last result line.
    pending: Counts,
}

impl Reader {
    /// Reads the next piece.
    pub(crate) fn push(&mut self, piece: &[u8]) {
        for part in piece.split_inclusive(|byte| *byte == b'\n') {
            self.line.extend_from_slice(part);
            if part.ends_with(b"\n") {
                self.end_line();
            }
        }
    }

    fn end_line(&mut self) {
        let line = String::from_utf8_lossy(&self.line);
        if let Some(counts) = parse_result(&line).or_else(|| parse_sum(line.trim())) {
            self.counts.add(counts);
            self.results += 1;
            self.pending = Counts::default();
        } else if let Some(counts) = parse_test(&line) {
            self.pending.add(counts);
        }
        self.line.clear();
    }

    /// Whether the output stopped within a line.
    pub(crate) fn is_within_line(&self) -> bool {
        !self.line.is_empty()
    }

    /// Returns the sum of a process that has ended. A process that failed without a failed test, or
    /// ended before its result line, counts as one failure in addition to the tests that it
    /// reported.
    pub(crate) fn finish(mut self, success: bool) -> Counts {
        self.end_line();
        let is_incomplete = self.results == 0 || self.pending != Counts::default();
        self.counts.add(self.pending);
        if is_incomplete || (!success && self.counts.failed == 0) {
            self.counts.failed += 1;
        }
        self.counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OK: &str = "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.00s";
    const FAILED: &str =
        "test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out";

    fn counts(passed: u64, failed: u64, skipped: u64) -> Counts {
        Counts { passed, failed, skipped }
    }

    #[test]
    fn result_lines_are_read_and_others_are_not() {
        assert_eq!(parse_result(OK), Some(counts(3, 0, 1)));
        assert_eq!(parse_result(FAILED), Some(counts(3, 2, 0)));
        assert_eq!(parse_result(&format!("noise {OK}")), Some(counts(3, 0, 1)));
        assert_eq!(parse_result("test result: unknown"), None);
        assert_eq!(parse_result("test a_result_is_printed ... ok"), None);
        assert_eq!(parse_result("3 passed; 0 failed; 0 ignored"), None);
    }

    #[test]
    fn a_sum_stands_alone_on_its_line() {
        assert_eq!(parse_sum("26 passed, 0 failed"), Some(counts(26, 0, 0)));
        assert_eq!(parse_sum("3 passed, 1 failed, 2 skipped"), Some(counts(3, 1, 2)));
        assert_eq!(parse_sum("kube-proxy: 26 passed, 0 failed"), None);
        assert_eq!(parse_sum("26 passed"), None);
        assert_eq!(parse_sum(""), None);
    }

    #[test]
    fn lists_are_read() {
        assert_eq!(parse_list("a::b: test\nc: test\n\n2 tests, 0 benchmarks\n"), ["a::b", "c"]);
        assert_eq!(parse_list("\n0 tests, 0 benchmarks\n"), [""; 0]);
    }

    #[test]
    fn pieces_may_end_anywhere() {
        let text = format!("running 3 tests\ntest a ... ok\n{OK}\n\nrunning 5 tests\n{FAILED}");
        for size in [1, 7, 4096] {
            let mut reader = Reader::default();
            for piece in text.as_bytes().chunks(size) {
                reader.push(piece);
            }
            assert_eq!(reader.finish(false), counts(6, 2, 1));
        }
    }

    #[test]
    fn a_process_that_dies_without_a_failed_test_is_one_failure() {
        let finish = |text: &str, success| {
            let mut reader = Reader::default();
            reader.push(text.as_bytes());
            reader.finish(success)
        };
        assert_eq!(finish("running 3 tests\ntest a ... ", false), counts(0, 1, 0));
        assert_eq!(finish("", true), counts(0, 1, 0));
        assert_eq!(finish(OK, false), counts(3, 1, 1));
        assert_eq!(finish(OK, true), counts(3, 0, 1));
    }

    #[test]
    fn the_sum_names_skipped_tests_only_if_there_are_some() {
        assert_eq!(counts(3, 0, 0).to_string(), "3 passed, 0 failed");
        assert_eq!(counts(3, 1, 2).to_string(), "3 passed, 1 failed, 2 skipped");
    }
}
