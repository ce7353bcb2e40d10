//! Tests of the programs and maps on the real kernel, without traffic. They need root and the BPF
//! object.

mod dataplane;
mod packets;
