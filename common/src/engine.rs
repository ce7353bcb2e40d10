//! What becomes of a packet once the path has decided.

pub mod limit;
pub mod record;
