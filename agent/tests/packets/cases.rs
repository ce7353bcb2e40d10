//! The table.

mod plain;

use super::case::Case;

/// Every case.
pub(crate) fn all() -> Vec<Case> {
    [plain::cases()].concat()
}

/// Every case, and some of them once for each length they can be cut off at.
pub(crate) fn with_prefixes() -> Vec<Case> {
    let mut cases = all();
    let cut: Vec<Case> = plain::cut().iter().flat_map(Case::every_prefix).collect();
    cases.extend(cut);
    cases
}
