#!/usr/bin/env bash
# Builds the test programs of csrc (conformance, examples, detectors) and emulator.a, with g++ alone,
# and prints the folder they are in: under build/, one for each state of the sources.
#
#   scripts/conformance.sh [--sanitize]
#
# --sanitize  with AddressSanitizer and UndefinedBehaviorSanitizer
# CXX names the compiler; MAX_JOBS how many run at once (default 2).
set -euo pipefail
cd "$(dirname "$0")/.."

flags=(-std=c++17 -O1 -Wall -Wextra -Wno-psabi -DALMOSTGPT_EMULATOR -I csrc)
suffix=""
case ${1:-} in
  "") ;;
  --sanitize)
    flags+=(-g -fsanitize=address,undefined -fno-sanitize-recover=all)
    suffix=-sanitized
    ;;
  *)
    echo "usage: scripts/conformance.sh [--sanitize]" >&2
    exit 2
    ;;
esac
cxx=${CXX:-g++}

state=$({ "$cxx" --version; cat scripts/conformance.sh; echo "${flags[@]}"; find csrc/device csrc/tests -type f -name '*.[chi]*' | sort |
  xargs sha256sum; } | sha256sum)
folder=build/conformance$suffix-${state:0:16}
if [[ ! -d $folder ]]; then
  mkdir -p build
  work=$(mktemp -d -p build conformance-work.XXXXXX)
  trap 'rm -rf "$work"' EXIT
  # The largest files first, so that no compiler is left working alone.
  sources=$(ls -S csrc/tests/conformance*.cu csrc/tests/*.cpp csrc/device/emulator/*.cpp)
  export work cxx
  # shellcheck disable=SC2016
  xargs -P "${MAX_JOBS:-2}" -I {} bash -c \
    'source=$1 && shift && exec "$cxx" "$@" -x c++ -c "$source" -o "$work/$(basename "$source").o"' \
    compile {} "${flags[@]}" <<<"$sources" >&2
  for source in csrc/device/emulator/*.cpp; do
    ar rcs "$work/emulator.a" "$work/$(basename "$source").o"
  done
  "$cxx" "${flags[@]}" "$work"/conformance*.cu.o "$work/emulator.a" -o "$work/conformance"
  for source in csrc/tests/*.cpp; do
    program=$(basename "$source" .cpp)
    "$cxx" "${flags[@]}" "$work/$program.cpp.o" "$work/emulator.a" -o "$work/$program"
  done
  rm "$work"/*.o
  # Those of earlier states are of no use.
  rm -rf build/conformance"$suffix"-[0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f]*
  mv -T "$work" "$folder" 2> /dev/null || true # another process may have built the same meanwhile
fi
echo "$PWD/$folder"
