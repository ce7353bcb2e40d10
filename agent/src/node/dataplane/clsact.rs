//! Classifiers by clsact filters, for kernels without TCX and for places behind somebody else's
//! filter.
//!
//! A filter belongs to the device, so it stays when the agent goes; a later agent finds it by its
//! fixed priority and handle, and replaces its program between two packets.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Which way packets go through the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    /// From the device into the stack.
    Ingress,
    /// From the stack to the device.
    Egress,
}

impl Direction {
    /// The word for people and pins.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }

    fn parent(self) -> u32 {
        match self {
            Self::Ingress => 0xffff_fff2,
            Self::Egress => 0xffff_fff3,
        }
    }

    /// First at ingress, last at egress: others see real addresses.
    fn priority(self) -> u16 {
        match self {
            Self::Ingress => 1,
            Self::Egress => 0xfff0,
        }
    }
}

/// Our filters' handle: unlike the small numbers that the kernel and other programs take.
const HANDLE: u32 = 0x51_0cb5;
/// What our filters' names begin with.
const PREFIX: &str = "sluice_";

const RTM_NEWQDISC: u16 = 36;
const RTM_DELQDISC: u16 = 37;
const RTM_NEWTFILTER: u16 = 44;
const RTM_DELTFILTER: u16 = 45;
const RTM_GETTFILTER: u16 = 46;
const F_REQUEST: u16 = 1;
pub(crate) const F_ACK: u16 = 4;
pub(crate) const F_DUMP: u16 = 0x300;
const F_EXCL: u16 = 0x200;
const F_CREATE: u16 = 0x400;
const TC_H_CLSACT: u32 = 0xffff_fff1;
const CLSACT_HANDLE: u32 = 0xffff_0000;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
const DIRECT_ACTION: u32 = 1;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NESTED: u16 = 0x8000;

/// A filter as the kernel lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// Position among the device's filters.
    pub priority: u16,
    /// Number within the priority.
    pub handle: u32,
    /// `bpf`, `flower`, ...
    pub kind: String,
    /// The program's name, for `bpf`.
    pub name: String,
}

impl Filter {
    /// Whether one of our agents made it.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        self.handle == HANDLE && self.kind == "bpf" && self.name.starts_with(PREFIX)
    }
}

/// A message to the kernel in the making.
pub(crate) struct Message(Vec<u8>);

impl Message {
    /// Header and `struct tcmsg`.
    fn new(kind: u16, flags: u16, device: u32, handle: u32, parent: u32, info: u32) -> Self {
        // Family and padding.
        let mut message = Self::plain(kind, flags, &[0; 4]);
        for word in [device, handle, parent, info] {
            message.0.extend(word.to_ne_bytes());
        }
        message
    }

    /// Header, and what follows it in every message of this kind.
    pub(crate) fn plain(kind: u16, flags: u16, fixed: &[u8]) -> Self {
        let mut message = Self(Vec::with_capacity(128));
        message.0.extend([0; 4]);
        message.0.extend(kind.to_ne_bytes());
        message.0.extend((F_REQUEST | flags).to_ne_bytes());
        // Sequence and port.
        message.0.extend(1_u32.to_ne_bytes());
        message.0.extend([0; 4]);
        message.0.extend(fixed);
        message
    }

