//! nf_tables by netlink: listings, and batches that the kernel takes whole or not at all. The
//! node's image has no `nft`.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::node::dataplane::clsact::{F_DUMP, Message, attributes, find, half, talk_to, text};

/// `NFNL_SUBSYS_NFTABLES`.
const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const F_CREATE: u16 = 0x400;
const NLMSG_ERROR: u16 = 2;
const NESTED: u16 = 0x8000;
/// `NFTA_LIST_ELEM`.
const ELEMENT: u16 = 1;
/// Room for a batch on its way to the kernel, bytes: a chain is about 60, and a large cluster has
/// some 100 000.
const SEND_BUFFER: libc::c_int = 64 << 20;

/// `NFPROTO_*`: which packets a table is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Family {
    Inet,
    Ip,
    Ip6,
}

impl Family {
    fn number(self) -> u8 {
        match self {
            Self::Inet => 1,
            Self::Ip => 2,
            Self::Ip6 => 10,
        }
    }

    /// As `nft` and people say it.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Inet => "inet",
            Self::Ip => "ip",
            Self::Ip6 => "ip6",
        }
    }

    fn of(number: u8) -> Option<Self> {
        [Self::Inet, Self::Ip, Self::Ip6].into_iter().find(|family| family.number() == number)
    }

    /// `struct nfgenmsg`.
    fn header(self) -> [u8; 4] {
        [self.number(), 0, 0, 0]
    }
}

/// A table's name, with its family.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Table {
    pub(crate) family: Family,
    pub(crate) name: String,
}

/// A chain of a table.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Chain {
    pub(crate) table: Table,
    pub(crate) name: String,
    /// Whether a hook leads there.
    pub(crate) is_base: bool,
}

/// A rule that leads to another chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Jump {
    pub(crate) table: Table,
    pub(crate) chain: String,
    pub(crate) handle: u64,
    pub(crate) to: String,
}

/// An element of a set of addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Element {
    pub(crate) key: Vec<u8>,
    /// Milliseconds until it goes; [`None`]: it stays.
    pub(crate) expires_ms: Option<u64>,
}

/// Asks for a listing. A kernel without nf_tables has nothing to list.
pub(crate) fn dump(
    kind: u16,
    header: [u8; 4],
    names: &[(u16, &str)],
    mut each: impl FnMut(u8, &[u8]),
) -> io::Result<()> {
    let mut message = Message::plain(SUBSYSTEM << 8 | kind, F_DUMP, &header);
    for (attribute, name) in names {
        message.attribute(*attribute, &zero_ended(name));
    }
    let listed = talk_to(libc::NETLINK_NETFILTER, message, |payload| {
        if let (Some(family), Some(rest)) = (payload.first(), payload.get(4..)) {
            each(*family, rest);
        }
    });
    match listed {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::EINVAL | libc::EOPNOTSUPP | libc::EPROTONOSUPPORT | libc::ENOENT)
            ) =>
        {
            Ok(())
        }
        result => result,
    }
}

/// Every table of the network namespace.
pub(crate) fn tables() -> io::Result<Vec<Table>> {
    let mut tables = Vec::new();
    dump(1, [0; 4], &[], |family, attributes| {
        if let Some(family) = Family::of(family) {
            tables.push(Table { family, name: text(find(attributes, 1)) });
        }
    })?;
    Ok(tables)
}

/// Every chain of the network namespace.
pub(crate) fn chains() -> io::Result<Vec<Chain>> {
    let mut chains = Vec::new();
    dump(4, [0; 4], &[], |family, attributes| {
        if let Some(family) = Family::of(family) {
            let table = Table { family, name: text(find(attributes, 1)) };
            let (name, is_base) = (text(find(attributes, 3)), find(attributes, 4).is_some());
            chains.push(Chain { table, name, is_base });
        }
    })?;
    Ok(chains)
}

