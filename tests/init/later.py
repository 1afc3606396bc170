#!/usr/bin/env python3
"""later.py PID SECONDS: from now on the monotonic clock of that process is SECONDS ahead.

No clock can be turned on, but a process can be moved into a time namespace whose clock is. It has to
move by itself, so it is stopped in the system call in which it waits, made to call setns(2), and let
go on. For one thread on x86_64, and as root.
"""
import ctypes
import os
import sys

libc = ctypes.CDLL(None, use_errno=True)
CLONE_NEWTIME = 0x80
PTRACE_SINGLESTEP, PTRACE_GETREGS, PTRACE_SETREGS, PTRACE_ATTACH, PTRACE_DETACH = 9, 12, 13, 16, 17
SYS_CLOSE, SYS_SETNS, SYS_PIDFD_OPEN = 3, 308, 434
FIELDS = '''r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp ss
    fs_base gs_base ds es fs gs'''.split()
# the instruction `syscall`
LENGTH = 2


class Registers(ctypes.Structure):
    _fields_ = [(field, ctypes.c_ulong) for field in FIELDS]


def call(what, *arguments):
    if what(*arguments) < 0:
        number = ctypes.get_errno()
        sys.exit(f'unable to {what.__name__}{arguments}: {os.strerror(number)}')


def ptrace(request, pid, data=None):
    call(libc.ptrace, request, pid, None, data)


def inject(pid, waiting, number, *arguments):
    """The result of a system call that the process makes where it waits."""
    there = Registers.from_buffer_copy(waiting)
    there.rip -= LENGTH
    there.rax = number
    there.orig_rax = ctypes.c_ulong(-1).value
    for field, argument in zip(('rdi', 'rsi', 'rdx'), arguments):
        setattr(there, field, argument)
    ptrace(PTRACE_SETREGS, pid, ctypes.byref(there))
    ptrace(PTRACE_SINGLESTEP, pid)
    os.waitpid(pid, 0)
    ptrace(PTRACE_GETREGS, pid, ctypes.byref(there))
    result = ctypes.c_long(there.rax).value
    if result < 0:
        sys.exit(f'system call {number}{arguments} of {pid}: {os.strerror(-result)}')
    return result


def holder(seconds):
    """A process in a time namespace of that offset, which ends when the pipe is closed."""
    out, into = os.pipe()
    call(libc.unshare, CLONE_NEWTIME)
    with open('/proc/self/timens_offsets', 'w') as file:
        file.write(f'monotonic {seconds} 0\n')
    pid = os.fork()
    if pid == 0:
        os.close(into)
        os.read(out, 1)
        os._exit(0)
    return pid, into


pid, seconds = int(sys.argv[1]), int(sys.argv[2])
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
libc.ptrace.restype = ctypes.c_long
there, pipe = holder(seconds)
ptrace(PTRACE_ATTACH, pid)
os.waitpid(pid, 0)
waiting = Registers()
ptrace(PTRACE_GETREGS, pid, ctypes.byref(waiting))
fd = inject(pid, waiting, SYS_PIDFD_OPEN, there, 0)
inject(pid, waiting, SYS_SETNS, fd, CLONE_NEWTIME)
inject(pid, waiting, SYS_CLOSE, fd)
ptrace(PTRACE_SETREGS, pid, ctypes.byref(waiting))
ptrace(PTRACE_DETACH, pid)
os.close(pipe)
os.waitpid(there, 0)
