#!/bin/sh
# The tests on this machine, set-up included; arguments go to pytest.
#
#   sh launch/test.sh                        all tests but those marked slow
#   sh launch/test.sh tests/samplers -x -n 0     some, in one process (two are used unless told otherwise)
#
# The comparisons with PyTorch and diffusers need the extra `peers`. It is installed where pip offers PyTorch's CPU
# build; elsewhere those tests are skipped and say so. JAXGEN_PEERS=1 installs it whatever its size, 0 never does.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/launch/setup.sh"
if wants_peers; then set_up test peers; else set_up test; fi

cd "$root"
exec "$python" -m pytest -n 2 --dist loadfile "$@"
