"""The memory that word2vec takes for texts of growing size: encoding and training, peak and slope.

  python -m benchmarks.word2vec_memory [--sizes=0.25,0.5,1] [--epochs=1] [--folder=DIR] [--quick] [--record]

For each size in GB it makes a text of words with Zipf frequencies (300,000 kinds, of which the vocabulary
keeps its 100,000; lines of 20 words; 16 million words, repeated until there are enough), trains
`experiments/word2vec.py:file` on it in a process of its own as a user would, and reads that process's memory
many times a second. What counts is the memory that is the process's own (anonymous); pages of the encoded
text are mapped from its file and the system takes them back when it needs room, so they are shown apart.

Without --epochs all are trained on as many words, which takes as many steps. The last line of stdout is the
JSON object that is recorded: the peaks while encoding and while training, and the slopes of straight lines
through them, which times 10 are what a text of 10 GB takes more than an empty one. The disk of DIR must hold
three times the largest text. Of 10 GB, in an hour on 2 cores, and another for a whole epoch of training:

  python -m benchmarks.word2vec_memory --sizes=1,10 [--epochs=1] --folder=DIR
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import timing
from jaxgen.workdir import write_json

KINDS, LINE, BLOCK, BLOCKS = 300_000, 20, 50_000, 16  # words that there are; words a line; lines a block
TRAINED = (
    16_000_000  # words trained on where no epochs are asked for: 120 steps, so that all there is happens
)
NAME = "word2vec_memory"


def make_text(path: Path, num_bytes: int, kinds: int) -> int:
    """Writes lines of words of Zipf's frequencies until the file has num_bytes; returns how many words."""
    rng = np.random.default_rng(0)
    words = np.array([f"wo{kind}" for kind in range(kinds)], dtype=object)
    blocks = []
    for _ in range(BLOCKS):
        # P(rank <= r) = log(r) / log(kinds): word frequencies go as 1 / rank.
        ranks = (kinds ** rng.random((BLOCK, LINE))).astype(np.int64) - 1
        blocks.append(("\n".join(" ".join(line) for line in words[ranks]) + "\n").encode())
    num_words = written = 0
    with path.open("wb") as file:
        while written < num_bytes:
            written += file.write(blocks[num_words // (BLOCK * LINE) % BLOCKS])
            num_words += BLOCK * LINE
    return num_words


def memory_of(pid: int) -> tuple[int, int]:
    """(anonymous, mapped from files): bytes of a process in memory now; zeros where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    found = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}
    return 1024 * found.get("RssAnon", 0), 1024 * found.get("RssFile", 0)


def measure(size: float, epochs: float | None, folder: Path, kinds: int) -> dict[str, Any]:
    """Trains on a text of `size` GB and returns the peaks in MB, the words and the seconds."""
    text = folder / f"text_{size:g}.txt"
    num_words = make_text(text, int(size * 1e9), kinds)
    epochs = epochs or TRAINED / num_words
    command = [
        *(sys.executable, "-m", "jaxgen.run", "--config=experiments/word2vec.py:file"),
        *(f"--config.data.path={text}", f"--workdir={folder / 'run'}", f"--config.train.epochs={epochs}"),
        *("--config.data.min_count=5", "--config.data.num_streams=32", "--config.data.stretch=4096"),
    ]
    environment = {**os.environ, "JAXGEN_CACHE_DIR": str(folder / "cache"), "JAXGEN_DATA_DIR": ""}
    start, peaks, mapped, phase = time.perf_counter(), {"encoding": 0, "training": 0}, 0, "encoding"
    with (folder / "log.txt").open("w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                own, shared = memory_of(process.pid)
                if phase == "encoding" and any((folder / "cache").glob("corpora/*/corpus.json")):
                    phase = "training"
                peaks[phase], mapped = max(peaks[phase], own), max(mapped, shared)
                time.sleep(0.02)
        finally:
            process.kill()
        if process.returncode:
            raise SystemExit((folder / "log.txt").read_text()[-2000:])
    seconds = time.perf_counter() - start
    for name in ("run", "cache"):
        shutil.rmtree(folder / name)
    text.unlink()
    found = {
        "gigabytes": size,
        "words": num_words,
        **{f"{name}_mb": round(peak / 1e6) for name, peak in peaks.items()},
        "mapped_mb": round(mapped / 1e6),
        "seconds": round(seconds, 1),
    }
    print(found, flush=True)
    return found


def main() -> None:
    """Measures all sizes and prints the slope."""
    flags = timing.parser(__doc__ or "")
    flags.add_argument("--sizes", default="0.25,0.5,1", help="of the texts, in GB")
    flags.add_argument("--epochs", type=float, help="of training; all is encoded whatever it is")
    flags.add_argument("--folder", type=Path, help="where the texts are made, in a folder of their own")
    asked = flags.parse_args()
    sizes = [0.02, 0.04] if asked.quick else [float(size) for size in asked.sizes.split(",")]
    kinds = 10_000 if asked.quick else KINDS  # a short text does not have all of the many
    if not Path("/proc/self/status").exists():
        raise SystemExit("this benchmark reads /proc/PID/status, which this system does not have.")
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        cases = {f"{size:g} GB": measure(size, asked.epochs, Path(folder), kinds) for size in sizes}
    slopes = {}
    if len(sizes) > 1:
        for name in ("encoding_mb", "training_mb"):
            slopes[name] = float(np.polyfit(sizes, [case[name] for case in cases.values()], 1)[0])
        print("MB of its own memory for each GB of text:", slopes)
    contents = {"cases": cases, "mb_per_gb": slopes, "epochs": asked.epochs, "hardware": timing.hardware()}
    if asked.record:
        write_json(timing.RESULTS / f"{NAME}.json", contents)
    print(json.dumps(contents), flush=True)


if __name__ == "__main__":
    main()
