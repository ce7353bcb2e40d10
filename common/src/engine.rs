//! What becomes of a packet once the path has decided.

pub mod count;
pub mod limit;
pub mod open;
pub mod record;
pub mod xdp;
