# Other kernels, under qemu. Included by the Makefile. See tests/vm/run.py.

GUESTS = amd64-6.1 amd64-6.12 i386-6.1 arm64-6.12 armhf-6.1 mipsel-6.1 riscv64-6.12

.PHONY: vm-test vm-test-be vm-quick vm-guests

# Builds the program and the guests' first process for the architectures of GUESTS.
vm-guests:
	+for arch in $$(python3 tests/vm/run.py --arches $(GUESTS)); do \
	  $(MAKE) --no-print-directory cross ARCH=$$arch EXTRA="--bin cgtproxy --example guest" || exit 1; done

vm-test: vm-guests
	python3 tests/vm/run.py $(GUESTS) amd64-5.10

# Part of `make test`: one 32-bit guest, where cgroup ids are wider than inode numbers.
vm-quick:
	+@if command -v qemu-system-x86_64 >/dev/null || test -e target/vm/qemu/done; \
	  then $(MAKE) --no-print-directory vm-guests GUESTS=i386-6.1 && python3 tests/vm/run.py i386-6.1; \
	  else echo "SKIP: no 32-bit kernel is tested: no qemu-system-x86_64 (make vm-test fetches it)"; fi
