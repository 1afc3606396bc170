# cgtproxy: `make` builds the static binary, `make demo` shows it at work, `make test` passes all
# tests. Everything that a target needs and that can be installed is installed by it.

# Router architectures: x86_64, i686, aarch64, armv7, arm (soft float), mipsel, mips, riscv64.
ARCH    ?= $(shell uname -m | sed 's/^i[3-6]86$$/i686/; s/^armv[78].*/armv7/')
TARGET_armv7   = armv7-unknown-linux-musleabihf
TARGET_arm     = arm-unknown-linux-musleabi
TARGET_riscv64 = riscv64gc-unknown-linux-musl
MUSL     = $(or $(TARGET_$(ARCH)),$(ARCH)-unknown-linux-musl)
SYSROOT := $(shell rustc --print sysroot 2>/dev/null)
# Without rustup, and without the distribution's package of a musl target (Debian has none), the
# static binary for this machine is one of glibc.
HOST    := $(shell rustc -vV 2>/dev/null | sed -n 's/^host: //p')
GLIBC    = $(filter $(ARCH)-%-gnu,$(HOST))
TARGET  ?= $(if $(or $(wildcard $(SYSROOT)/lib/rustlib/$(MUSL)),$(shell command -v rustup)),$(MUSL),$(or $(GLIBC),$(MUSL)))
BUILT   := $(or $(CARGO_TARGET_DIR),target)
BIN     := $(BUILT)/$(TARGET)/release/cgtproxy

# The standard library is compiled for size together with the program where its source is to be
# had: that nearly halves the binary. No PIE: a static one relocates itself at start, which makes
# memory dirty that could stay shared.
# A panic ends the program, so that nothing is ever unwound: no tables for that.
# What only commands run stands apart, and so out of a daemon's memory.
# The same bytes whoever builds, and wherever: no path of this machine.
RELEASE_FLAGS = $(if $(filter %-gnu,$(TARGET)),-C target-feature=+crt-static) -C relocation-model=static -C force-unwind-tables=no -C link-arg=-Tinit/apart.ld $(RELATIVE:%=--remap-path-prefix=%)
RELATIVE      = $(CURDIR)=cgtproxy $(SYSROOT)=rust $(or $(CARGO_HOME),$(HOME)/.cargo)=cargo
FOR_SIZE      = -Z build-std=std,panic_abort -Z build-std-features=optimize_for_size
BUILD_STD     = $(if $(filter %-gnu,$(TARGET)),,$(if $(wildcard $(SYSROOT)/lib/rustlib/src/rust/library/std),$(FOR_SIZE)))

.PHONY: all build toolchain deps root demo lint test bench soak fuzz clean

all: build

build: toolchain
	RUSTC_BOOTSTRAP=1 RUSTFLAGS="$(RELEASE_FLAGS)" \
	  cargo build --release --locked --target $(TARGET) $(BUILD_STD) $(EXTRA)

# One line that says what is missing where it cannot be added, and what is built where it is not
# what it could be.
toolchain:
	@command -v cargo >/dev/null && command -v rustc >/dev/null || { echo "make: Rust is missing: install cargo and rustc 1.85 or later" \
	  "(Debian 13: apt-get install cargo rustc gcc make), or rustup" >&2; exit 1; }
	@command -v cc >/dev/null || { echo "make: a C compiler is missing, Rust links by it: install gcc" \
	  "(Debian: apt-get install gcc libc6-dev)" >&2; exit 1; }
	@test -d $(SYSROOT)/lib/rustlib/$(TARGET) || rustup target add $(TARGET) \
	  || { echo "make: the Rust target $(TARGET) is missing and cannot be added" >&2; exit 1; }
	@case $(TARGET) in *-gnu) echo "make: no musl target for Rust: building a static binary of glibc (a larger one)" >&2 ;; \
	*) test -d $(SYSROOT)/lib/rustlib/src/rust/library/std || rustup component add rust-src \
	  || echo "make: no rust-src, building with the prebuilt standard library (a larger binary)" >&2 ;; esac

