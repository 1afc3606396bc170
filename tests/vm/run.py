#!/usr/bin/env python3
"""run.py [--figures] GUEST...: boots the packaged program on other kernels, without root.

Each guest is a Debian kernel under qemu (no KVM needed) with an initramfs of its modules, the
program, and a first process that tests it (guest.rs) and says VM PASS or VM FAIL on the console.
One line a guest on standard output; exit status 1 if any fails. `--arches` prints what to build.
With --figures the guests' clocks count instructions, and what the program costs by them (figures.rs)
is written to tests/bench/guests.json, which figures.py makes rows of README's table of.

Kernels and, unless it is installed, qemu are fetched with apt into DIR (target/vm) and unpacked
there: nothing is installed. A guest `mips` takes the kernel that `make vm-test-be` has built.

`run.py --host GUEST COMMAND` runs a shell command, as root, on a guest's kernel with all of its
modules and with this machine's files, of which it can change nothing. Exit status: the command's.
"""
import glob, gzip, json, lzma, os, re, stat, subprocess, sys, time

ROOT = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), '../..'))
CACHE = os.path.join(ROOT, 'target/vm')

# guest: Debian suites (the first whose index the mirror has whole), architecture and kernel flavour;
# Rust target; qemu and its machine
X86, MALTA = '-cpu max', '-M malta -cpu 24Kc'
GUESTS = {
    'amd64-6.1': ('bookworm', 'amd64', 'amd64', 'x86_64', 'x86_64', X86),
    'amd64-6.12': ('trixie', 'amd64', 'amd64', 'x86_64', 'x86_64', X86),
    'i386-6.1': ('bookworm', 'i386', '686-pae', 'i686', 'x86_64', X86),
    'arm64-6.12': ('trixie', 'arm64', 'arm64', 'aarch64', 'aarch64', '-M virt -cpu cortex-a53'),
    'armhf-6.1': ('bookworm', 'armhf', 'armmp', 'armv7', 'arm', '-M virt,highmem=off -cpu cortex-a15'),
    'mipsel-6.1': ('bookworm', 'mipsel', '4kc-malta', 'mipsel', 'mipsel', MALTA),
    'riscv64': ('trixie trixie-backports forky', 'riscv64', 'riscv64', 'riscv64', 'riscv64', '-M virt'),
    'mips-6.1': (None, 'mips', None, 'mips', 'mips', MALTA),
    'amd64-5.10': ('bullseye', 'amd64', 'amd64', 'x86_64', 'x86_64', X86),
}
TRIPLES = {'armv7': 'armv7-unknown-linux-musleabihf', 'riscv64': 'riscv64gc-unknown-linux-musl'}
# guests whose kernel lacks what the program needs: it has to say so
REFUSED = {'amd64-5.10'}
# crc32c_generic first: nf_conntrack's dependencies name it softly
MODULES = '''crc32c_generic nf_tables nft_socket nft_tproxy nft_ct nft_fib_ipv4 nft_fib_ipv6 nft_fib_inet
    nft_chain_nat nft_nat nft_masq nft_redir nft_reject_inet nft_limit nft_log nft_counter nft_hash nf_conntrack
    nft_flow_offload nf_flow_table_inet af_packet veth bridge'''.split()
LATE = 'br_netfilter'  # loaded by the test itself
LIMIT = 600  # seconds for a guest: some twenty where nobody else uses the processors
# An instruction is a nanosecond of every clock that the guest has, and nobody waits where it sleeps.
COUNTING = '-icount shift=0,sleep=off -rtc clock=vm'
FIGURES = os.path.join(ROOT, 'tests/bench/guests.json')


def run(*command, **more):
    return subprocess.run(command, check=True, **more)


def apt(suite, arch):
    """An apt state of its own, so that foreign suites and architectures can be fetched."""
    base = f'{CACHE}/apt-{suite}-{arch}'
    conf = f'{base}/apt.conf'
    env = dict(os.environ, APT_CONFIG=conf)
    if os.path.exists(f'{base}/done'):
        return env
    for d in ('state/lists/partial', 'cache/archives/partial', 'sources'):
        os.makedirs(f'{base}/{d}', exist_ok=True)
    # the mirror of this machine's own apt
    sources = ''.join(open(f).read() for f in glob.glob('/etc/apt/sources.list.d/debian.sources')
                      + glob.glob('/etc/apt/sources.list'))
    mirrors = re.findall(r'^(?:URIs:|deb(?: \[.*\])?)\s*(\S+)', sources, re.M)
    if not mirrors:
        sys.exit('unable to find the mirror in the configuration of apt')
    mirror = mirrors[0]
    keyring = '/usr/share/keyrings/debian-archive-keyring.gpg'
    open(f'{base}/sources/debian.sources', 'w').write(
        f'Types: deb\nURIs: {mirror}\nSuites: {suite}\nComponents: main\nSigned-By: {keyring}\n')
    open(conf, 'w').write(
        f'Dir::State "{base}/state"; Dir::State::status "{base}/status"; Dir::Cache "{base}/cache";'
        f'Dir::Etc::sourcelist "{base}/none"; Dir::Etc::sourceparts "{base}/sources";'
        f'Acquire::Languages "none"; Acquire::Retries "3"; APT::Architecture "{arch}";'
        f'APT::Architectures {{"{arch}";}}; APT::Sandbox::User "{os.environ.get("USER", "root")}";\n')
    open(f'{base}/status', 'w').close()
    run('apt-get', 'update', '-qq', env=env)
    open(f'{base}/done', 'w').close()
    return env


