//! Values: text to what it means, or to what is wrong with it. Pure.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::model::{Config, Take};
use crate::net::{Family, Interface, Mark, Range};

/// Longest tproxy or gateway name.
const MAX_NAME: usize = 15;
/// Longest interface name (`IFNAMSIZ` - 1).
const MAX_INTERFACE: usize = 15;

/// The name of an interface that packets may come in by, or the beginning of such names.
pub(super) fn interface(value: &str) -> Result<Interface, String> {
    let wrong = |what: &str| Err(expects("interface", what, value));
    let (name, prefix) = match value.strip_suffix('*') {
        Some(name) => (name, true),
        None => (value, false),
    };
    let legal = |c: char| c.is_ascii_graphic() && !matches!(c, '/' | '"' | '\\' | '*');
    if value == "lo" {
        wrong("an interface that others are behind")
    } else if value == "*" {
        wrong("a name, or the beginning of one before the *")
    } else if prefix && name.len() == MAX_INTERFACE {
        // nft takes that for the name itself, and lists what does not load
        wrong("up to 14 characters before the *")
    } else if name.is_empty() || name.len() > MAX_INTERFACE || !name.chars().all(legal) {
        wrong("the name of an interface, up to 15 characters")
    } else {
        Ok(Interface { name: name.to_string(), prefix })
    }
}

pub(super) fn set_once<T: fmt::Display>(
    slot: &mut Option<T>,
    value: T,
    key: &str,
    family: &str,
) -> Result<(), String> {
    if let Some(first) = slot {
        return Err(format!("second {family} \"{key}\": \"{value}\" beside \"{first}\""));
    }
    *slot = Some(value);
    Ok(())
}

pub(super) fn expects(key: &str, what: &str, value: &str) -> String {
    format!("\"{key}\" expects {what}, not \"{value}\"")
}

pub(super) fn check_name(kind: &str, name: &str) -> Result<(), String> {
    let legal = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    let first = name.starts_with(|c: char| c.is_ascii_alphabetic());
    match name.len() <= MAX_NAME && first && name.chars().all(legal) {
        true => Ok(()),
        false => Err(format!(
            "bad {kind} name \"{name}\": a letter, then up to 14 letters, digits, \"_\" or \"-\""
        )),
    }
}

/// A decimal number, or a hexadecimal one behind `0x`.
pub(super) fn parse_number(value: &str) -> Option<u64> {
    let (digits, radix) = match value.strip_prefix("0x").or_else(|| value.strip_prefix("0X")) {
        Some(hex) => (hex, 16),
        None => (value, 10),
    };
    // from_str_radix would take a sign
    let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_hexdigit());
    plain.then(|| u64::from_str_radix(digits, radix).ok()).flatten()
}

pub(super) fn number(key: &str, value: &str, least: u32, most: u32) -> Result<u32, String> {
    match parse_number(value) {
        Some(n) if (u64::from(least)..=u64::from(most)).contains(&n) => Ok(n as u32),
        _ => {
            let range = match most {
                0xffff_fffe.. => format!("a number from {least} to {most:#x}"),
                _ => format!("a number from {least} to {most}"),
            };
            Err(expects(key, &range, value))
        }
    }
}

pub(super) fn boolean(key: &str, value: &str) -> Result<bool, String> {
    match value {
        "yes" | "true" | "on" | "1" => Ok(true),
        "no" | "false" | "off" | "0" => Ok(false),
        _ => Err(expects(key, "yes or no", value)),
    }
}

pub(super) fn take(key: &str, value: &str) -> Result<Take, String> {
    match value {
        "drop" => Ok(Take::Drop),
        _ => match boolean(key, value) {
            Ok(true) => Ok(Take::Yes),
            Ok(false) => Ok(Take::No),
            Err(_) => Err(expects(key, "yes, no or drop", value)),
        },
    }
}

