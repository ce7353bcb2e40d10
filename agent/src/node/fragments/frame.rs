//! A held frame: its label, the frame behind it, and the datagram that it is a fragment of.

use sluice_common::packet::header::Wire;
use sluice_common::packet::parse::{self, Kind, Parse};
use sluice_common::path::fragment::{self, LABEL_ETHERTYPE, Label, label};
use sluice_common::{Packet, V4, V6};

use crate::node::dataplane::DatagramKey;

/// Bytes of an Ethernet header.
const LINK: usize = 14;
/// Where the ethertype is in it.
const ETHERTYPE: u32 = 12;

/// A frame as it goes back to where it was met.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Frame {
    /// With an Ethernet header, also where the device has none: our own device takes nothing else.
    pub(super) bytes: Vec<u8>,
    /// Tells the program of our own device where it was met.
    pub(super) mark: u32,
    /// Host order.
    pub(super) ethertype: u16,
    pub(super) key: DatagramKey,
}

/// Bytes as a packet.
struct Bytes<'a>(&'a [u8]);

impl Packet for Bytes<'_> {
    fn length(&self) -> u32 {
        self.0.len() as u32
    }

    fn read<T: Wire>(&self, offset: u32) -> Option<T> {
        let bytes = self.0.get(offset as usize..)?.get(..size_of::<T>())?;
        // SAFETY: as many bytes as the type has; any are a value.
        Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
    }
}

/// Reads what a program has labelled; [`None`] for anything else.
pub(super) fn read(labelled: &[u8]) -> Option<Frame> {
    let label: Label = Bytes(labelled).read(0)?;
    if u16::from_be_bytes(label.ethertype) != LABEL_ETHERTYPE {
        return None;
    }
    let behind = labelled.get(LINK..)?;
    let bytes = if label.flags & label::L3 == 0 {
        behind.to_vec()
    } else {
        let ethertype: u16 = if behind.first()? >> 4 == 4 { 0x0800 } else { 0x86dd };
        [&[0; ETHERTYPE as usize][..], &ethertype.to_be_bytes(), behind].concat()
    };
    let packet = Bytes(&bytes);
    let ethertype = u16::from_be(packet.read(ETHERTYPE)?);
    let key = match parse::untag(&packet, ethertype, LINK as u32)? {
        (0x0800, offset) => DatagramKey::V4(datagram::<V4>(&packet, offset)?),
        (0x86dd, offset) => DatagramKey::V6(datagram::<V6>(&packet, offset)?),
        _ => return None,
    };
    Some(Frame { mark: label.mark(), ethertype, key, bytes })
}

fn datagram<F: Parse>(
    packet: &Bytes<'_>,
    offset: u32,
) -> Option<sluice_common::abi::Datagram<F::Address>> {
    let headers = parse::headers::<F, _>(packet, offset)?;
    (headers.kind == Kind::Fragment).then(|| fragment::key(&headers))
}

#[cfg(test)]
mod tests {
    use sluice_common::abi::{Datagram, Ipv4Address};

    use super::*;

    /// A fragment in the middle of a UDP datagram, without link header.
    const PACKET: &[u8] = b"\x45\0\0\x18\x12\x34\x20\x10\x40\x11\0\0\x0a\0\0\x01\x0a\x60\0\x01data";

    fn key() -> DatagramKey {
        DatagramKey::V4(Datagram {
            source: Ipv4Address { octets: [10, 0, 0, 1] },
            destination: Ipv4Address { octets: [10, 96, 0, 1] },
            id: u32::from(u16::from_ne_bytes([0x12, 0x34])),
            protocol: 17,
            reserved: [0; 3],
        })
    }

    fn labelled(flags: u8, link: &[u8]) -> Vec<u8> {
        let ifindex = 0x0102_u32.to_be_bytes();
        [&[2, flags][..], &ifindex, &[0; 6], &LABEL_ETHERTYPE.to_be_bytes(), link, PACKET].concat()
    }

    #[test]
    fn a_labelled_fragment_is_read() {
        let link = b"\x02\0\0\0\0\x0d\x02\0\0\0\0\x05\x08\x00";
        let frame = read(&labelled(0, link)).expect("a fragment");
        assert_eq!((frame.mark, frame.ethertype, frame.key), (0x0204, 0x0800, key()));
        assert_eq!(frame.bytes, [link, PACKET].concat());
        assert_eq!(fragment::place_of_mark(frame.mark), (0x0102, false));

        let frame = read(&labelled(label::EGRESS | label::L3, b"")).expect("a fragment");
        assert_eq!((frame.mark, frame.key), (0x0205, key()));
        assert_eq!(frame.bytes, [&[0; 12][..], &[8, 0], PACKET].concat());
        assert_eq!(fragment::place_of_mark(frame.mark), (0x0102, true));

        // In band, a tag stays.
        let tagged = b"\x02\0\0\0\0\x0d\x02\0\0\0\0\x05\x81\x00\0\x07\x08\x00";
        let frame = read(&labelled(0, tagged)).expect("a fragment");
        assert_eq!((frame.ethertype, frame.key), (0x8100, key()));
    }

    #[test]
    fn anything_else_is_none_of_ours() {
        let whole = labelled(label::L3, b"");
        for length in 0..LINK + 20 {
            assert_eq!(read(&whole[..length]), None, "{length} bytes");
        }
        let mut first = whole.clone();
        first[LINK + 7] = 0;
        assert_eq!(read(&first), None, "a first fragment");
        assert_eq!(read(&whole[LINK..]), None, "no label");
    }
}
