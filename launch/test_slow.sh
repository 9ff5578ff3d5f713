#!/bin/sh
# The tests that take minutes each, set-up included; arguments go to pytest.
set -eu
exec sh "$(dirname -- "$0")/test.sh" -m slow "$@"
