//! The nftables side: what a rule says ([`stmt`]) and the instructions that it takes ([`expr`]), the
//! table as data ([`table`]), its messages ([`message`]), what others do to it ([`event`]), what the
//! kernel says it holds ([`view`]), the table that serves as a lock ([`lock`]), and what others'
//! tables do to what passes ours ([`others`], [`marks`]).

pub mod event;
pub mod expr;
pub mod lock;
pub mod marks;
pub mod message;
pub mod others;
pub mod stmt;
pub mod table;
pub mod view;
