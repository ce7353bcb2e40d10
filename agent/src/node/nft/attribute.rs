//! The names of nf_tables' messages and attributes, after `linux/netfilter/nf_tables.h`.

/// `NFT_MSG_*`.
pub(crate) mod message {
    pub(crate) const NEW_TABLE: u16 = 0;
    pub(crate) const GET_TABLE: u16 = 1;
    pub(crate) const DELETE_TABLE: u16 = 2;
    pub(crate) const NEW_CHAIN: u16 = 3;
    pub(crate) const GET_CHAIN: u16 = 4;
    pub(crate) const DELETE_CHAIN: u16 = 5;
    pub(crate) const NEW_RULE: u16 = 6;
    pub(crate) const GET_RULE: u16 = 7;
    pub(crate) const DELETE_RULE: u16 = 8;
    pub(crate) const GET_SET: u16 = 10;
    pub(crate) const GET_ELEMENTS: u16 = 13;
}

/// `NFTA_LIST_ELEM`.
pub(crate) const LIST_ELEMENT: u16 = 1;

/// `NFTA_TABLE_*`.
pub(crate) mod table {
    pub(crate) const NAME: u16 = 1;
}

/// `NFTA_CHAIN_*`.
pub(crate) mod chain {
    pub(crate) const TABLE: u16 = 1;
    pub(crate) const NAME: u16 = 3;
    pub(crate) const HOOK: u16 = 4;
    pub(crate) const POLICY: u16 = 5;
    pub(crate) const TYPE: u16 = 7;
}

/// `NFTA_HOOK_*`.
pub(crate) mod hook {
    pub(crate) const NUMBER: u16 = 1;
    pub(crate) const PRIORITY: u16 = 2;
}

/// `NFTA_RULE_*`.
pub(crate) mod rule {
    pub(crate) const TABLE: u16 = 1;
    pub(crate) const CHAIN: u16 = 2;
    pub(crate) const HANDLE: u16 = 3;
    pub(crate) const EXPRESSIONS: u16 = 4;
}

/// `NFTA_EXPR_*`.
pub(crate) mod expression {
    pub(crate) const NAME: u16 = 1;
    pub(crate) const DATA: u16 = 2;
}

/// `NFTA_DATA_*`.
pub(crate) mod data {
    pub(crate) const VALUE: u16 = 1;
    pub(crate) const VERDICT: u16 = 2;
}

/// `NFTA_VERDICT_*`.
pub(crate) mod verdict {
    pub(crate) const CODE: u16 = 1;
    pub(crate) const CHAIN: u16 = 2;
}

/// `NFTA_SET_*`.
pub(crate) mod set {
    pub(crate) const TABLE: u16 = 1;
    pub(crate) const NAME: u16 = 2;
}

/// `NFTA_SET_ELEM_LIST_*`.
pub(crate) mod elements {
    pub(crate) const TABLE: u16 = 1;
    pub(crate) const SET: u16 = 2;
    pub(crate) const ELEMENTS: u16 = 3;
}

/// `NFTA_SET_ELEM_*`.
pub(crate) mod element {
    pub(crate) const KEY: u16 = 1;
    pub(crate) const EXPIRATION: u16 = 5;
}

/// `NFTA_PAYLOAD_*`.
pub(crate) mod payload {
    pub(crate) const REGISTER: u16 = 1;
    pub(crate) const BASE: u16 = 2;
    pub(crate) const OFFSET: u16 = 3;
    pub(crate) const LENGTH: u16 = 4;
}

/// `NFTA_CT_*`.
pub(crate) mod ct {
    pub(crate) const REGISTER: u16 = 1;
    pub(crate) const KEY: u16 = 2;
    pub(crate) const DIRECTION: u16 = 3;
}

/// `NFTA_BITWISE_*`.
pub(crate) mod bitwise {
    pub(crate) const SOURCE: u16 = 1;
    pub(crate) const REGISTER: u16 = 2;
    pub(crate) const MASK: u16 = 4;
}

/// `NFTA_CMP_*`.
pub(crate) mod cmp {
    pub(crate) const SOURCE: u16 = 1;
    pub(crate) const OPERATION: u16 = 2;
    pub(crate) const VALUE: u16 = 3;
    /// `NFT_CMP_*`.
    pub(crate) const EQUAL: u32 = 0;
    pub(crate) const AT_MOST: u32 = 3;
    pub(crate) const AT_LEAST: u32 = 5;
}

/// `NFTA_RANGE_*`.
pub(crate) mod range {
    pub(crate) const SOURCE: u16 = 1;
    pub(crate) const OPERATION: u16 = 2;
    pub(crate) const FROM: u16 = 3;
    pub(crate) const TO: u16 = 4;
    /// `NFT_RANGE_EQ`.
    pub(crate) const WITHIN: u32 = 0;
}

/// `NFTA_LOOKUP_*`.
pub(crate) mod lookup {
    pub(crate) const SET: u16 = 1;
    pub(crate) const SOURCE: u16 = 2;
    pub(crate) const FLAGS: u16 = 5;
    /// `NFT_LOOKUP_F_INV`.
    pub(crate) const INVERTED: u32 = 1;
}

/// `NFTA_MATCH_*` and `NFTA_TARGET_*`: iptables' matches and targets.
pub(crate) mod extension {
    pub(crate) const NAME: u16 = 1;
    pub(crate) const INFO: u16 = 3;
}

/// `NFTA_IMMEDIATE_*`.
pub(crate) mod immediate {
    pub(crate) const DATA: u16 = 2;
}

/// The register that an expression loads is its first attribute, unless a module above says
/// otherwise.
pub(crate) const REGISTER: u16 = 1;
