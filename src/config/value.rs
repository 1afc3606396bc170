//! Values: the text of an entry to what it means, or to what is wrong with it. Pure.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::rc::Rc;
use std::str::FromStr;

use super::model::{Place, Problem, Source, Take};
use crate::net::{Family, Interface, Mark, Range, Ranges};

/// Errors: what is wrong with an entry.
pub type Result<T> = std::result::Result<T, String>;

/// Longest interface name (`IFNAMSIZ` - 1).
const MAX_INTERFACE: usize = 15;
/// Most addresses of a list.
const MOST_LISTED: usize = 100_000;
/// Of how many lines of a list it is said what is wrong.
const MOST_WRONG: usize = 10;
/// What the word `private` stands for.
const PRIVATE: [&str; 5] =
    ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7"];

/// What a key takes; prints as messages say it.
#[derive(Debug, Clone, Copy)]
pub enum Takes {
    /// From the one to the other.
    Number(u32, u32),
    Words(&'static [&'static str]),
    /// What is neither, in the words of a message.
    Text(&'static str),
}

impl fmt::Display for Takes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Takes::Number(least, most @ 0xffff_fffe..) => {
                write!(f, "a number from {least} to {most:#x}")
            }
            Takes::Number(least, most) => write!(f, "a number from {least} to {most}"),
            Takes::Words([words @ .., last]) => write!(f, "{} or {last}", words.join(", ")),
            Takes::Words([]) => Ok(()),
            Takes::Text(text) => f.write_str(text),
        }
    }
}

/// A key and the value that it is to have.
pub struct Setting<'a> {
    pub key: &'static str,
    pub takes: Takes,
    pub value: &'a str,
    pub place: &'a Place,
    pub source: &'a dyn Source,
}

impl Setting<'_> {
    fn wrong(&self) -> String {
        self.expects(self.takes)
    }

    fn expects(&self, what: impl fmt::Display) -> String {
        format!("\"{}\" expects {what}, not \"{}\"", self.key, self.value)
    }
}

/// A decimal number, or a hexadecimal one behind `0x`.
fn parse_number(value: &str) -> Option<u64> {
    let (digits, radix) = match value.strip_prefix("0x").or_else(|| value.strip_prefix("0X")) {
        Some(hex) => (hex, 16),
        None => (value, 10),
    };
    // from_str_radix would take a sign
    let plain = digits.bytes().all(|b| b.is_ascii_hexdigit());
    plain.then(|| u64::from_str_radix(digits, radix).ok()).flatten()
}

/// A number within the bounds of its key.
pub fn number(e: &Setting) -> Result<u32> {
    match (e.takes, parse_number(e.value)) {
        (Takes::Number(least, most), Some(n)) if (least.into()..=most.into()).contains(&n) => {
            Ok(n as u32)
        }
        _ => Err(e.wrong()),
    }
}

/// One of the words of its key, each of which has a meaning.
pub fn word<T: Copy>(e: &Setting, meanings: &[T]) -> Result<T> {
    let Takes::Words(words) = e.takes else { return Err(e.wrong()) };
    let at = words.iter().position(|word| *word == e.value);
    at.and_then(|at| meanings.get(at).copied()).ok_or_else(|| e.wrong())
}

fn parse_boolean(value: &str) -> Option<bool> {
    match value {
        "yes" | "true" | "on" | "1" => Some(true),
        "no" | "false" | "off" | "0" => Some(false),
        _ => None,
    }
}

pub fn boolean(e: &Setting) -> Result<bool> {
    parse_boolean(e.value).ok_or_else(|| e.wrong())
}

pub fn take(e: &Setting) -> Result<Take> {
    match (e.value, parse_boolean(e.value)) {
        ("drop", _) => Ok(Take::Drop),
        ("reject", _) => Ok(Take::Reject),
        (_, Some(true)) => Ok(Take::Yes),
        (_, Some(false)) => Ok(Take::No),
        _ => Err(e.wrong()),
    }
}