def first_apt(suites, arch):
    """Mirrors have suites whose index is not the one that was signed, some for days."""
    for suite in suites[:-1]:
        try:
            return apt(suite, arch)
        except subprocess.CalledProcessError:
            pass
    return apt(suites[-1], arch)


def unpack(env, packages, into):
    """Fetches packages and unpacks them below the directory `into`."""
    os.makedirs(into, exist_ok=True)
    run('apt-get', 'download', '-qq', *packages, cwd=into, env=env)
    for deb in glob.glob(f'{into}/*.deb'):
        run('dpkg-deb', '-x', deb, into)
        os.remove(deb)


def depends(env, package, kinds):
    """The kernel packages of these kinds that a package depends on."""
    out = run('apt-cache', 'depends', package, env=env, capture_output=True, text=True).stdout
    return re.findall(rf' Depends: (linux-(?:{kinds})-[0-9][^:\s]*)', out)


def kernel(guest):
    """Paths of the kernel image and of its module tree (None where all is built in)."""
    suites, arch, flavour = GUESTS[guest][:3]
    root = f'{CACHE}/{guest}'
    if suites and not os.path.exists(f'{root}/done'):
        env = first_apt(suites.split(), arch)
        image = depends(env, f'linux-image-{flavour}:{arch}', 'image')
        if not image:
            sys.exit(f'{guest}: no kernel in that suite')
        # since forky the image and its modules are packages of their own
        parts = depends(env, f'{image[0]}:{arch}', 'binary|modules')
        unpack(env, [f'{package}:{arch}' for package in image + parts], root)
        open(f'{root}/done', 'w').close()
    images = glob.glob(f'{root}/boot/vmlinu[xz]*') + glob.glob(f'{root}/usr/lib/modules/*/vmlinuz')
    if not images:
        sys.exit(f'{guest}: no kernel in {root}: run make vm-test-be')
    modules = glob.glob(f'{root}/lib/modules/*') + glob.glob(f'{root}/usr/lib/modules/*')
    return images[0], modules[0] if modules else None


def qemu(machine):
    """The command, installed or fetched; with its environment."""
    name = f'qemu-system-{machine}'
    for d in os.environ.get('PATH', '').split(':'):
        if os.access(f'{d}/{name}', os.X_OK):
            return [f'{d}/{name}'], None
    root = f'{CACHE}/qemu'
    if not os.path.exists(f'{root}/done'):
        env = apt('bookworm', 'amd64')
        wanted = [f'qemu-system-{p}' for p in ('x86', 'arm', 'mips', 'misc')]
        out = run('apt-get', 'install', '-s', '--no-install-recommends', *wanted,
                  env=env, capture_output=True, text=True).stdout
        # what this machine has cannot be known to fit, so everything but the C library
        packages = [p for p in re.findall(r'^Inst (\S+)', out, re.M)]
        unpack(env, packages, root)
        open(f'{root}/done', 'w').close()
    lib = f'{root}/usr/lib/x86_64-linux-gnu'
    loader = f'{root}/lib64/ld-linux-x86-64.so.2'
    share = f'{root}/usr/share'
    pulse = glob.glob(f'{lib}/pulseaudio')
    libs = ':'.join([lib, f'{root}/lib/x86_64-linux-gnu', *pulse])
    command = [loader, '--library-path', libs, f'{root}/usr/bin/{name}']
    for d in ('qemu', 'seabios', 'ipxe-qemu'):
        command += ['-L', f'{share}/{d}']
    return command, dict(os.environ, QEMU_MODULE_DIR=f'{lib}/qemu')


