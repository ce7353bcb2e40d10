//! Reads and changes the kernel's table by ctnetlink. A listing is processed piece by piece, so
//! that memory does not grow with the table.

use std::io;
use std::net::IpAddr;
use std::time::Duration;

use netlink_packet_netfilter::conntrack::{
    ConntrackAttribute, ConntrackMessage, ConntrackMessageType, IPTuple, ProtoInfo, ProtoInfoTCP,
    ProtoTuple, Protocol, Status, Tuple,
};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use rtnetlink::packet_core::{
    DefaultNla, Emitable, ErrorMessage, NLA_F_NESTED, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP,
    NLM_F_DUMP_INTR, NLM_F_EXCL, NLM_F_REQUEST, NetlinkBuffer, NetlinkHeader, NetlinkMessage,
    NetlinkPayload, Nla,
};
use sluice_core::model::object::IpFamily;

use super::{Cleaned, End, Flow, Translated};
use crate::node::netlink::{NETLINK_NETFILTER, PIECE, Socket, connect, receive};

/// The number of entries of this network namespace. The file exists if the kernel has conntrack.
const COUNT: &str = "/proc/sys/net/netfilter/nf_conntrack_count";
/// The room for an answer, which repeats the request, bytes.
const ANSWER: usize = 4 * 1024;
/// `CTA_ID`: distinguishes an entry from a later one of the same flow.
const ID: u16 = 12;
/// `CTA_ZONE`: a table within the table.
const ZONE: u16 = 18;
/// `CTA_FILTER`: the parts of the tuple that listed entries must match; since Linux 5.8.
const FILTER: u16 = 25;
/// `CTA_TUPLE_ORIG`, `CTA_TUPLE_PROTO` and `CTA_PROTO_NUM`: one within the other.
const ORIGINAL: u16 = 1;
const PROTOCOLS: u16 = 2;
const PROTOCOL: u16 = 1;
/// `CTA_FILTER_ORIG_FLAGS`.
const FILTER_ORIGINAL: u16 = 1;
/// The protocol's number, in [`FILTER_ORIGINAL`].
const FILTER_PROTOCOL: u32 = 1 << 3;

/// Whether this network namespace has any entries. A query by netlink would load conntrack.
pub(super) fn is_used() -> bool {
    match std::fs::read_to_string(COUNT) {
        Ok(count) => count.trim() != "0",
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    }
}

/// An entry of the kernel's table.
#[derive(Debug, PartialEq, Eq)]
struct Entry {
    flow: Flow,
    /// The attributes that identify it: tuple, zone, id. Never empty, since without a tuple the
    /// kernel would delete everything.
    key: Vec<ConntrackAttribute>,
}

/// Deletes the UDP entries of a family that are stale.
pub(super) fn sweep(family: IpFamily, is_stale: impl Fn(&Flow) -> bool) -> io::Result<Cleaned> {
    let mut cleaned = Cleaned::default();
    let Some((listing, deleting)) = without_conntrack(
        connect(NETLINK_NETFILTER).and_then(|one| Ok((one, connect(NETLINK_NETFILTER)?))),
    )?
    else {
        return Ok(cleaned);
    };
    let mut stale = Vec::new();
    let mut kept = None;
    cleaned.interrupted = list(&listing, &listing_of(family), |piece| {
        let said = read(piece, |attributes| {
            let Some(entry) = entry(attributes) else { return };
            cleaned.seen += 1;
            if is_stale(&entry.flow) {
                stale.push(entry.key);
            }
        });
        for key in stale.drain(..) {
            match delete(&deleting, family, key) {
                Ok(was_there) => cleaned.deleted += u64::from(was_there),
                Err(error) => kept = Some(error),
            }
        }
        said
    })?;
    kept.map_or(Ok(cleaned), Err)
}

/// Calls `each` with every entry of a family whose destination is translated. Returns false if some
/// may be missing.
pub(super) fn translated(family: IpFamily, mut each: impl FnMut(Translated)) -> io::Result<bool> {
    let Some(listing) = without_conntrack(connect(NETLINK_NETFILTER))? else { return Ok(true) };
    let request = message(NLM_F_DUMP, family, ConntrackMessage::Get(Vec::new()));
    let interrupted = list(&listing, &request, |piece| {
        read(piece, |attributes| {
            if let Some(found) = translation(&attributes) {
                each(found);
            }
        })
    })?;
    Ok(!interrupted)
}

