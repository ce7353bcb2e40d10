//! Datagrams in fragments: the first one tells the ports, the others are found by what all of them have in common.

use crate::abi::Datagram;
use crate::family::Family;
use crate::parse::Headers;

/// The datagram that a fragment belongs to; the same for each of its fragments.
#[inline(always)]
pub fn key<F: Family>(headers: &Headers<F>) -> Datagram<F::Address> {
    // Not the tuple's: in an ICMP error that is the quoted packet's.
    let [source, destination] = headers.outer;
    Datagram {
        source,
        destination,
        id: headers.datagram,
        protocol: headers.datagram_protocol,
        reserved: [0; 3],
    }
}
