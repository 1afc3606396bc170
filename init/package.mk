# Other architectures, `make install`, `make dist`, `make deb`. Included by the Makefile.

ARCHES = x86_64 i686 aarch64 armv7 arm mipsel mips riscv64

# `make cross ARCH=mips`, `make cross-all`: what `make` does, for routers. For some architectures
# Rust brings the C library and a linker along; for the others both come from zig, and the standard
# library has to be compiled with the program.
CROSS_RUSTUP = i686 aarch64
CROSS_ZIG    = armv7 arm mipsel mips riscv64
ZIG_DIR      = target/zig
ZIG_PACKAGES = cargo-zigbuild==0.24.0 ziglang==0.14.1
# what routes, lists, owners, containers and `apps` have added is in it
MAX_KIB      = 1536
# On MIPS the compiler describes each function to debuggers that are no more, and no linker drops it.
STRIP_mips    = -R .pdr
STRIP_mipsel  = $(STRIP_mips)
OBJCOPY       = LD_LIBRARY_PATH=$(SYSROOT)/lib $(wildcard $(SYSROOT)/lib/rustlib/*/bin/rust-objcopy)

.PHONY: cross cross-all cross-own cross-rustup cross-zig
HOW = $(or $(if $(filter $(ARCH),$(CROSS_RUSTUP)),rustup),$(if $(filter $(ARCH),$(CROSS_ZIG)),zig),own)
cross: cross-$(HOW)
	@test -n "$(filter $(ARCH),$(ARCHES))" || { echo "make: ARCH is one of $(ARCHES)" >&2; exit 1; }
	@size=$$(($$(stat -c %s $(BIN)) / 1024 + 1)); echo "$(ARCH): $$size KiB, $(BIN)"; \
	  case $(TARGET) in *-gnu) ;; *) test $$size -le $(MAX_KIB) || \
	    { echo "make: $$size KiB are more than the $(MAX_KIB) that a router is to spare" >&2; exit 1; } ;; esac

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
	$(if $(STRIP_$(ARCH)),$(OBJCOPY) $(STRIP_$(ARCH)) $(BIN))

$(ZIG_DIR)/bin/cargo-zigbuild:
	python3 -m pip install --quiet --disable-pip-version-check --target $(ZIG_DIR) $(ZIG_PACKAGES)

# `make install`, into DESTDIR if that is set; the work is done by a script that the archives hold
# too, for hosts without make.
DESTDIR    ?=
PREFIX     ?= /usr
SYSCONFDIR ?= /etc
INIT       ?= auto
INSTALL     = DESTDIR=$(DESTDIR) PREFIX=$(PREFIX) SYSCONFDIR=$(SYSCONFDIR) INIT=$(INIT) BIN=$(BIN) sh init/install.sh

.PHONY: install uninstall dist dist-all dist-source names deb deb-source init-test luci-test
install:
	@test -e $(BIN) || { echo "make: no $(BIN): run make first" >&2; exit 1; }
	$(INSTALL) install

uninstall:
	$(INSTALL) uninstall

# `make dist ARCH=mipsel`: an archive with the program, its configuration, services and install.sh.
# The same source gives the same bytes.
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
NAME    = cgtproxy-$(VERSION)-$(ARCH)
DATE    = $(or $(SOURCE_DATE_EPOCH),$(shell git log -1 --format=%ct),0)
dist: cross
	rm -rf target/dist/$(NAME)
	mkdir -p target/dist/$(NAME)/init
	cp $(BIN) README.md LICENSE init/install.sh target/dist/$(NAME)
	cp -r conf target/dist/$(NAME)
	cp -r init/openwrt init/openrc init/systemd target/dist/$(NAME)/init
	cd target/dist/$(NAME)/init/openwrt && rm -rf Makefile test.sh pictures luci-app-cgtproxy/Makefile luci-app-cgtproxy/po
	tar --sort=name --mtime=@$(DATE) --owner=0 --group=0 --numeric-owner --mode=a=rX,u+w --format=ustar \
	  -C target/dist -c $(NAME) | gzip -n9 > target/dist/$(NAME).tar.gz
	@sha256sum target/dist/$(NAME).tar.gz

dist-all:
	+for arch in $(ARCHES); do $(MAKE) --no-print-directory dist ARCH=$$arch || exit 1; done

# The source as feeds of OpenWrt, aports and Debian take it, and the hash for OpenWrt's Makefile.
SOURCE = target/dist/cgtproxy-$(VERSION).tar.gz
dist-source:
	mkdir -p target/dist
	git archive --prefix=cgtproxy-$(VERSION)/ HEAD | gzip -n9 > $(SOURCE)
	@sha256sum $(SOURCE)

# Version, address and maintainer from Cargo.toml into all packages.
names:
	init/names.sh

# A Debian package of the static program, for every Debian from 12 on; the same source gives the same
# bytes. init/debian describes it, and the source package below: what is packed is all that differs.
DEB_ARCH_x86_64 = amd64
DEB_ARCH_i686   = i386
DEB_ARCH_aarch64 = arm64
DEB_ARCH_armv7  = armhf
DEB_ARCH_arm    = armel
DEB_ARCH = $(or $(DEB_ARCH_$(ARCH)),$(ARCH))
STAGE    = target/deb/$(DEB_ARCH)
deb: cross debhelper
	rm -rf $(STAGE) target/deb/cgtproxy_*_$(DEB_ARCH).*
	mkdir -p $(STAGE)
	cp -r $(BIN) README.md conf init $(STAGE)
	cp -r init/debian $(STAGE)/debian
	cd $(STAGE) && env -u MAKEFLAGS -u MAKELEVEL SOURCE_DATE_EPOCH=$(DATE) PROGRAM=cgtproxy \
	  DEB_BUILD_OPTIONS="nocheck nostrip" \
	  dpkg-buildpackage -b -d -us -uc -a$(DEB_ARCH) > ../$(DEB_ARCH).log 2>&1 || { cat ../$(DEB_ARCH).log; exit 1; }
	@sha256sum target/deb/cgtproxy_*_$(DEB_ARCH).deb

# The source package, for dpkg-buildpackage with Debian's own Rust: the source, and the crates that it
# needs as a second archive. Nothing is fetched where it is built.
DSC      = target/deb/source
PACK     = tar --sort=name --mtime=@$(DATE) --owner=0 --group=0 --numeric-owner --mode=a=rX,u+w -C $(DSC)/cgtproxy-$(VERSION)
deb-source: dist-source debhelper
	rm -rf $(DSC)
	mkdir -p $(DSC)
	cp $(SOURCE) $(DSC)/cgtproxy_$(VERSION).orig.tar.gz
	tar -C $(DSC) -xf $(SOURCE)
	cd $(DSC)/cgtproxy-$(VERSION) && cargo vendor --quiet --locked > ../vendor.log
	$(PACK) -c vendor | xz -T1 > $(DSC)/cgtproxy_$(VERSION).orig-vendor.tar.xz
	cp -r $(DSC)/cgtproxy-$(VERSION)/init/debian $(DSC)/cgtproxy-$(VERSION)
	cd $(DSC)/cgtproxy-$(VERSION) && SOURCE_DATE_EPOCH=$(DATE) dpkg-source -b .
	rm -rf $(DSC)/cgtproxy-$(VERSION) $(DSC)/vendor.log

.PHONY: debhelper
debhelper:
	@$(call have,dh dpkg-buildpackage) || { test "$$(id -u)" = 0 || { echo "make: debhelper is missing; as root:" \
	    "apt-get install debhelper dpkg-dev" >&2; exit 1; }; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends debhelper dpkg-dev; }

# Services under their init systems, and the packages: needs root, and fetches Debian trees, once. With
# LUCI_DIR, a checkout of LuCI, its pages too, in Chromium; `make luci-test` has these alone, and leaves
# pictures of them in target/init/luci.
INIT_NEEDS = debootstrap busybox lintian $(LUCI_DIR:%=chromium)
init-test: build deps deb deb-source
	$(call have,$(INIT_NEEDS)) || { apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(INIT_NEEDS); }
	LUCI_DIR=$(LUCI_DIR) tests/init/run.sh

luci-test: build deps
	$(call have,busybox $(LUCI_DIR:%=chromium)) || { apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends busybox $(LUCI_DIR:%=chromium); }
	LUCI_DIR=$(LUCI_DIR) tests/init/run.sh luci

# `make build` and `make demo` on a fresh Debian 13, with the Rust that it has.
.PHONY: fresh-test
fresh-test:
	command -v debootstrap >/dev/null || { apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends debootstrap; }
	tests/init/run.sh fresh