/// Requests a listing and processes it piece by piece. Returns whether entries may be missing.
fn list(
    socket: &Socket,
    request: &NetlinkMessage<NetfilterMessage>,
    mut deal: impl FnMut(&[u8]) -> Said,
) -> io::Result<bool> {
    let _ = socket.send(&bytes(request), 0)?;
    let mut piece = Vec::with_capacity(PIECE);
    let mut interrupted = false;
    loop {
        receive(socket, &mut piece, 0)?;
        let said = deal(&piece);
        interrupted |= said.interrupted;
        match said.end {
            None => {}
            Some(Ok(())) => return Ok(interrupted),
            Some(Err(error)) if error.kind() == io::ErrorKind::Interrupted => return Ok(true),
            Some(Err(error)) => {
                let _: Option<()> = without_conntrack(Err(error))?;
                return Ok(interrupted);
            }
        }
    }
}

/// Turns errors of a kernel that has no ctnetlink into [`None`].
fn without_conntrack<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(
                    libc::ENOENT
                        | libc::EPROTONOSUPPORT
                        | libc::EAFNOSUPPORT
                        | libc::EOPNOTSUPP
                        | libc::EINVAL
                )
            ) =>
        {
            tracing::debug!("conntrack cannot be listed here: {error}");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Builds the request for all UDP entries of a family. The kernel filters the protocol, since most
/// entries of a node are TCP's.
fn listing_of(family: IpFamily) -> NetlinkMessage<NetfilterMessage> {
    let protocol = DefaultNla::new(PROTOCOL, vec![libc::IPPROTO_UDP as u8]);
    let flags = DefaultNla::new(FILTER_ORIGINAL, FILTER_PROTOCOL.to_ne_bytes().to_vec());
    // The library cannot nest attributes in one that it does not know, such as the filter.
    let request = ConntrackMessage::Other {
        message_type: ConntrackMessageType::Get.into(),
        attributes: vec![nested(ORIGINAL, &nested(PROTOCOLS, &protocol)), nested(FILTER, &flags)],
    };
    message(NLM_F_DUMP, family, request)
}

fn nested(kind: u16, inside: &DefaultNla) -> DefaultNla {
    let mut value = vec![0; inside.buffer_len()];
    inside.emit(&mut value);
    DefaultNla::new(kind | NLA_F_NESTED, value)
}

fn message(
    flags: u16,
    family: IpFamily,
    request: ConntrackMessage,
) -> NetlinkMessage<NetfilterMessage> {
    let family = match family {
        IpFamily::V4 => NetfilterProtoFamily::IPv4,
        IpFamily::V6 => NetfilterProtoFamily::IPv6,
    };
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    let request = NetfilterMessage::new(NetfilterHeader::new(family, 0, 0), request);
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(request));
    message.finalize();
    message
}

