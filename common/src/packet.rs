//! Packets as bytes: where their headers are, how they are rewritten, and how they are answered.

pub mod answer;
pub mod bytes;
pub mod checksum;
pub mod crc32c;
pub mod header;
pub mod parse;
pub mod rewrite;