pub(super) fn route_table(value: &str) -> Result<u32, String> {
    match number("route-table", value, 1, u32::MAX)? {
        table @ 253..=255 => {
            Err(format!("\"route-table\" cannot be {table}: it is the default, main or local one"))
        }
        table => Ok(table),
    }
}

pub(super) fn bypass(config: &mut Config, value: &str) -> Result<(), String> {
    if value == "private" {
        for (a, n) in [([10, 0, 0, 0], 8), ([172, 16, 0, 0], 12), ([192, 168, 0, 0], 16)] {
            config.bypass4.push(Range::prefix(Ipv4Addr::from(a), n));
        }
        config.bypass4.push(Range::prefix(Ipv4Addr::new(100, 64, 0, 0), 10));
        config.bypass6.push(Range::prefix(Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 0), 7));
        return Ok(());
    }
    match cidr("bypass", "an address, a CIDR or \"private\"", value)? {
        Cidr::V4(range) => config.bypass4.push(range),
        Cidr::V6(range) => config.bypass6.push(range),
    }
    Ok(())
}

pub(super) enum Cidr {
    V4(Range<Ipv4Addr>),
    V6(Range<Ipv6Addr>),
}

/// `ADDRESS` or `ADDRESS/LENGTH`; `what` says so to users.
pub(super) fn cidr(key: &str, what: &str, value: &str) -> Result<Cidr, String> {
    let wrong = || expects(key, what, value);
    let (address, length) = match value.split_once('/') {
        Some((address, length)) => (address, Some(length)),
        None => (value, None),
    };
    let address: IpAddr = address.trim().parse().map_err(|_| wrong())?;
    let bits = match Family::of(&address) {
        Family::V4 => 32,
        Family::V6 => 128,
    };
    let length = match length.map(str::trim) {
        None => bits,
        Some(text) if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) => {
            text.parse().ok().filter(|n| *n <= bits).ok_or_else(|| {
                format!("\"{key}\": prefix length {text} is not from 0 to {bits}: \"{value}\"")
            })?
        }
        Some(_) => return Err(wrong()),
    };
    Ok(match address {
        IpAddr::V4(a) => Cidr::V4(Range::prefix(a, length)),
        IpAddr::V6(a) => Cidr::V6(Range::prefix(a, length)),
    })
}

pub(super) fn bypass_mark(value: &str) -> Result<Mark, String> {
    let wrong = || expects("bypass-mark", "VALUE or VALUE/MASK, 32 bits each", value);
    let bits = |text: &str| {
        parse_number(text.trim()).and_then(|n| u32::try_from(n).ok()).ok_or_else(wrong)
    };
    let mark = match value.split_once('/') {
        Some((value, mask)) => Mark { value: bits(value)?, mask: bits(mask)? },
        None => Mark { value: bits(value)?, mask: u32::MAX },
    };
    match mark {
        Mark { value: 0, .. } => {
            Err("\"bypass-mark\" 0 would match every packet without a mark".into())
        }
        Mark { mask: 0, .. } => Err("\"bypass-mark\" with mask 0 would match every packet".into()),
        mark if mark.value & !mark.mask != 0 => Err(format!(
            "\"bypass-mark\" {:#x} has bits outside its mask {:#x}",
            mark.value, mark.mask
        )),
        mark => Ok(mark),
    }
}

/// `ADDRESS`, `ADDRESS:PORT`, `[ADDRESS]:PORT`; port 53 if left out.
pub(super) fn endpoint(value: &str) -> Option<SocketAddr> {
    let bare = value.strip_prefix('[').and_then(|v| v.strip_suffix(']')).unwrap_or(value);
    let address = match bare.parse::<IpAddr>() {
        Ok(ip) => SocketAddr::new(ip, 53),
        Err(_) => value.parse::<SocketAddr>().ok()?,
    };
    let plain = !matches!(address, SocketAddr::V6(a) if a.scope_id() != 0);
    (address.port() != 0 && !address.ip().is_unspecified() && plain).then_some(address)
}
