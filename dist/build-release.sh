#!/bin/sh
# Builds target/release/pontoon so that its bytes do not depend on where the source tree, cargo's home and the toolchain lie: their paths
# are replaced by names, in Rust and in C. Prints the SHA-256, for comparison with another build of the same source and Cargo.lock.
# Beside Rust and a C compiler it takes binutils' objcopy.
set -eu
cd "$(dirname "$0")/.."
here=$(pwd -P)
cargo_home=${CARGO_HOME:-$HOME/.cargo}
sysroot=$(rustc --print sysroot)

export RUSTFLAGS="--remap-path-prefix=$here=/pontoon --remap-path-prefix=$cargo_home=/cargo --remap-path-prefix=$sysroot=/rust"
# jemalloc and ring are C: they are built under the target directory, whose path else ends up in their debug information.
export CFLAGS="-ffile-prefix-map=$here=/pontoon -ffile-prefix-map=$cargo_home=/cargo"
export SOURCE_DATE_EPOCH=0 CARGO_INCREMENTAL=0
cargo build --release --locked -p pontoon-node "$@"
# Two things follow the place of the tree all the same: names that the compiler gives to what parts of a crate take from each other, and the
# build id, which is a hash over them. Nothing needs them: backtraces and profiles read the debug information.
out=${CARGO_TARGET_DIR:-target}/release/pontoon
objcopy --wildcard --strip-symbol='*.llvm.*' --remove-section=.note.gnu.build-id "$out" "$out.same"
mv "$out.same" "$out"
sha256sum "$out"
