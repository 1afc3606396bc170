# Other architectures, `make install`, `make dist`, `make deb`. Included by the Makefile.

ARCHES = x86_64 i686 aarch64 armv7 arm mipsel mips riscv64

# `make cross ARCH=mips`, `make cross-all`: what `make` does, for routers. For some architectures
# Rust brings the C library and a linker along; for the others both come from zig, and the standard
# library has to be compiled with the program.
CROSS_RUSTUP = i686 aarch64
CROSS_ZIG    = armv7 arm mipsel mips riscv64
ZIG_DIR      = target/zig
ZIG_PACKAGES = cargo-zigbuild==0.24.0 ziglang==0.14.1
MAX_KIB      = 800

.PHONY: cross cross-all cross-own cross-rustup cross-zig
HOW = $(or $(if $(filter $(ARCH),$(CROSS_RUSTUP)),rustup),$(if $(filter $(ARCH),$(CROSS_ZIG)),zig),own)
cross: cross-$(HOW)
	@test -n "$(filter $(ARCH),$(ARCHES))" || { echo "make: ARCH is one of $(ARCHES)" >&2; exit 1; }
	@size=$$(($$(stat -c %s $(BIN)) / 1024 + 1)); echo "$(ARCH): $$size KiB, $(BIN)"; test $$size -le $(MAX_KIB)

cross-all:
	+for arch in $(ARCHES); do $(MAKE) --no-print-directory cross ARCH=$$arch || exit 1; done

cross-own: build

cross-rustup: toolchain
	RUSTC_BOOTSTRAP=1 RUSTFLAGS="$(RELEASE_FLAGS) -C linker=rust-lld -C link-self-contained=yes" \
	  cargo build --release --locked --target $(TARGET) $(BUILD_STD) $(EXTRA)

cross-zig: $(ZIG_DIR)/bin/cargo-zigbuild
	@test -d $(SYSROOT)/lib/rustlib/src/rust/library/std || rustup component add rust-src
	RUSTC_BOOTSTRAP=1 RUSTFLAGS="$(RELEASE_FLAGS) -C target-feature=+crt-static -C link-self-contained=no" \
	  PYTHONPATH=$(CURDIR)/$(ZIG_DIR) XDG_CACHE_HOME=$(CURDIR)/$(ZIG_DIR)/cache \
	  $(ZIG_DIR)/bin/cargo-zigbuild zigbuild --release --locked --target $(TARGET) $(FOR_SIZE) $(EXTRA)

$(ZIG_DIR)/bin/cargo-zigbuild:
	python3 -m pip install --quiet --disable-pip-version-check --target $(ZIG_DIR) $(ZIG_PACKAGES)