/// The rules of a table that lead to another chain.
pub(crate) fn jumps(table: &Table) -> io::Result<Vec<Jump>> {
    let mut jumps = Vec::new();
    dump(7, table.family.header(), &[(1, &table.name)], |_, rule| {
        let handle =
            find(rule, 3).and_then(|handle| handle.try_into().ok()).map(u64::from_be_bytes);
        // Not every kernel leaves out the rules of other tables.
        if text(find(rule, 1)) != table.name {
            return;
        }
        let (Some(handle), Some(expressions)) = (handle, find(rule, 4)) else { return };
        // A verdict in the data of an "immediate".
        let to = attributes(expressions).find_map(|(_, expression)| {
            let verdict = find(find(find(expression, 2)?, 2)?, 2)?;
            (text(find(expression, 1)) == "immediate").then(|| find(verdict, 2)).flatten()
        });
        if let Some(to) = to {
            let chain = text(find(rule, 2));
            jumps.push(Jump { table: table.clone(), chain, handle, to: text(Some(to)) });
        }
    })?;
    Ok(jumps)
}

/// The names of the sets of a table.
pub(crate) fn sets(table: &Table) -> io::Result<Vec<String>> {
    let mut sets = Vec::new();
    dump(10, table.family.header(), &[(1, &table.name)], |_, set| {
        if text(find(set, 1)) == table.name {
            sets.push(text(find(set, 2)));
        }
    })?;
    Ok(sets)
}

/// The elements of a set.
pub(crate) fn elements(table: &Table, set: &str) -> io::Result<Vec<Element>> {
    let mut elements = Vec::new();
    dump(13, table.family.header(), &[(1, &table.name), (2, set)], |_, list| {
        let Some(all) = find(list, 3) else { return };
        for (_, element) in attributes(all) {
            let expires_ms =
                find(element, 5).and_then(|left| left.try_into().ok()).map(u64::from_be_bytes);
            if let Some(key) = find(element, 1).and_then(|key| find(key, 1)) {
                elements.push(Element { key: key.to_vec(), expires_ms });
            }
        }
    })?;
    Ok(elements)
}

fn zero_ended(name: &str) -> Vec<u8> {
    name.bytes().chain([0]).collect()
}

/// Attributes, to be nested in others.
#[derive(Default)]
struct Nest(Vec<u8>);