/// Adds ports and ranges of them, with blanks or commas between.
pub fn ports(e: &Setting, list: &mut Vec<Range<u16>>) -> Result<()> {
    let port = |text: &str| match parse_number(text) {
        Some(port @ 1..=65535) => Ok(port as u16),
        _ => Err(e.wrong()),
    };
    let parts = e.value.split(|c: char| c == ',' || c.is_whitespace());
    let mut parts = parts.filter(|part| !part.is_empty()).peekable();
    // none stands for all
    parts.peek().ok_or_else(|| e.wrong())?;
    for part in parts {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (port(first)?, port(last)?);
        if first > last {
            return Err(format!("\"{}\": {part} ends before it begins", e.key));
        }
        list.push(Range { first, last });
    }
    *list = Range::merge(std::mem::take(list));
    Ok(())
}

pub fn cgroup_root(e: &Setting) -> Result<Option<PathBuf>> {
    match e.value {
        "auto" => Ok(None),
        path if path.starts_with('/') => Ok(Some(path.into())),
        _ => Err(e.wrong()),
    }
}

/// The number of a route table, but for some, which are said to be something else.
pub fn table(e: &Setting, taken: RangeInclusive<u32>, what: &str) -> Result<u32> {
    let table = number(e)?;
    match taken.contains(&table) {
        true => Err(format!("\"{}\" cannot be {table}: it is the {what} one", e.key)),
        false => Ok(table),
    }
}

/// A user's name or uid.
pub fn user(e: &Setting) -> Result<u32> {
    match parse_number(e.value) {
        Some(_) => number(e),
        None => e.source.uid(e.value).ok_or_else(|| format!("no such user: \"{}\"", e.value)),
    }
}

/// `ADDRESS` or `ADDRESS/LENGTH`.
pub fn range(e: &Setting, value: &str) -> Result<Ranges> {
    let (address, length) = match value.split_once('/') {
        Some((address, length)) => (address, Some(length.trim())),
        None => (value, None),
    };
    let prefix = |bits: u32| match length {
        None => Ok(bits),
        Some(text) if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) => {
            text.parse().ok().filter(|n| *n <= bits).ok_or_else(|| {
                let key = e.key;
                format!("\"{key}\": prefix length {text} is not from 0 to {bits}: \"{value}\"")
            })
        }
        Some(_) => Err(e.wrong()),
    };
    match address.trim().parse() {
        Ok(IpAddr::V4(a)) => {
            Ok(Ranges { v4: vec![Range::prefix(a, prefix(32)?)], ..Ranges::default() })
        }
        Ok(IpAddr::V6(a)) => {
            let length = prefix(128)?;
            match mapped(a, length) {
                Some(v4) => Err(format!("{}, did you mean \"{v4}\"?", e.wrong())),
                None => Ok(Ranges { v6: vec![Range::prefix(a, length)], ..Ranges::default() }),
            }
        }
        Err(_) => Err(e.wrong()),
    }
}

/// IPv4 addresses in IPv6's words (`::ffff:192.0.2.1`), which no packet bears. All of them, ::ffff:0:0/96,
/// are a line of lists of reserved addresses.
fn mapped(address: Ipv6Addr, length: u32) -> Option<Range<Ipv4Addr>> {
    let length = length.checked_sub(96).filter(|length| (1..=32).contains(length))?;
    address.to_ipv4_mapped().map(|address| Range::prefix(address, length))
}

/// The same, or the word `private`.
pub fn range_or_private(e: &Setting) -> Result<Ranges> {
    if e.value != "private" {
        return range(e, e.value);
    }
    let mut ranges = Ranges::default();
    for value in PRIVATE {
        ranges.extend(range(e, value)?);
    }
    Ok(ranges)
}

