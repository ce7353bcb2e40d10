//! Packets as bytes: where their headers are, what changes in them, what answers them.

pub mod answer;
pub mod bytes;
pub mod checksum;
pub mod crc32c;
pub mod header;
pub mod parse;
pub mod rewrite;
