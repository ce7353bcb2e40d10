//! Encodes and decodes netlink messages that `rtnetlink` does not support: requests as bytes,
//! answers one by one, attributes by number.

use std::io;

use rtnetlink::packet_core::{
    DefaultNla, Emitable, NLA_F_NESTED, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer,
    NetlinkHeader, NlasIterator,
};
pub(crate) use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL};
pub(crate) use rtnetlink::sys::Socket;
use rtnetlink::sys::SocketAddr;
pub(crate) use rtnetlink::sys::protocols::{
    NETLINK_GENERIC, NETLINK_NETFILTER, NETLINK_ROUTE, NETLINK_XFRM,
};

/// The room for one piece of a listing, bytes. The kernel sends none above 32 KiB.
pub(crate) const PIECE: usize = 64 * 1024;

/// A builder of attributes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Attributes(Vec<u8>);

impl Attributes {
    /// Adds an attribute.
    pub(crate) fn with(mut self, kind: u16, value: &[u8]) -> Self {
        let attribute = DefaultNla::new(kind, value.to_vec());
        let at = self.0.len();
        self.0.resize(at + attribute.buffer_len(), 0);
        attribute.emit(self.0.get_mut(at..).unwrap_or_default());
        self
    }

    /// Adds an attribute that contains others.
    pub(crate) fn nest(self, kind: u16, inside: &Self) -> Self {
        self.with(kind | NLA_F_NESTED, &inside.0)
    }

    /// Adds a text, which ends with a zero for the kernel.
    pub(crate) fn text(self, kind: u16, text: &str) -> Self {
        self.with(kind, &[text.as_bytes(), &[0]].concat())
    }

    /// Returns the attributes as they are sent.
    #[cfg(test)]
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// Builds a message to the kernel. `fixed` is the header before the attributes of this kind of
/// message.
pub(crate) fn message(kind: u16, flags: u16, fixed: &[u8], attributes: &Attributes) -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    let room = header.buffer_len();
    header.length = (room + fixed.len() + attributes.0.len()) as u32;
    header.message_type = kind;
    header.flags = NLM_F_REQUEST | flags;
    header.sequence_number = 1;
    let mut bytes = vec![0; room];
    header.emit(&mut bytes);
    bytes.extend(fixed);
    bytes.extend(&attributes.0);
    bytes
}

/// Opens a socket to a subsystem of the kernel.
///
/// # Errors
///
/// Fails if the kernel has no such part.
pub(crate) fn connect(protocol: isize) -> io::Result<Socket> {
    let socket = Socket::new(protocol)?;
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}

/// Receives one datagram into the buffer, and waits for it unless `flags` say otherwise.
///
/// # Errors
///
/// Fails if it does not fit into the buffer's capacity, or the kernel refuses.
pub(crate) fn receive(socket: &Socket, buffer: &mut Vec<u8>, flags: libc::c_int) -> io::Result<()> {
    loop {
        buffer.clear();
        // With MSG_TRUNC the result is the message's full length.
        match socket.recv(buffer, libc::MSG_TRUNC | flags) {
            Ok(length) if length > buffer.len() => {
                return Err(io::Error::other(format!(
                    "a netlink message of {length} bytes was cut short"
                )));
            }
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Calls `each` with the payload of every answer in a datagram. Returns the kernel's result if the
/// datagram contains it, and so ends the answers.
pub(crate) fn read(mut datagram: &[u8], mut each: impl FnMut(&[u8])) -> Option<io::Result<()>> {
    while let Ok(one) = NetlinkBuffer::new_checked(&datagram) {
        match one.message_type() {
            NLMSG_DONE => return Some(Ok(())),
            NLMSG_ERROR => {
                return Some(match number(Some(one.payload())).unwrap_or_default().cast_signed() {
                    0 => Ok(()),
                    code => Err(io::Error::from_raw_os_error(code.saturating_neg())),
                });
            }
            _ => each(one.payload()),
        }
        let length = one.length() as usize;
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    None
}

/// Sends a message to a subsystem of the kernel, and calls `each` with the payload of every answer
/// until the kernel is done.
///
/// # Errors
///
/// Fails if the kernel refuses.
pub(crate) fn ask(protocol: isize, message: &[u8], mut each: impl FnMut(&[u8])) -> io::Result<()> {
    let socket = connect(protocol)?;
    let _ = socket.send(message, 0)?;
    let mut datagram = Vec::with_capacity(PIECE);
    loop {
        receive(&socket, &mut datagram, 0)?;
        if let Some(end) = read(&datagram, &mut each) {
            return end;
        }
    }
}

/// Returns the kind and value of every attribute in a run of attributes.
pub(crate) fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    NlasIterator::new(bytes).map_while(|attribute| {
        let attribute = attribute.ok()?;
        let (kind, length) = (attribute.kind(), usize::from(attribute.length()));
        Some((kind, attribute.into_inner().get(4..length)?))
    })
}

/// Returns the value of an attribute in a run of attributes.
pub(crate) fn find(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

/// Returns a value as text.
pub(crate) fn text(bytes: Option<&[u8]>) -> String {
    let bytes = bytes.unwrap_or_default();
    String::from_utf8_lossy(bytes.strip_suffix(&[0]).unwrap_or(bytes)).into_owned()
}

/// Returns the number at the start of a value, in native byte order.
pub(crate) fn number(bytes: Option<&[u8]>) -> Option<u32> {
    bytes?.first_chunk().copied().map(u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_found_as_they_were_written() {
        let inside = Attributes::default().text(1, "abcd").with(2, &[7; 6]);
        let all = Attributes::default().with(5, &[]).nest(6, &inside).with(7, &[1]);
        let nested = find(all.bytes(), 6).expect("it is there");
        assert_eq!(text(find(nested, 1)), "abcd");
        assert_eq!(find(nested, 2), Some(&[7; 6][..]));
        assert_eq!(find(all.bytes(), 5), Some(&[][..]));
        assert_eq!(find(all.bytes(), 7), Some(&[1][..]));
        assert_eq!(find(all.bytes(), 8), None);
        assert!(all.bytes().len().is_multiple_of(4));
        assert_eq!(find(&[3, 0, 1, 0], 1), None, "shorter than its own head");
        assert_eq!(find(&[9, 0, 1, 0], 1), None, "longer than what is there");
    }

    #[test]
    fn answers_are_read_until_the_kernel_is_done() {
        let said = |code: i32| message(NLMSG_ERROR, 0, &code.to_ne_bytes(), &Attributes::default());
        let answer = message(16, 0, &[1, 2, 3, 4], &Attributes::default());
        let done = message(NLMSG_DONE, 0, &[0; 4], &Attributes::default());
        let mut seen = 0;
        let mut end = |parts: &[&[u8]]| read(&parts.concat(), |_| seen += 1);
        assert!(end(&[&answer, &answer]).is_none(), "more will come");
        assert!(end(&[&answer, &done, &answer]).is_some_and(|end| end.is_ok()));
        assert!(end(&[&said(0)]).is_some_and(|end| end.is_ok()));
        let refused = end(&[&said(-libc::ENOENT)]).and_then(Result::err);
        assert_eq!(refused.and_then(|error| error.raw_os_error()), Some(libc::ENOENT));
        assert!(end(&[&[20, 0, 0, 0]]).is_none());
        assert_eq!(seen, 3);
    }
}