# What the tests need beside Rust, gcc and make: commands and C libraries, by Debian and Alpine name.
DEB_NEEDS = nftables iproute2 strace pkg-config libmnl-dev libnftnl-dev mandoc python3 bash
APK_NEEDS = nftables iproute2 strace pkgconf libmnl-dev libnftnl-dev mandoc python3 bash util-linux
HAVE_ALL  = $(call have,nft ip strace pkg-config mandoc python3 bash) && pkg-config --exists libmnl libnftnl
# whether all commands of a list are there: `command -v` looks for the first only, or for any
have      = ( for c in $(1); do command -v $$c >/dev/null || exit 1; done )

deps:
	@PATH="$$PATH:/usr/sbin:/sbin"; if ! { $(HAVE_ALL); }; then \
	  test "$$(id -u)" = 0 || { echo "make: some of what the tests need is missing; as root:" \
	    "apt-get install $(DEB_NEEDS), or apk add $(APK_NEEDS)" >&2; exit 1; }; \
	  if command -v apt-get >/dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $(DEB_NEEDS); \
	  elif command -v apk >/dev/null; then apk add --quiet $(APK_NEEDS); fi; \
	  { $(HAVE_ALL); } || { echo "make: cannot install what the tests need:" \
	    "nft, ip, strace, pkg-config, mandoc, python3, bash, libmnl and libnftnl with headers" >&2; exit 1; }; \
	fi

root:
	@test "$$(id -u)" = 0 || { echo "make: this needs root, for network namespaces and cgroups of its own" >&2; exit 1; }

# The main job for real, in throw-away namespaces: nothing of this host's network is touched.
demo: root build deps
	cargo test --quiet --locked --test it demo::demo -- --ignored --nocapture

# What can be read without running it: rustfmt, clippy, shellcheck and mandoc, each installed if it is
# missing.
lint: toolchain
	@tests/lint.sh

# All tests; needs root, and says SKIP for what cannot be had without.
test: lint build deps
	cargo test --locked
	cargo test --locked --quiet --test it forgotten:: -- --ignored
	+@$(MAKE) --no-print-directory vm-quick

# Everything at once for MINUTES: at the end nothing may be left over, and no packet leaked.
MINUTES ?= 60
soak: build deps
	CGTPROXY_MINUTES=$(MINUTES) cargo test --locked --test it soak::at_length -- --ignored --nocapture

# Fuzzes everything that reads what others write, SECONDS for each target.
SECONDS ?= 600
FUZZ_FLAGS = --fuzz-dir tests/fuzz --sanitizer none
fuzz: toolchain
	command -v cargo-fuzz >/dev/null || cargo install --quiet --locked cargo-fuzz
	for target in config netlink inotify pattern; do mkdir -p tests/fuzz/corpus/$$target && \
	  RUSTC_BOOTSTRAP=1 cargo fuzz run $(FUZZ_FLAGS) $$target tests/fuzz/corpus/$$target \
	    tests/fuzz/seeds/$$target -- -max_total_time=$(SECONDS) || exit 1; done

# Measures the static binary beside references of the same run (root; see tests/bench/main.rs), and
# writes tests/bench/results.json; from that come the picture tests/bench/figures.svg and the rows of
# README's table. QUICK=1 takes fewer samples and a minute or two; FIGURES="latency burst" measures
# those groups only, and writes no file. BESIDE=FILE measures packets under another build, too.
bench: build deps
	PATH="$$PATH:/usr/sbin:/sbin" QUICK=$(QUICK) BESIDE=$(abspath $(BESIDE)) CGTPROXY_BIN=$(abspath $(BIN)) \
	  cargo bench --locked --bench bench -- $(FIGURES)
	@test -n "$(FIGURES)$(QUICK)" || python3 tests/bench/figures.py tests/bench/results.json tests/bench/figures.svg

include init/package.mk tests/vm/vm.mk tests/real/real.mk

clean:
	cargo clean
