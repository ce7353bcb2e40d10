//! The reasons why packets and calls are treated as they are.

/// Declares the reasons: number, word and sentence in one place.
macro_rules! reasons {
    ($($(#[doc = $doc:literal])* $name:ident = $number:literal, $word:literal;)*) => {
        /// The reason why a packet that was not simply passed was treated as it was: a counter's
        /// index, a metric's label and a word of the CLI.
        ///
        /// Each packet is counted once. Numbers are part of the ABI: new ones are added, old ones
        /// are never reused.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u32)]
        pub enum Reason { $($(#[doc = $doc])* $name = $number,)* }

        impl Reason {
            /// All reasons, in order of their numbers.
            pub const ALL: &'static [Reason] = &[$(Reason::$name,)*];

            /// Returns the word for metrics and the CLI.
            pub const fn as_str(self) -> &'static str {
                match self { $(Reason::$name => $word,)* }
            }

            /// Returns one sentence for people.
            pub const fn sentence(self) -> &'static str {
                match self { $(Reason::$name => concat!($($doc),*),)* }
            }

            /// Returns the reason with a number that was found in a map.
            pub const fn from_number(number: u32) -> Option<Self> {
                match number { $($number => Some(Reason::$name),)* _ => None }
            }
        }
    };
}

reasons! {
    /// Not for any service: passed untouched, not counted.
    Stranger = 0, "stranger";
    /// Client to backend, along a known flow or a new one (counted per backend).
    Forward = 1, "forward";
    /// Backend to client (counted per backend).
    Reply = 2, "reply";
    /// A flow was made again in the middle of a connection: its entry had been lost.
    Recovered = 3, "recovered";
    /// A client's reset showed that the reply's entry was lost: the reset was dropped, the entry
    /// made again.
    ReplyRecovered = 4, "reply_recovered";
    /// An ICMP error about a translated packet was translated.
    IcmpError = 5, "icmp_error";
    /// A direct connection's source port was changed, because its tuple equalled a live translated
    /// one.
    DirectRemapped = 6, "direct_remapped";
    /// The service has no backends: answered with a TCP reset.
    NoBackendReset = 7, "no_backend_reset";
    /// The service has no backends: answered with ICMP port unreachable.
    NoBackendUnreachable = 8, "no_backend_unreachable";
    /// The service has no backends: dropped, since the packet may not be answered.
    NoBackendDropped = 9, "no_backend_dropped";
    /// An answer to the client was due but its rate is limited: dropped.
    RejectLimited = 10, "reject_limited";
    /// A fragment for a service whose datagram cannot be translated, or whose first fragment was
    /// not seen: passed untouched.
    Fragment = 11, "fragment";
    /// The packet for a service ends before its transport header: passed untouched.
    Truncated = 12, "truncated";
    /// A length or offset in a packet for a service contradicts the packet: passed untouched.
    Malformed = 13, "malformed";
    /// No source port was free for a flow that had to be remapped or masqueraded: the client is
    /// refused.
    PortsExhausted = 14, "ports_exhausted";
    /// Another flow took the tuple between lookup and record: dropped, the client tries again.
    ClashRace = 15, "clash_race";
    /// The flow could not be recorded: dropped.
    FlowsFull = 16, "flows_full";
    /// The packet's TTL or hop limit ran out where it bypasses the stack: dropped.
    TtlExceeded = 17, "ttl_exceeded";
    /// A bypass had no route or neighbour to the backend: dropped.
    NoRoute = 18, "no_route";
    /// The packet exceeded the MTU of a bypass: answered with packet too big, or dropped where that
    /// may not be sent.
    TooBig = 19, "too_big";
    /// A rewrite failed half way: dropped.
    RewriteFailed = 20, "rewrite_failed";
    /// A TCP connect was translated at the socket (per call).
    SocketConnect = 21, "socket_connect";
    /// A UDP send was translated at the socket (per call).
    SocketSend = 22, "socket_send";
    /// A TCP connect to a service without backends was refused at the socket (per call).
    SocketRefused = 23, "socket_refused";
    /// The client is not in the service's source ranges: dropped.
    SourceRange = 24, "source_range";
    /// The traffic policy asks for a backend on this node, and there is none: dropped.
    NoLocalBackend = 25, "no_local_backend";
    /// The packet is for a port of a ClusterIP that its service does not define: answered with a
    /// TCP reset or ICMP port unreachable.
    UndefinedPort = 26, "undefined_port";
    /// The packet was leaving this node for an address of the cluster's Service ranges that no
    /// Service has: dropped.
    UnassignedAddress = 27, "unassigned_address";
    /// A fragment came before its datagram's first one: held by the agent, counted again when it
    /// goes on.
    FragmentHeld = 28, "fragment_held";
    /// The packet belongs to a connection that netfilter has translated since before a takeover:
    /// passed untouched.
    NetfilterFlow = 29, "netfilter_flow";
    /// A takeover or release leaves packets without a known flow to netfilter: passed untouched.
    NotTaken = 30, "not_taken";
}