class Initramfs:
    """A newc cpio archive, made without cpio or root."""

    def __init__(self):
        self.out, self.inode, self.dirs = bytearray(), 0, set()

    def entry(self, name, mode, data=b'', device=(0, 0)):
        name = name.encode() + b'\0'
        self.inode += 1
        fields = (self.inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name), 0)
        self.out += b'070701' + b''.join(b'%08x' % f for f in fields)
        for part in (name, data):
            self.out += part
            self.out += bytes(-len(self.out) % 4)

    def mkdir(self, path):
        parts = path.strip('/').split('/')
        for n in range(1, len(parts) + 1):
            if (d := '/'.join(parts[:n])) and d not in self.dirs:
                self.dirs.add(d)
                self.entry(d, 0o40755)

    def file(self, path, data, mode=0o644):
        self.mkdir(os.path.dirname(path))
        self.entry(path.strip('/'), 0o100000 | mode, data)

    def bytes(self):
        self.entry('TRAILER!!!', 0)
        return gzip.compress(bytes(self.out), 1)


def modules(tree, wanted):
    """The modules of `wanted` that are not built in, with what they depend on, dependencies first."""
    paths = {}
    for d, _, files in os.walk(tree):
        for f in files:
            if m := re.match(r'(.+)\.ko(\.xz)?$', f):
                paths[m.group(1).replace('-', '_')] = os.path.join(d, f)
    done = {}

    def add(name):
        if name in done or name not in paths:
            return
        data = open(paths[name], 'rb').read()
        if paths[name].endswith('.xz'):
            data = lzma.decompress(data)
        # depends= is a NUL-terminated string of section .modinfo
        depends = re.search(rb'(?:^|\0)depends=([^\0]*)\0', data)
        for other in depends.group(1).decode().split(',') if depends else ():
            add(other.replace('-', '_'))
        done[name] = data

    for name in wanted:
        add(name)
    order = list(done)
    add(LATE)
    return done, order


def add_modules(fs, tree, wanted):
    """Puts modules into /mods, and the order to load them in."""
    found, order = modules(tree, wanted) if tree else ({}, [])
    for name, data in found.items():
        fs.file(f'mods/{name}.ko', data)
    fs.file('mods/order', ''.join(f'{name}.ko\n' for name in order).encode())


def initramfs(guest, tree):
    arch = GUESTS[guest][3]
    release = f'{ROOT}/target/{TRIPLES.get(arch, arch + "-unknown-linux-musl")}/release'
    fs = Initramfs()
    for d in ('proc', 'sys', 'run', 'tmp'):
        fs.mkdir(d)
    fs.mkdir('dev')
    fs.entry('dev/console', stat.S_IFCHR | 0o600, device=(5, 1))
    fs.entry('dev/null', stat.S_IFCHR | 0o666, device=(1, 3))
    fs.file('init', open(f'{release}/examples/guest', 'rb').read(), 0o755)
    fs.file('usr/sbin/cgtproxy', open(f'{release}/cgtproxy', 'rb').read(), 0o755)
    shipped = open(f'{ROOT}/conf/cgtproxy.conf', 'rb').read()
    fs.file('etc/cgtproxy/cgtproxy.conf.shipped', shipped)
    add_modules(fs, tree, MODULES)
    path = f'{CACHE}/{guest}.cpio.gz'
    open(path, 'wb').write(fs.bytes())
    return path


