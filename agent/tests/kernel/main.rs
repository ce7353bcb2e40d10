//! The programs and maps on the real kernel, without traffic: root, and the BPF object.

mod dataplane;
mod packets;
