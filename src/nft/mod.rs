//! The nftables side: what a rule does ([`expr`]), the table as data ([`ruleset`]), its messages
//! ([`encode`]).

pub mod encode;
pub mod expr;
pub mod ruleset;
