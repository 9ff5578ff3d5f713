"""Everything in harness.py befalls the smoke preset of every experiment; the table is printed at the end.

  sh launch/test_slow.sh tests/faults -n 0 [-k "ddpm and sigkill"]

JAXGEN_FAULTS_KILLS says how many times each run is killed (20); JAXGEN_FAULTS_TABLE names a file that gets
each line of the table as soon as it is known. A new experiment is found by its file.
"""

import harness
import numpy as np
import pytest

from jaxgen import cli

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=cli.experiment_names())
def whole(request, tmp_path_factory):
    return harness.Undisturbed(request.param, tmp_path_factory.mktemp("whole") / request.param)


@pytest.mark.parametrize("fault", harness.FAULTS, ids=lambda fault: fault.__name__)
def test_a_run_survives(whole, fault, tmp_path):
    seed = int(np.random.SeedSequence().generate_state(1)[0])  # other moments at every run of the test
    outcomes = fault(whole, tmp_path, np.random.default_rng(seed))
    if outcomes is None:
        pytest.skip("this user may not make a mount namespace")
    outcomes = outcomes if isinstance(outcomes, list) else [outcomes]
    harness.note(outcomes)
    for outcome in outcomes:
        assert outcome.survived == outcome.tried > 0, f"{outcome} (seed {seed})"
