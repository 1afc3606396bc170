# Other kernels, under qemu. Included by the Makefile. See tests/vm/run.py.

GUESTS = amd64-6.1 amd64-6.12 i386-6.1 arm64-6.12 armhf-6.1 mipsel-6.1 riscv64

.PHONY: vm-test vm-test-be vm-quick vm-guests vm-bench vm-it

# Builds the program and the guests' first process for the architectures of GUESTS.
vm-guests:
	+for arch in $$(python3 tests/vm/run.py --arches $(GUESTS)); do \
	  $(MAKE) --no-print-directory cross ARCH=$$arch EXTRA="--bin cgtproxy --example guest" || exit 1; done

vm-test: vm-guests
	python3 tests/vm/run.py $(GUESTS) amd64-5.10

# What a packet and a new cgroup cost on routers' processors, in instructions, beside the same without
# the program: into tests/bench/guests.json.
COUNTED = armhf-6.1 mipsel-6.1
vm-bench:
	+$(MAKE) --no-print-directory vm-guests GUESTS="$(COUNTED)"
	python3 tests/vm/run.py --figures $(COUNTED)

# Part of `make test`: one 32-bit guest, where cgroup ids are wider than inode numbers.
vm-quick:
	+@if command -v qemu-system-x86_64 >/dev/null || test -e target/vm/qemu/done; \
	  then $(MAKE) --no-print-directory vm-guests GUESTS=i386-6.1 && python3 tests/vm/run.py i386-6.1; \
	  else echo "SKIP: no 32-bit kernel is tested: no qemu-system-x86_64 (make vm-test fetches it)"; fi

# Integration tests, `real::` too, on a guest's kernel with all its modules and with this machine's
# files: `make vm-it GUEST=amd64-6.12 TESTS="real::tunnel --ignored"`. Emulated, so some twenty times
# slower than here; what a test measures means nothing.
GUEST = amd64-6.12
vm-it: build deps
	$(call have,depmod qemu-system-x86_64) && test -x /bin/busybox || { apt-get update -qq && \
	  apt-get install -y -qq --no-install-recommends kmod busybox-static qemu-system-x86; }
	it=$$(cargo test --locked --test it --no-run 2>&1 | sed -n 's/^ *Executable .*(\(.*\))$$/\1/p') && \
	  python3 tests/vm/run.py --host $(GUEST) "CGTPROXY_BIN=$(abspath $(BIN)) ONLY='$(ONLY)' \
	    PATH=/usr/sbin:/usr/bin:/sbin:/bin $(abspath .)/$$it --nocapture $(TESTS)"

# Big-endian MIPS, as ath79 routers are. Debian has no such kernel, so one is built, once; that
# takes some minutes, and installs a cross compiler if there is none.
BE_KERNEL = target/vm/mips-6.1/boot/vmlinux
.PHONY: vm-test-be
vm-test-be: $(BE_KERNEL)
	+$(MAKE) --no-print-directory vm-guests GUESTS=mips-6.1
	python3 tests/vm/run.py mips-6.1

$(BE_KERNEL): tests/vm/mips-be.config
	$(call have,mips-linux-gnu-gcc bc flex bison) || { apt-get update -qq && \
	  apt-get install -y -qq --no-install-recommends gcc-mips-linux-gnu bc flex bison libssl-dev; }
	mkdir -p target/vm/mips-6.1/boot
	cd target/vm/mips-6.1 && apt-get download -qq linux-source-6.1 && dpkg-deb -x linux-source-6.1*.deb . && \
	  rm -f linux-source-6.1*.deb && tar -xf usr/src/linux-source-6.1.tar.xz && rm -r usr
	cd target/vm/mips-6.1/linux-source-6.1 && cp $(CURDIR)/tests/vm/mips-be.config allno.config && \
	  for goal in allnoconfig vmlinux; do \
	    env -u MAKEFLAGS -u MAKELEVEL KCONFIG_ALLCONFIG=allno.config \
	      nice make -s ARCH=mips CROSS_COMPILE=mips-linux-gnu- $$goal || exit 1; done
	mv target/vm/mips-6.1/linux-source-6.1/vmlinux $@
	rm -r target/vm/mips-6.1/linux-source-6.1
