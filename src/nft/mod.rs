//! The nftables side: what a rule does ([`expr`]), the table as data ([`ruleset`]), its messages
//! ([`encode`]), and what others do to it ([`event`]).

pub mod encode;
pub mod event;
pub mod expr;
pub mod ruleset;