fn bytes(message: &NetlinkMessage<NetfilterMessage>) -> Vec<u8> {
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

/// The rest of a piece of a listing, without its entries.
#[derive(Debug, Default)]
struct Said {
    /// The result, if the listing has ended.
    end: Option<io::Result<()>>,
    /// Whether the table changed so much meanwhile that entries may be missing.
    interrupted: bool,
}

/// Parses a piece of a listing.
fn read(mut piece: &[u8], mut each: impl FnMut(Vec<ConntrackAttribute>)) -> Said {
    let mut said = Said::default();
    while said.end.is_none()
        && let Ok(one) = NetlinkBuffer::new_checked(&piece)
    {
        let (length, is_interrupted) = (one.length() as usize, one.flags() & NLM_F_DUMP_INTR != 0);
        said.interrupted |= is_interrupted;
        match NetlinkMessage::<NetfilterMessage>::deserialize(piece).map(|message| message.payload)
        {
            Ok(NetlinkPayload::InnerMessage(message)) => {
                if let NetfilterMessageInner::Conntrack(ConntrackMessage::New(attributes)) =
                    message.inner
                {
                    each(attributes);
                }
            }
            Ok(NetlinkPayload::Done(done)) if done.code < 0 => {
                said.end = Some(Err(error(done.code)));
            }
            Ok(NetlinkPayload::Done(_)) => said.end = Some(Ok(())),
            Ok(NetlinkPayload::Error(refused)) => said.end = Some(acknowledged(&refused)),
            Ok(NetlinkPayload::Overrun(_)) => said.interrupted = true,
            // An entry that cannot be parsed is not ours.
            Ok(_) | Err(_) => {}
        }
        piece = piece.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    said
}

fn acknowledged(answer: &ErrorMessage) -> io::Result<()> {
    match answer.raw_code() {
        0 => Ok(()),
        code => Err(error(code)),
    }
}

fn error(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code.saturating_neg())
}

/// The needed parts of one direction of an entry.
#[derive(Debug, Default)]
struct Ends {
    protocol: Option<u8>,
    source: (Option<IpAddr>, Option<u16>),
    destination: (Option<IpAddr>, Option<u16>),
}

impl Ends {
    fn of(tuple: &[Tuple]) -> Self {
        let mut ends = Self::default();
        for part in tuple {
            if let Tuple::Ip(addresses) = part {
                for address in addresses {
                    if let IPTuple::SourceAddress(address) = address {
                        ends.source.0 = Some(*address);
                    } else if let IPTuple::DestinationAddress(address) = address {
                        ends.destination.0 = Some(*address);
                    }
                }
            } else if let Tuple::Proto(ports) = part {
                for port in ports {
                    if let ProtoTuple::SourcePort(port) = port {
                        ends.source.1 = Some(*port);
                    } else if let ProtoTuple::DestinationPort(port) = port {
                        ends.destination.1 = Some(*port);
                    } else if let ProtoTuple::Protocol(protocol) = port {
                        ends.protocol = Some(u8::from(*protocol));
                    }
                }
            }
        }
        ends
    }

    /// Returns protocol, source and destination, if there are ports.
    fn known(&self) -> Option<(u8, End, End)> {
        Some((
            self.protocol?,
            (self.source.0?, self.source.1?),
            (self.destination.0?, self.destination.1?),
        ))
    }
}

/// `TCP_CONNTRACK_LAST_ACK` to `TCP_CONNTRACK_CLOSE`: both sides have closed the connection, or one
/// has reset it.
const TCP_CLOSING: std::ops::RangeInclusive<u8> = 6..=8;

/// Returns an entry's connection if its destination is translated.
fn translation(attributes: &[ConntrackAttribute]) -> Option<Translated> {
    let (mut original, mut reply, mut is_translated, mut closing, mut left) =
        (None, None, false, false, 0);
    for attribute in attributes {
        if let ConntrackAttribute::CtaTupleOrig(tuple) = attribute {
            original = Ends::of(tuple).known();
        } else if let ConntrackAttribute::CtaTupleReply(tuple) = attribute {
            reply = Ends::of(tuple).known();
        } else if let ConntrackAttribute::CtaStatus(status) = attribute {
            is_translated = status.contains(Status::DstNat);
        } else if let ConntrackAttribute::CtaTimeout(seconds) = attribute {
            left = *seconds;
        } else if let ConntrackAttribute::CtaProtoInfo(infos) = attribute {
            closing = infos.iter().any(|info| {
                let ProtoInfo::TCP(parts) = info else { return false };
                parts
                    .iter()
                    .any(|part| matches!(part, ProtoInfoTCP::State(state) if TCP_CLOSING.contains(state)))
            });
        }
    }
    let (protocol, client, frontend) = original?;
    let (_, backend, seen_as) = reply?;
    is_translated.then_some(Translated {
        protocol,
        client,
        frontend,
        backend,
        seen_as,
        closing,
        left,
    })
}

/// Builds an entry of attributes. Returns [`None`] if it is not UDP's, or incomplete.
fn entry(attributes: Vec<ConntrackAttribute>) -> Option<Entry> {
    let (mut original, mut reply, mut answered) = (Ends::default(), Ends::default(), false);
    let mut key = Vec::with_capacity(3);
    for attribute in attributes {
        if let ConntrackAttribute::CtaTupleOrig(tuple) = &attribute {
            original = Ends::of(tuple);
            key.push(attribute);
        } else if let ConntrackAttribute::CtaTupleReply(tuple) = &attribute {
            reply = Ends::of(tuple);
        } else if let ConntrackAttribute::CtaStatus(status) = &attribute {
            answered = status.contains(Status::SeenReply);
        } else if let ConntrackAttribute::Other(other) = &attribute
            && [ID, ZONE].contains(&other.kind())
        {
            key.push(attribute);
        }
    }
    let destination = (original.destination.0?, original.destination.1?);
    let reply_source = (reply.source.0?, reply.source.1?);
    (original.protocol == Some(u8::from(Protocol::Udp)))
        .then_some(Entry { flow: Flow { destination, reply_source, answered }, key })
}

/// Adds entries of connections as they are between this node and the backend. Existing entries stay
/// as they are.
pub(super) fn insert(connections: &[Translated], time: Duration) -> io::Result<()> {
    if connections.is_empty() {
        return Ok(());
    }
    let Some(socket) = without_conntrack(connect(NETLINK_NETFILTER))? else { return Ok(()) };
    let mut answer = Vec::with_capacity(ANSWER);
    for connection in connections {
        let family = IpFamily::of(connection.backend.0);
        let request = ConntrackMessage::New(entered(connection, time));
        let request = message(NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, family, request);
        let _ = socket.send(&bytes(&request), 0)?;
        receive(&socket, &mut answer, 0)?;
        match read(&answer, drop).end {
            Some(Err(error)) if error.raw_os_error() != Some(libc::EEXIST) => return Err(error),
            Some(_) => {}
            None => {
                return Err(io::Error::other("the kernel did not say whether it made an entry"));
            }
        }
    }
    Ok(())
}

/// Deletes entries by their original tuples.
pub(super) fn forget(family: IpFamily, connections: &[Translated]) -> io::Result<()> {
    if connections.is_empty() {
        return Ok(());
    }
    let Some(socket) = without_conntrack(connect(NETLINK_NETFILTER))? else { return Ok(()) };
    for one in connections {
        let key = ConntrackAttribute::CtaTupleOrig(tuple(one.protocol, one.client, one.frontend));
        let _ = delete(&socket, family, vec![key])?;
    }
    Ok(())
}

/// Builds one direction of a connection.
fn tuple(number: u8, source: End, destination: End) -> Vec<Tuple> {
    let protocol = match i32::from(number) {
        libc::IPPROTO_TCP => Protocol::Tcp,
        libc::IPPROTO_UDP => Protocol::Udp,
        _ => Protocol::Sctp,
    };
    let addresses =
        vec![IPTuple::SourceAddress(source.0), IPTuple::DestinationAddress(destination.0)];
    let ports = vec![
        ProtoTuple::Protocol(protocol),
        ProtoTuple::SourcePort(source.1),
        ProtoTuple::DestinationPort(destination.1),
    ];
    vec![Tuple::Ip(addresses), Tuple::Proto(ports)]
}

/// Builds the attributes of an entry for an established connection.
fn entered(connection: &Translated, time: Duration) -> Vec<ConntrackAttribute> {
    const TCP_ESTABLISHED: u8 = 3;
    let protocol = connection.protocol;
    let (node, backend) = (connection.seen_as, connection.backend);
    let seconds = u32::try_from(time.as_secs()).unwrap_or(u32::MAX).max(1);
    let mut attributes = vec![
        ConntrackAttribute::CtaTupleOrig(tuple(protocol, node, backend)),
        ConntrackAttribute::CtaTupleReply(tuple(protocol, backend, node)),
        ConntrackAttribute::CtaTimeout(seconds),
        ConntrackAttribute::CtaStatus(Status::SeenReply | Status::Assured | Status::Confirmed),
    ];
    if i32::from(protocol) == libc::IPPROTO_TCP {
        let state = ProtoInfo::TCP(vec![ProtoInfoTCP::State(TCP_ESTABLISHED)]);
        attributes.push(ConntrackAttribute::CtaProtoInfo(vec![state]));
    }
    attributes
}

/// Deletes an entry, and returns whether it still existed.
fn delete(socket: &Socket, family: IpFamily, key: Vec<ConntrackAttribute>) -> io::Result<bool> {
    let _ = socket.send(&bytes(&message(NLM_F_ACK, family, ConntrackMessage::Delete(key))), 0)?;
    let mut answer = Vec::with_capacity(ANSWER);
    receive(socket, &mut answer, 0)?;
    match read(&answer, drop).end {
        Some(Ok(())) => Ok(true),
        Some(Err(error)) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Some(Err(error)) => Err(error),
        None => Err(io::Error::other("the kernel did not say whether it deleted an entry")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// IPv6, UDP, translated from port 53 to 5353, answered; as listed by Linux 6.18.
    const V6: &str = "d4000000 00010200 65bb016b 52300000 0a000000 4c000180 2c000180 14000300 fd000096 00000000 00000000 00000010 \
        14000400 fd000096 00000000 00000000 00000010 1c000280 05000100 11000000 06000200 c3f50000 06000300 00350000 \
        4c000280 2c000180 14000300 fd000096 00000000 00000000 00000010 14000400 fd000096 00000000 00000000 00000010 \
        1c000280 05000100 11000000 06000200 14e90000 06000300 c3f50000 08000300 000001aa 08000800 00000000 \
        08000c00 24328a88 08000b00 00000001 08000700 0000001d";
    /// IPv4, UDP, 10.96.0.10:36787 to 10.96.0.10:53, translated to 127.0.0.1:5353, not answered, in
    /// zone 7.
    const V4: &str = "ac000000 00010200 65bb016b 52300000 02000000 34000180 14000180 08000100 0a60000a 08000200 0a60000a \
        1c000280 05000100 11000000 06000200 8fb30000 06000300 00350000 34000280 14000180 08000100 7f000001 08000200 0a60000a \
        1c000280 05000100 11000000 06000200 14e90000 06000300 8fb30000 06001200 00070000 08000300 000001a8 \
        08000800 00000000 08000c00 4fb89eab 08000b00 00000001 08000700 0000001d";
    const DONE: &str = "14000000 03000200 65bb016b 52300000 00000000";

    fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<u8> =
            text.chars().filter_map(|digit| digit.to_digit(16)).map(|digit| digit as u8).collect();
        digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect()
    }

    fn end(text: &str) -> (IpAddr, u16) {
        let end: std::net::SocketAddr = text.parse().expect("address and port");
        (end.ip(), end.port())
    }

    fn entries(piece: &[u8]) -> (Vec<Entry>, Said) {
        let mut entries = Vec::new();
        let said = read(piece, |attributes| entries.extend(entry(attributes)));
        (entries, said)
    }

    #[test]
    fn a_listing_is_read_entry_by_entry() {
        let (entries, said) = entries(&hex(&format!("{V6}{V4}{DONE}")));
        let flows: Vec<Flow> = entries.iter().map(|entry| entry.flow).collect();
        let expected = [
            Flow {
                destination: end("[fd00:96::10]:53"),
                reply_source: end("[fd00:96::10]:5353"),
                answered: true,
            },
            Flow {
                destination: end("10.96.0.10:53"),
                reply_source: end("127.0.0.1:5353"),
                answered: false,
            },
        ];
        assert_eq!(flows, expected);
        assert!(matches!(said.end, Some(Ok(()))) && !said.interrupted);
    }

    #[test]
    fn an_entry_is_deleted_by_tuple_zone_and_id() {
        let (mut entries, _) = entries(&hex(V4));
        let request =
            message(NLM_F_ACK, IpFamily::V4, ConntrackMessage::Delete(entries.remove(0).key));
        let expected = "58000000 02010500 00000000 00000000 02000000 34000180 14000180 08000100 0a60000a 08000200 0a60000a \
            1c000280 05000100 11000000 06000200 8fb30000 06000300 00350000 06001200 00070000 08000c00 4fb89eab";
        assert_eq!(bytes(&request), hex(expected));
    }

    #[test]
    fn udp_alone_is_asked_for() {
        let expected = "30000000 01010103 00000000 00000000 0a000000 10000180 0c000280 05000100 11000000 0c001980 08000100 08000000";
        assert_eq!(bytes(&listing_of(IpFamily::V6)), hex(expected));
    }

    #[test]
    fn other_protocols_and_fragments_are_not_entries() {
        let tcp = V4.replace("05000100 11000000", "05000100 06000000");
        assert!(entries(&hex(&tcp)).0.is_empty());
        // Without an original tuple there is nothing to delete it by.
        let without = V4.replace("34000180", "34001480");
        assert!(entries(&hex(&without)).0.is_empty());
        let whole = hex(V4);
        for length in 0..whole.len() {
            let (entries, said) = entries(&whole[..length]);
            assert!(entries.is_empty() && said.end.is_none(), "{length} bytes");
        }
    }

    #[test]
    fn a_listing_that_was_interrupted_or_refused_says_so() {
        let interrupted = V4.replace("00010200", "00011200");
        let (found, said) = entries(&hex(&interrupted));
        assert!(found.len() == 1 && said.interrupted && said.end.is_none());
        // EINTR at the end, EINVAL at the start.
        let (_, said) = entries(&hex("14000000 03000200 00000000 00000000 fcffffff"));
        assert!(matches!(said.end, Some(Err(error)) if error.kind() == io::ErrorKind::Interrupted));
        let request = "14000000 01010103 00000000 00000000";
        let (_, said) =
            entries(&hex(&format!("24000000 02000000 00000000 00000000 eaffffff{request}")));
        let refused = said.end.expect("an end");
        assert!(matches!(without_conntrack(refused), Ok(None)));
    }
}
