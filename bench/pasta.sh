#!/bin/bash
# Puts the newest Debian pasta and pesto under DIR/bin, with the C library that
# they were built for, so that they run beside this system's own:
#
#   bench/pasta.sh DIR && PASTA=DIR/bin/pasta go run ./bench
#
# The packages come from the mirror that this Debian system uses, from the suite
# $SUITE (sid). Needs root only where patchelf(1) is not installed.
set -euo pipefail
dir=$(realpath -m "${1:?usage: pasta.sh DIR}")
suite=${SUITE:-sid}
mkdir -p "$dir"/{lists/partial,bin,root}
chmod 755 "$dir"
command -v patchelf >/dev/null || { apt-get update -q && apt-get install -y -q patchelf; } >/dev/null

awk -v s="$suite" 'BEGIN {RS=""; ORS="\n\n"} !/-security/ {sub(/Suites: [^\n]*/, "Suites: " s); print}' \
  /etc/apt/sources.list.d/debian.sources >"$dir/debian.sources"
apt() {
  apt-get -q -o Dir::Etc::sourcelist="$dir/debian.sources" -o Dir::Etc::sourceparts=- \
    -o Dir::State::Lists="$dir/lists" -o APT::Sandbox::User=root "$@" >/dev/null
}
apt update
cd "$dir"
rm -f ./*.deb
apt download passt libc6
for deb in *.deb; do dpkg -x "$deb" root; done

loader=$(find "$dir/root" -name 'ld-linux-*.so.*' | head -1)
for program in pasta pasta.avx2 pesto; do
  cp -L "root/usr/bin/$program" bin/ 2>/dev/null || continue # not on every architecture
  patchelf --set-interpreter "$loader" --set-rpath "$(dirname "$loader")" "bin/$program"
done
bin/pasta --version | head -1
