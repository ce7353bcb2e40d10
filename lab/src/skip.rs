//! Tests that a machine cannot run.

/// Names the variable that makes a test which cannot run pass instead of fail.
const SKIP: &str = "SLUICE_TEST_SKIP";

/// Says why a test is skipped and is true, if it is to be skipped where it cannot run.
///
/// # Panics
///
/// If nobody said so: a test that did not run has not passed.
pub fn skipped(obstacle: &str) -> bool {
    assert!(
        std::env::var_os(SKIP).is_some_and(|value| value == "1"),
        "cannot run: {obstacle}; {SKIP}=1 skips tests that cannot run here"
    );
    println!("skipped: {obstacle}");
    true
}
