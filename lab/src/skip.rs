//! Skipping tests that a machine cannot run.

/// The error of a kernel or machine that lacks something a lab was asked for. A test that finds it
/// by `error.downcast_ref::<Unsupported>()` skips itself.
#[derive(Debug, thiserror::Error)]
#[error("{what} is not available here: {why}")]
pub struct Unsupported {
    /// The request.
    pub what: String,
    /// The attempt and its failure.
    pub why: String,
}

/// The variable that lets a test which cannot run pass instead of fail.
const SKIP: &str = "SLUICE_TEST_SKIP";

/// Returns `true` and prints the reason if a test that cannot run is to be skipped.
///
/// # Panics
///
/// Unless the variable is set: a test that did not run has not passed.
pub fn skipped(obstacle: &str) -> bool {
    assert!(
        std::env::var_os(SKIP).is_some_and(|value| value == "1"),
        "cannot run: {obstacle}; {SKIP}=1 skips tests that cannot run here"
    );
    println!("skipped: {obstacle}");
    true
}
