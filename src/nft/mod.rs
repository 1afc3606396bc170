//! The nftables side: what a rule does ([`expr`]), the table as data ([`ruleset`]), its messages
//! ([`encode`]), what others do to it ([`event`]), and what the kernel says it holds ([`dump`]).

pub mod dump;
pub mod encode;
pub mod event;
pub mod expr;
pub mod ruleset;