    pub(crate) fn attribute(&mut self, kind: u16, value: &[u8]) {
        self.0.extend((value.len() as u16 + 4).to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    pub(crate) fn finish(mut self) -> Vec<u8> {
        let length = (self.0.len() as u32).to_ne_bytes();
        self.0.splice(..4, length).for_each(drop);
        self.0
    }
}

/// Sends one message about routing; calls `each` with the payload of every answer until the kernel
/// is done.
fn talk(message: Message, each: impl FnMut(&[u8])) -> io::Result<()> {
    talk_to(libc::NETLINK_ROUTE, message, each)
}

/// Sends one message to a part of the kernel; calls `each` with the payload of every answer until
/// the kernel is done.
pub(crate) fn talk_to(
    protocol: libc::c_int,
    message: Message,
    mut each: impl FnMut(&[u8]),
) -> io::Result<()> {
    // SAFETY: no pointers.
    let fd =
        unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is fresh and ours.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let message = message.finish();
    // SAFETY: the buffer is live; an unconnected netlink socket sends to the kernel.
    let sent = unsafe { libc::send(socket.as_raw_fd(), message.as_ptr().cast(), message.len(), 0) };
    if sent < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut buffer = vec![0_u8; 64 * 1024];
    loop {
        // SAFETY: the buffer is live and of the length given.
        let got =
            unsafe { libc::recv(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        if got < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut rest = buffer.get(..got.cast_unsigned()).unwrap_or_default();
        while let Some(length) =
            word(rest, 0).map(|length| length as usize).filter(|length| *length >= 16)
        {
            let Some(one) = rest.get(..length) else { break };
            let kind = half(one, 4).unwrap_or_default();
            let payload = one.get(16..).unwrap_or_default();
            match kind {
                NLMSG_DONE => return Ok(()),
                NLMSG_ERROR => {
                    return match word(payload, 0).unwrap_or_default().cast_signed() {
                        0 => Ok(()),
                        code => Err(io::Error::from_raw_os_error(-code)),
                    };
                }
                _ => each(payload),
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

pub(crate) fn half(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

/// Kind and value of every attribute in a run of attributes.
pub(crate) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = half(bytes, 0)? as usize;
        let (kind, value) = (half(bytes, 2)? & !NESTED, bytes.get(4..length)?);
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The value of an attribute in a run of attributes.
pub(crate) fn find(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

pub(crate) fn text(bytes: Option<&[u8]>) -> String {
    let bytes = bytes.unwrap_or_default();
    String::from_utf8_lossy(bytes.strip_suffix(&[0]).unwrap_or(bytes)).into_owned()
}

fn parse(device: u32, direction: Direction, payload: &[u8]) -> Option<Filter> {
    // The kernel walks all of a block's filters; those of other devices or places are not asked
    // for.
    if word(payload, 4)? != device || word(payload, 12)? != direction.parent() {
        return None;
    }
    let handle = word(payload, 8)?;
    let attributes = payload.get(20..)?;
    // Handle 0 is the priority itself, listed before its filters.
    (handle != 0).then(|| Filter {
        priority: (word(payload, 16).unwrap_or_default() >> 16) as u16,
        handle,
        kind: text(find(attributes, TCA_KIND)),
        name: text(find(attributes, TCA_OPTIONS).and_then(|options| find(options, TCA_BPF_NAME))),
    })
}

/// The filters at one side of a device; none where it has no clsact.
///
/// # Errors
///
/// When the kernel refuses the listing.
pub fn filters(device: u32, direction: Direction) -> io::Result<Vec<Filter>> {
    let mut filters = Vec::new();
    let message = Message::new(RTM_GETTFILTER, F_DUMP, device, 0, direction.parent(), 0);
    let result = talk(message, |payload| filters.extend(parse(device, direction, payload)));
    match result {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::EINVAL | libc::ENOENT | libc::EOPNOTSUPP)
            ) =>
        {
            Ok(filters)
        }
        result => result.map(|()| filters),
    }
}

fn protocol_all(priority: u16) -> u32 {
    u32::from(priority) << 16 | u32::from(0x0003_u16.to_be())
}

/// Attaches a program, or replaces the one that an earlier agent attached.
///
/// # Errors
///
/// When the kernel refuses clsact or the filter.
pub fn attach(
    program: BorrowedFd<'_>,
    name: &str,
    device: u32,
    direction: Direction,
) -> io::Result<()> {
    let mut qdisc = Message::new(
        RTM_NEWQDISC,
        F_ACK | F_CREATE | F_EXCL,
        device,
        CLSACT_HANDLE,
        TC_H_CLSACT,
        0,
    );
    qdisc.attribute(TCA_KIND, b"clsact\0");
    match talk(qdisc, |_| ()) {
        Err(error) if error.raw_os_error() != Some(libc::EEXIST) => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let info = protocol_all(direction.priority());
    let mut filter =
        Message::new(RTM_NEWTFILTER, F_ACK | F_CREATE, device, HANDLE, direction.parent(), info);
    filter.attribute(TCA_KIND, b"bpf\0");
    let mut options = Message(Vec::new());
    options.attribute(TCA_BPF_FD, &program.as_raw_fd().to_ne_bytes());
    options.attribute(TCA_BPF_NAME, format!("{PREFIX}{name}\0").as_bytes());
    options.attribute(TCA_BPF_FLAGS, &DIRECT_ACTION.to_ne_bytes());
    filter.attribute(TCA_OPTIONS | NESTED, &options.0);
    talk(filter, |_| ())
}

/// Removes our filter from one side of a device; returns whether there was one.
///
/// # Errors
///
/// When the kernel refuses.
pub fn detach(device: u32, direction: Direction) -> io::Result<bool> {
    let ours: Vec<Filter> =
        filters(device, direction)?.into_iter().filter(Filter::is_ours).collect();
    for filter in &ours {
        let info = protocol_all(filter.priority);
        talk(
            Message::new(RTM_DELTFILTER, F_ACK, device, filter.handle, direction.parent(), info),
            |_| (),
        )?;
    }
    Ok(!ours.is_empty())
}

/// Removes our filters from a device, and clsact with them if it is empty then.
///
/// # Errors
///
/// When the kernel refuses.
pub fn clean(device: u32) -> io::Result<bool> {
    let found = detach(device, Direction::Ingress)? | detach(device, Direction::Egress)?;
    let empty = filters(device, Direction::Ingress)?.is_empty()
        && filters(device, Direction::Egress)?.is_empty();
    if found && empty {
        talk(Message::new(RTM_DELQDISC, F_ACK, device, CLSACT_HANDLE, TC_H_CLSACT, 0), |_| ())?;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listed_filter_is_recognised_as_ours() {
        let info = protocol_all(1);
        let mut message =
            Message::new(RTM_NEWTFILTER, 0, 7, HANDLE, Direction::Ingress.parent(), info);
        message.attribute(TCA_KIND, b"bpf\0");
        let mut options = Message(Vec::new());
        options.attribute(TCA_BPF_NAME, b"sluice_tc_ingress_l2\0");
        message.attribute(TCA_OPTIONS, &options.0);
        let bytes = message.finish();
        let filter = parse(7, Direction::Ingress, bytes.get(16..).unwrap_or_default());
        assert!(filter.as_ref().is_some_and(Filter::is_ours), "{filter:?}");
        assert_eq!(filter.map(|filter| filter.priority), Some(1));
        assert_eq!(parse(7, Direction::Egress, bytes.get(16..).unwrap_or_default()), None);
    }

    #[test]
    fn another_handle_is_not_ours() {
        let filter =
            Filter { priority: 1, handle: 1, kind: "bpf".to_owned(), name: "sluice_x".to_owned() };
        assert!(!filter.is_ours());
    }
}
