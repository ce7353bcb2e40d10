//! Batches of changes to nf_tables.

use std::io;
use std::os::fd::AsRawFd;

use super::attribute::{
    LIST_ELEMENT, chain, ct, expression, hook, message, rule, table as named_table,
};
use super::{Chain, Jump, SUBSYSTEM, Table};
use crate::node::netlink::{
    self, Attributes, NETLINK_NETFILTER, NLM_F_CREATE, PIECE, Socket, connect, receive,
};

/// `NFNL_MSG_BATCH_*`.
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
/// The room for a batch that is sent to the kernel, bytes. A chain takes about 60, and a large
/// cluster has some 100 000.
const SEND_BUFFER: libc::c_int = 64 << 20;

/// Changes that the kernel makes atomically.
#[derive(Default)]
pub(crate) struct Batch(Vec<u8>);

impl Batch {
    fn change(&mut self, kind: u16, flags: u16, table: &Table, attributes: &Attributes) {
        let kind = SUBSYSTEM << 8 | kind;
        self.0.extend(netlink::message(kind, flags, &table.family.header(), attributes));
    }

    /// Makes a table, if it does not exist.
    pub(crate) fn make_table(&mut self, table: &Table) {
        let name = Attributes::default().text(named_table::NAME, &table.name);
        self.change(message::NEW_TABLE, NLM_F_CREATE, table, &name);
    }

    pub(crate) fn delete_table(&mut self, table: &Table) {
        let name = Attributes::default().text(named_table::NAME, &table.name);
        self.change(message::DELETE_TABLE, 0, table, &name);
    }

    /// Makes an empty chain of type nat at a hook, if it does not exist.
    pub(crate) fn make_nat_chain(&mut self, table: &Table, name: &str, hook: u32, priority: i32) {
        let at = Attributes::default()
            .with(hook::NUMBER, &hook.to_be_bytes())
            .with(hook::PRIORITY, &priority.to_be_bytes());
        let made = Attributes::default()
            .text(chain::TABLE, &table.name)
            .text(chain::NAME, name)
            .nest(chain::HOOK, &at)
            .text(chain::TYPE, "nat");
        self.change(message::NEW_CHAIN, NLM_F_CREATE, table, &made);
    }

    /// Adds a rule that loads a packet's connection and does nothing with it.
    pub(crate) fn ask_for_connection(&mut self, table: &Table, chain: &str) {
        const STATE: u32 = 0;
        const REGISTER: u32 = 1;
        let asked = Attributes::default()
            .with(ct::REGISTER, &REGISTER.to_be_bytes())
            .with(ct::KEY, &STATE.to_be_bytes());
        let one = Attributes::default().text(expression::NAME, "ct").nest(expression::DATA, &asked);
        let made = Attributes::default()
            .text(rule::TABLE, &table.name)
            .text(rule::CHAIN, chain)
            .nest(rule::EXPRESSIONS, &Attributes::default().nest(LIST_ELEMENT, &one));
        self.change(message::NEW_RULE, NLM_F_CREATE, table, &made);
    }

    /// Removes every rule of a chain.
    pub(crate) fn flush(&mut self, chain: &Chain) {
        let rules = Attributes::default()
            .text(rule::TABLE, &chain.table.name)
            .text(rule::CHAIN, &chain.name);
        self.change(message::DELETE_RULE, 0, &chain.table, &rules);
    }

    pub(crate) fn delete_rule(&mut self, jump: &Jump) {
        let one = Attributes::default()
            .text(rule::TABLE, &jump.table.name)
            .text(rule::CHAIN, &jump.chain)
            .with(rule::HANDLE, &jump.handle.to_be_bytes());
        self.change(message::DELETE_RULE, 0, &jump.table, &one);
    }

    /// Removes a chain that has no rules and that no rule jumps to.
    pub(crate) fn delete_chain(&mut self, chain: &Chain) {
        let name = Attributes::default()
            .text(chain::TABLE, &chain.table.name)
            .text(chain::NAME, &chain.name);
        self.change(message::DELETE_CHAIN, 0, &chain.table, &name);
    }

    /// Carries the changes out.
    pub(crate) fn commit(self) -> io::Result<()> {
        // `res_id` is the subsystem of netfilter.
        let header = [0, 0, 0, SUBSYSTEM as u8];
        let bound = |kind| netlink::message(kind, 0, &header, &Attributes::default());
        let whole = [bound(BATCH_BEGIN), self.0, bound(BATCH_END)].concat();
        let socket = connect(NETLINK_NETFILTER)?;
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
        let _ = socket.send(&whole, 0)?;
        refusal(&socket).map_or(Ok(()), Err)
    }
}

/// Returns the first error that waits in a socket. The kernel has processed the whole batch when
/// send() returns.
fn refusal(socket: &Socket) -> Option<io::Error> {
    let mut datagram = Vec::with_capacity(PIECE);
    loop {
        match receive(socket, &mut datagram, libc::MSG_DONTWAIT) {
            Ok(()) => {}
            Err(error) => return (error.kind() != io::ErrorKind::WouldBlock).then_some(error),
        }
        if let Some(Err(error)) = netlink::read(&datagram, |_| ()) {
            return Some(error);
        }
    }
}