impl Nest {
    fn with(mut self, kind: u16, value: &[u8]) -> Self {
        self.0.extend((value.len() as u16 + 4).to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    fn nest(self, kind: u16, inside: &Self) -> Self {
        self.with(kind | NESTED, &inside.0)
    }

    fn name(self, kind: u16, name: &str) -> Self {
        self.with(kind, &zero_ended(name))
    }
}

/// Changes that the kernel makes all at once, or none of them.
#[derive(Default)]
pub(crate) struct Batch(Vec<u8>);

impl Batch {
    fn add(&mut self, kind: u16, flags: u16, header: [u8; 4], attributes: &Nest) {
        let fixed = [&header[..], &attributes.0].concat();
        self.0.extend(Message::plain(kind, flags, &fixed).finish());
    }

    fn change(&mut self, kind: u16, flags: u16, table: &Table, attributes: &Nest) {
        self.add(SUBSYSTEM << 8 | kind, flags, table.family.header(), attributes);
    }

    /// Makes a table where it is not.
    pub(crate) fn make_table(&mut self, table: &Table) {
        self.change(0, F_CREATE, table, &Nest::default().name(1, &table.name));
    }

    pub(crate) fn delete_table(&mut self, table: &Table) {
        self.change(2, 0, table, &Nest::default().name(1, &table.name));
    }

    /// Makes an empty chain of type nat at a hook, where it is not.
    pub(crate) fn make_nat_chain(&mut self, table: &Table, name: &str, hook: u32, priority: i32) {
        let at = Nest::default().with(1, &hook.to_be_bytes()).with(2, &priority.to_be_bytes());
        let chain = Nest::default().name(1, &table.name).name(3, name).nest(4, &at).name(7, "nat");
        self.change(3, F_CREATE, table, &chain);
    }

    /// Adds a rule that asks for a packet's connection and does nothing with it.
    pub(crate) fn ask_for_connection(&mut self, table: &Table, chain: &str) {
        const STATE: u32 = 0;
        const REGISTER: u32 = 1;
        let ct = Nest::default().with(1, &REGISTER.to_be_bytes()).with(2, &STATE.to_be_bytes());
        let expression = Nest::default().name(1, "ct").nest(2, &ct);
        let rule = Nest::default().name(1, &table.name).name(2, chain);
        let rule = rule.nest(4, &Nest::default().nest(ELEMENT, &expression));
        self.change(6, F_CREATE, table, &rule);
    }

    /// Removes every rule of a chain.
    pub(crate) fn flush(&mut self, chain: &Chain) {
        let rules = Nest::default().name(1, &chain.table.name).name(2, &chain.name);
        self.change(8, 0, &chain.table, &rules);
    }

    pub(crate) fn delete_rule(&mut self, jump: &Jump) {
        let rule = Nest::default().name(1, &jump.table.name).name(2, &jump.chain);
        self.change(8, 0, &jump.table, &rule.with(3, &jump.handle.to_be_bytes()));
    }

    /// Removes a chain that has no rules and that none leads to.
    pub(crate) fn delete_chain(&mut self, chain: &Chain) {
        let name = Nest::default().name(1, &chain.table.name).name(3, &chain.name);
        self.change(5, 0, &chain.table, &name);
    }

    /// Carries the changes out.
    pub(crate) fn commit(self) -> io::Result<()> {
        // `res_id` names the part of netfilter.
        let header = [0, 0, 0, SUBSYSTEM as u8];
        let mut whole = Self::default();
        whole.add(BATCH_BEGIN, 0, header, &Nest::default());
        whole.0.extend(self.0);
        whole.add(BATCH_END, 0, header, &Nest::default());
        // SAFETY: no pointers.
        let fd = unsafe {
            libc::socket(
                libc::AF_NETLINK,
                libc::SOCK_RAW | libc::SOCK_CLOEXEC,
                libc::NETLINK_NETFILTER,
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is fresh and ours.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        let room = SEND_BUFFER;
        // SAFETY: the value is live and of the size given. A refusal shows itself when a large
        // batch is sent.
        let _ = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_SNDBUFFORCE,
                (&raw const room).cast(),
                size_of::<libc::c_int>() as libc::socklen_t,
            )
        };
        // SAFETY: the buffer is live; an unconnected netlink socket sends to the kernel.
        let sent =
            unsafe { libc::send(socket.as_raw_fd(), whole.0.as_ptr().cast(), whole.0.len(), 0) };
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
        refusal(&socket).map_or(Ok(()), Err)
    }
}

/// The first refusal that waits in a socket. The kernel has dealt with the whole batch when send()
/// returns.
fn refusal(socket: &OwnedFd) -> Option<io::Error> {
    let mut buffer = vec![0_u8; 64 * 1024];
    loop {
        let (at, room) = (buffer.as_mut_ptr().cast(), buffer.len());
        // SAFETY: the buffer is live and of the length given.
        let got = unsafe { libc::recv(socket.as_raw_fd(), at, room, libc::MSG_DONTWAIT) };
        if got < 0 {
            let error = io::Error::last_os_error();
            return (error.kind() != io::ErrorKind::WouldBlock).then_some(error);
        }
        let mut rest = buffer.get(..got.cast_unsigned()).unwrap_or_default();
        while let Some(length) =
            rest.get(..4).and_then(|word| word.try_into().ok()).map(u32::from_ne_bytes)
        {
            let code = rest
                .get(16..20)
                .and_then(|word| word.try_into().ok())
                .map_or(0, i32::from_ne_bytes);
            if half(rest, 4) == Some(NLMSG_ERROR) && code != 0 {
                return Some(io::Error::from_raw_os_error(code.saturating_neg()));
            }
            rest = rest.get((length as usize).max(16).next_multiple_of(4)..).unwrap_or_default();
        }
    }
}