/// The addresses of a file, one or a CIDR a line. What is wrong with its lines goes to `problems`.
pub fn list(e: &Setting, problems: &mut Vec<Problem>) -> Result<Ranges> {
    let path = e.place.beside(e.value);
    let text = e.source.list(&path);
    let text = text.map_err(|why| format!("unable to read {}: {why}", path.display()))?;
    let file = Rc::new(path);
    let mut ranges = Ranges::default();
    let mut wrong = 0;
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    for (line, value) in (1..).zip(text.as_bytes().split(|byte| *byte == b'\n')) {
        // lists come with remarks behind what they list as well
        let end = value.iter().position(|byte| matches!(byte, b'#' | b';'));
        // at a character's end all the same
        let value = std::str::from_utf8(&value[..end.unwrap_or(value.len())]).unwrap_or_default();
        let value = match value.trim_ascii() {
            plain if plain.is_ascii() => plain,
            other => other.trim(),
        };
        if value.is_empty() {
            continue;
        }
        match listed(value) {
            Some(AnyRange::V4(range)) => ranges.v4.push(range),
            Some(AnyRange::V6(range)) => ranges.v6.push(range),
            None => {
                wrong += 1;
                if wrong <= MOST_WRONG {
                    let place = Place { file: file.clone(), line };
                    let hint = hint(value);
                    let message = format!("expected an address or a CIDR, not \"{value}\"{hint}");
                    problems.push(Problem::at(&place, &message));
                }
            }
        }
        if ranges.len() > MOST_LISTED {
            return Err(format!("{}: over {MOST_LISTED} addresses", file.display()));
        }
    }
    match wrong.checked_sub(MOST_WRONG) {
        None | Some(0) => Ok(ranges),
        Some(more) => Err(format!("{}: {more} more lines are no addresses", file.display())),
    }
}

/// A line of a list: of 100,000 none should cost more than it must.
enum AnyRange {
    V4(Range<Ipv4Addr>),
    V6(Range<Ipv6Addr>),
}

fn listed(value: &str) -> Option<AnyRange> {
    let (address, length) = match value.bytes().position(|byte| byte == b'/') {
        None => (value, None),
        Some(at) => {
            let text = &value[at + 1..];
            let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
            (&value[..at], Some(text.parse::<u32>().ok().filter(|_| digits)?))
        }
    };
    let prefix = |bits| Some(length.unwrap_or(bits)).filter(|length| *length <= bits);
    Some(match address.parse().ok()? {
        IpAddr::V4(a) => AnyRange::V4(Range::prefix(a, prefix(32)?)),
        IpAddr::V6(a) => {
            let length = prefix(128)?;
            mapped(a, length).is_none().then(|| AnyRange::V6(Range::prefix(a, length)))?
        }
    })
}

/// What the line of a list that is written in another way may mean: `, did you mean …?`.
fn hint(value: &str) -> String {
    let plain = value.trim_matches(|c: char| "\"',[]-".contains(c) || c.is_whitespace());
    let (address, length) = plain.split_once('/').unwrap_or((plain, ""));
    // a netmask, and octets that were left out
    let length = match length.parse::<Ipv4Addr>().map(u32::from) {
        Ok(mask) if mask.leading_ones() == mask.count_ones() => mask.count_ones().to_string(),
        _ => length.to_string(),
    };
    let octets = address.split('.').filter(|octet| octet.parse::<u8>().is_ok()).count();
    let address = match address.split('.').count() {
        parts @ 1..=3 if parts == octets && !length.is_empty() => {
            address.to_string() + &".0".repeat(4 - parts)
        }
        _ => address.to_string(),
    };
    let slash = if length.is_empty() { "" } else { "/" };
    let meant = format!("{address}{slash}{length}");
    let ends = |(first, last): (&str, &str)| {
        let [first, last] = [first.trim().parse().ok()?, last.trim().parse().ok()?];
        let range: Range<Ipv4Addr> = Range { first, last };
        let text = (first <= last).then(|| range.to_string())?;
        text.contains('/').then_some(text)
    };
    let length = if length.is_empty() { "128" } else { &length };
    let v4 = || mapped(address.parse().ok()?, length.parse().ok()?);
    let range = || plain.split_once('-').and_then(ends);
    match listed(&meant) {
        Some(_) if meant != value => format!(", did you mean \"{meant}\"?"),
        _ => match v4().map(|range| range.to_string()).or_else(range) {
            Some(range) => format!(", did you mean \"{range}\"?"),
            None => String::new(),
        },
    }
}

pub fn bypass_mark(e: &Setting) -> Result<Mark> {
    let bits = |text: &str| {
        let number = parse_number(text.trim());
        number.and_then(|n| u32::try_from(n).ok()).ok_or_else(|| e.wrong())
    };
    let (value, mask) = match e.value.split_once('/') {
        Some((value, mask)) => (bits(value)?, bits(mask)?),
        None => (bits(e.value)?, u32::MAX),
    };
    let why = match (value, mask) {
        (0, _) => "0 would match every packet without a mark".to_string(),
        (_, 0) => "with mask 0 would match every packet".to_string(),
        _ if value & !mask != 0 => format!("{value:#x} has bits outside its mask {mask:#x}"),
        _ => return Ok(Mark { value, mask }),
    };
    Err(format!("\"{}\" {why}", e.key))
}