# the first process of a guest with this machine's files: a tmpfs over them, and modules on demand
HOST_INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc none /proc; mount -t sysfs none /sys; mount -t devtmpfs none /dev
while read module; do insmod /mods/$module; done </mods/order
mount -t tmpfs none /over; mkdir /over/upper /over/work
mount -t 9p -o trans=virtio,version=9p2000.L,ro,msize=512000,cache=loose host /files
mount -t overlay -o lowerdir=/files,upperdir=/over/upper,workdir=/over/work none /new
for each in proc sys dev; do mount --move /$each /new/$each; done
for each in tmp run; do mount -t tmpfs none /new/$each; done
mkdir -p /new/dev/shm /new/dev/pts /new/lib/modules/$(uname -r)
mount -t tmpfs none /new/dev/shm; mount -t devpts none /new/dev/pts
mount -t cgroup2 none /new/sys/fs/cgroup
mount --bind '/files@TREE@' /new/lib/modules/$(uname -r)
exec switch_root /new /bin/sh /run-as-first
"""
HOST_RUN = """cd '@ROOT@' && (@COMMAND@
)
status=$?; echo; echo "VM EXIT $status"; sync; echo o >/proc/sysrq-trigger; while :; do :; done
"""


def on_host(guest, command):
    """Runs a command on a guest's kernel with this machine's files; returns its exit status."""
    image, tree = kernel(guest)
    base = tree[:tree.rindex('/lib/modules/')]
    run('depmod', '-b', base, os.path.basename(tree))
    fs = Initramfs()
    for d in ('proc', 'sys', 'dev', 'files', 'over', 'new', 'bin'):
        fs.mkdir(d)
    fs.entry('dev/console', stat.S_IFCHR | 0o600, device=(5, 1))
    fs.file('bin/busybox', open('/bin/busybox', 'rb').read(), 0o755)
    fs.file('init', HOST_INIT.replace('@TREE@', tree).replace('/run-as-first', f'{CACHE}/host.sh')
            .encode(), 0o755)
    open(f'{CACHE}/host.sh', 'w').write(
        HOST_RUN.replace('@ROOT@', ROOT).replace('@COMMAND@', command))
    add_modules(fs, tree, [*MODULES, *'virtio_pci 9pnet_virtio 9p overlay tun'.split()])
    open(f'{CACHE}/host.cpio.gz', 'wb').write(fs.bytes())
    machine, options = GUESTS[guest][4:]
    run_qemu, env = qemu(machine)
    # one processor: with a thread for each, one may meet text that another has patched since
    done = subprocess.Popen(run_qemu + options.split() + [
        '-accel', 'tcg,thread=single', '-smp', '1', '-m', '4096', '-nographic', '-no-reboot',
        '-nic', 'none', '-fsdev', 'local,id=host,path=/,security_model=none,readonly=on,multidevs=remap',
        '-device', 'virtio-9p-pci,fsdev=host,mount_tag=host', '-kernel', image,
        '-initrd', f'{CACHE}/host.cpio.gz', '-append', 'console=ttyS0 panic=-1 quiet'],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=env)
    status = 1
    for line in done.stdout:
        text = line.decode(errors='replace').replace('\r', '')
        print(text, end='', flush=True)
        if said := re.match(r'VM EXIT (\d+)', text):
            status = int(said.group(1))
    done.wait()
    return status


def boot(guest, figures):
    """Boots a guest; returns whether it passed, what it said of that, and its figures."""
    machine, options = GUESTS[guest][4:]
    image, tree = kernel(guest)
    command, env = qemu(machine)
    console = 'ttyAMA0' if machine in ('arm', 'aarch64') else 'ttyS0'
    expect = ' expect=figures' if figures else ' expect=refusal' if guest in REFUSED else ''
    limit = 10 * LIMIT if figures else LIMIT
    command = command + options.split() + (COUNTING.split() if figures else []) + [
        '-accel', 'tcg,thread=single', '-m', '256', '-nographic', '-no-reboot', '-nic', 'none',
        '-kernel', image, '-initrd', initramfs(guest, tree),
        '-append', f'console={console} panic=-1 quiet{expect}']
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=limit, env=env)
        text, ended = done.stdout, f'qemu ended with {done.returncode}'
    except subprocess.TimeoutExpired as late:
        text, ended = late.stdout or b'', f'no end after {limit} s'
    text = text.decode(errors='replace').replace('\r', '')
    open(f'{CACHE}/{guest}.log', 'w').write(text)
    said = re.search(r'^VM (PASS|FAIL) (.*)$', text, re.M)
    if not said:
        return False, f'{ended}, see {CACHE}/{guest}.log', {}
    measured = dict(re.findall(r'^VM FIGURE (.*): (\d+)$', text, re.M))
    return said.group(1) == 'PASS', said.group(2), {name: int(n) for name, n in measured.items()}


def main(arguments):
    if arguments[:1] == ['--arches']:
        return print(*dict.fromkeys(GUESTS[g][3] for g in arguments[1:]))
    os.makedirs(CACHE, exist_ok=True)
    if arguments[:1] == ['--host'] and len(arguments) == 3:
        sys.exit(on_host(*arguments[1:]))
    figures = arguments[:1] == ['--figures']
    arguments = arguments[figures:]
    wrong = [g for g in arguments if g not in GUESTS]
    if wrong or not arguments:
        sys.exit(f'run.py: guests are {", ".join(GUESTS)}')
    failed, measured = 0, {}
    for guest in arguments:
        start = time.monotonic()
        try:
            kernel(guest), qemu(GUESTS[guest][4])
            start = time.monotonic()
            passed, text, measured[guest] = boot(guest, figures)
        except subprocess.CalledProcessError as error:
            passed, text = False, f'unable to fetch it: {error}'
        failed += not passed
        seconds = time.monotonic() - start
        print(f'{"ok    " if passed else "FAILED"} {guest:12} {seconds:5.1f} s  {text}', flush=True)
    if figures and not failed:
        with open(FIGURES, 'w') as file:
            json.dump(measured, file, indent=2)
    sys.exit(1 if failed else 0)


main(sys.argv[1:])
