"""Smoke runs of five experiments, one after another in one process, each as a user starts it.

As a command: python tests/whole_runs.py FOLDER NAME,NAME [FLAGS...]; the runs go to FOLDER/NAME.
"""

import sys

import elastic

from jaxgen import run as entry

# Sizes that divide over eight devices, and no other run that the evaluation needs.
_JUDGED = {"evaluation.classifier": "", "evaluation.num_samples": 16, "evaluation.batch_size": 16}
RUNS = {
    "ddpm": {**elastic.SMALL, **_JUDGED},
    "gan": {**_JUDGED, "gan.num_critic": 1, "model.num_levels": 1},
    "word2vec": {"data.num_streams": 8},
    "language_model": {"data.batch_size": 8, "evaluation.batch_size": 8, "evaluation.num_tokens": 100},
    "vae": {**_JUDGED, "evaluation.num_likelihood": 16},
}


def run_all(folder, names, *flags):
    """The named runs to their ends; raises where one fails."""
    for name in names:
        overrides = [
            f"--config.{field}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
            for field, value in RUNS[name].items()
        ]
        command = ["jaxgen.run", f"--config=experiments/{name}.py:smoke", f"--workdir={folder}/{name}"]
        assert entry.main([*command, *overrides, *flags]) == 0, name


if __name__ == "__main__":
    run_all(sys.argv[1], sys.argv[2].split(","), *sys.argv[3:])