/// `ADDRESS`, `ADDRESS:PORT`, `[ADDRESS]:PORT`; port 53 if left out.
pub fn endpoint(e: &Setting) -> Result<SocketAddr> {
    let bare = e.value.strip_prefix('[').and_then(|v| v.strip_suffix(']')).unwrap_or(e.value);
    let address = match bare.parse::<IpAddr>() {
        Ok(ip) => SocketAddr::new(ip, 53),
        Err(_) => e.value.parse::<SocketAddr>().map_err(|_| e.wrong())?,
    };
    let plain = !matches!(address, SocketAddr::V6(a) if a.scope_id() != 0);
    let host = one_host(&address.ip()) || address.ip().is_loopback();
    let usable = address.port() != 0 && host && plain;
    usable.then_some(address).ok_or_else(|| e.wrong())
}

/// The name of an interface that packets may come in by, or the beginning of such names.
pub fn interface(e: &Setting) -> Result<Interface> {
    let (name, prefix) = match e.value.strip_suffix('*') {
        Some(name) => (name, true),
        None => (e.value, false),
    };
    let legal = |c: char| c.is_ascii_graphic() && !matches!(c, '/' | '"' | '\\' | '*');
    if e.value == "lo" {
        Err(e.expects("an interface that others are behind"))
    } else if e.value == "*" {
        Err(e.expects("a name, or the beginning of one before the *"))
    } else if prefix && name.len() == MAX_INTERFACE {
        // nft takes that for the name itself, and lists what does not load
        Err(e.expects("up to 14 characters before the *"))
    } else if name.is_empty() || name.len() > MAX_INTERFACE || !name.chars().all(legal) {
        Err(e.wrong())
    } else {
        Ok(Interface { name: name.to_string(), prefix })
    }
}

/// The name of an interface that packets leave by.
pub fn way_out(e: &Setting) -> Result<String> {
    match interface(e) {
        Ok(interface) if interface.prefix => Err(e.expects("the name of one interface")),
        Err(_) if e.value == "lo" => Err(e.expects("an interface that leads out of this host")),
        other => other.map(|interface| interface.name),
    }
}

/// What a listener may be bound to.
pub fn own_address(e: &Setting) -> Result<IpAddr> {
    let address: IpAddr = parsed(e)?;
    // which tells of one that is no packet's
    range(e, e.value)?;
    let many = address.is_multicast() || address == Ipv4Addr::BROADCAST;
    (!many).then_some(address).ok_or_else(|| e.wrong())
}

/// A host that packets are sent on to; the kernel takes no other for a next hop.
pub fn next_hop(e: &Setting) -> Result<IpAddr> {
    let hop: IpAddr = parsed(e)?;
    one_host(&hop).then_some(hop).ok_or_else(|| e.wrong())
}

/// Whether an address may be that of one host and no other, this one's loopback ones left out.
fn one_host(ip: &IpAddr) -> bool {
    let special = ip.is_unspecified() || ip.is_loopback() || ip.is_multicast();
    !special
        && match ip {
            // 0.0.0.0/8, and what is reserved
            IpAddr::V4(ip) => (1..240).contains(&ip.octets()[0]),
            // an IPv4 address in other words, or one and a port (::1:53)
            IpAddr::V6(ip) => ip.to_ipv4().is_none(),
        }
}

/// What its standard library reads from text.
pub fn parsed<T: FromStr>(e: &Setting) -> Result<T> {
    e.value.parse().map_err(|_| e.wrong())
}

/// Sets what may be given once for each family.
pub fn once<T: fmt::Display>(
    e: &Setting,
    slots: &mut [Option<T>; 2],
    family: Family,
    value: T,
) -> Result<()> {
    let slot = &mut slots[family as usize];
    if let Some(first) = slot {
        let (family, key) = (family.name(), e.key);
        return Err(format!("second {family} \"{key}\": \"{value}\" beside \"{first}\""));
    }
    *slot = Some(value);
    Ok(())
}
