//! Classic BPF, of which the filters of sockets and of system calls are made: an instruction each.
//! Pure. Source: include/uapi/linux/bpf_common.h, include/uapi/linux/filter.h.

use libc::sock_filter;

pub fn op(code: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code: code as u16, jt, jf, k }
}

/// Loads `BPF_W`, `BPF_H` or `BPF_B` at that offset: in network order.
pub fn load(size: u32, at: u32) -> sock_filter {
    op(libc::BPF_LD | libc::BPF_ABS | size, at, 0, 0)
}

/// Sets a register, `BPF_LD` or `BPF_LDX`.
pub fn set(register: u32, k: u32) -> sock_filter {
    op(register | libc::BPF_IMM, k, 0, 0)
}

/// Goes on so many instructions further, by whether what was loaded is `k`.
pub fn equal(k: u32, yes: u8, no: u8) -> sock_filter {
    op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, k, yes, no)
}

/// Ends the program.
pub fn answer(k: u32) -> sock_filter {
    op(libc::BPF_RET | libc::BPF_K, k, 0, 0)
}

/// What a load makes of a number of 16 bits that stands in host order.
pub fn half(number: u16) -> u32 {
    u16::from_be_bytes(number.to_ne_bytes()).into()
}

/// The same of 32 bits.
pub fn word(number: u32) -> u32 {
    u32::from_be_bytes(number.to_ne_bytes())
}
