"""Sequence networks against PyTorch and transformers: training a Transformer and an LSTM, cached decoding.

`python -m benchmarks.sequences [--quick] [--record]`. Both sides run the same architecture (the Transformers
on the same weights), in the same run, alternating. On CPU in float32; on a GPU in bfloat16, and the share of
the device's peak is printed. The prompt's prefill is a case of its own, and the table's last column has the
first call of each side, with compilation.

The floor, printed for this machine before decoding: a trained token costs 6 operations a weight and what
attention adds; a decoded token of one sequence has to read all weights once, so it can take no less than
their bytes over the memory's bandwidth; with 16 sequences a token costs 2 operations a weight as well.

What the training of the Transformer took on two cores, by the clock: 440 ms an update at first; 346 ms with
linear layers on two axes (`models.dense`; products of 1024 x 384 by 384 x 1152 reach 445 GFLOP/s here, with
three axes the gradients do not); 329 ms with the division of the softmax last. The norms of gradient, update
and parameters, which our step reports and the peer's does not, are within the noise. The small LSTM: 61 ms,
38 ms with freed memory kept (`jaxgen.memory`; the peer 45 and 42). Decoding 16 sequences: a choice of 50,257
tokens by argmax takes 1.9 ms, by two reductions 0.7; of the 40 ms of a step the products take half, reading
keys and values at two thirds of the memory's bandwidth most of the other half. Keys before queries, or the
scores without their maximum subtracted, made no difference.

On two cores of an Intel Xeon: products of 1024 x 384 by 384 x 1536 run at 290 GFLOP/s under XLA, by its own
kernels or by Eigen's, and at 340 under PyTorch; those of a Transformer's update alone take 224 ms at XLA's
rate, PyTorch's whole update 310, so that 1.3 is out of reach. Attention on 24 heads of 256 x 64, forwards and
backwards, takes 11 ms against 7 (keys before queries 11, in chunks of heads 18). Pages that are cleared anew
for buffers above 64 MiB take a twelfth of the update: with one arena for all threads (`jaxgen.memory`) 468 ms
become 430, with huge pages 410.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import timing
from benchmarks.timing import Case, compare
from jaxgen import memory
from jaxgen.interop.gpt2 import gpt2_from_config, load_gpt2
from jaxgen.models.language_model import RecurrentLM
from jaxgen.models.transformer import TransformerLM
from jaxgen.samplers.autoregressive import chooser, decode_chain
from jaxgen.samplers.chain import run_chain
from jaxgen.systems import gradient_system
from jaxgen.types import Mean, System

PEAK_TFLOPS = {"H100 PCIe": 756.0, "H100": 989.4, "H200": 989.4, "A100": 312.0}


class TransformerSetting(NamedTuple):
    """A GPT-2 of some size, and how it is trained."""

    vocab: int = 65
    width: int = 384
    layers: int = 6
    heads: int = 6
    length: int = 256
    batch: int = 4
    steps: int = 1  # updates a call

    @property
    def config(self) -> dict[str, Any]:
        """As transformers has it. This name of the activation is the one PyTorch fuses."""
        return {
            "vocab_size": self.vocab,
            "n_embd": self.width,
            "n_layer": self.layers,
            "n_head": self.heads,
            "n_positions": self.length,
            "activation_function": "gelu_pytorch_tanh",
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "bos_token_id": 0,
            "eos_token_id": None,
        }


class LSTMSetting(NamedTuple):
    """Zaremba's language model without dropout: truncated back-propagation with the state carried on."""

    vocab: int = 10_000
    hidden: int = 200
    layers: int = 2
    unroll: int = 20
    batch: int = 20
    steps: int = 5


CHAR = TransformerSetting()  # nanoGPT's model of characters
GPT2 = TransformerSetting(vocab=50257, width=768, layers=12, heads=12, length=1024)
PTB_SMALL = LSTMSetting()
PTB_MEDIUM = LSTMSetting(hidden=650, unroll=35, steps=1)


class Pair(NamedTuple):
    """One call of each side, and the work that it does."""

    ours: Callable[[], object]
    peer: Callable[[], object]
    work: float


def transformer_training(setting: TransformerSetting, device: str, bfloat16: bool) -> Pair:
    """Updates with AdamW; a call trains on steps * batch * length tokens."""
    import torch

    dtype = jnp.bfloat16 if bfloat16 else jnp.float32
    theirs = peer_gpt2(setting, device)
    model = gpt2_from_config(setting.config, dtype=dtype)
    batch = _tokens(setting.vocab, setting.batch, setting.length + 1)

    def apply(params: Any, carry: Any, tokens: jax.Array) -> Any:
        return model.apply({"params": params}, tokens), carry

    system = _system(apply, lambda key: _params(model, theirs), optax.adamw(3e-4, b2=0.99, weight_decay=0.1))
    ours = _trainer(system, {"tokens": jnp.asarray(batch)}, setting.steps)

    compiled = torch.compile(theirs) if device == "cuda" else theirs
    optimizer = torch.optim.AdamW(
        theirs.parameters(), lr=3e-4, betas=(0.9, 0.99), weight_decay=0.1, fused=True
    )
    tokens = torch.tensor(batch, dtype=torch.int64, device=device)

    def peer() -> None:
        for _ in range(setting.steps):
            with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
                logits = compiled(tokens[:, :-1], use_cache=False).logits.float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        _wait(device)

    return Pair(ours, peer, setting.steps * setting.batch * setting.length)


def lstm_training(setting: LSTMSetting, device: str, bfloat16: bool) -> Pair:
    """Updates by SGD with the gradient clipped to norm 5, the state passed from one to the next."""
    import torch

    model = RecurrentLM(
        setting.vocab,
        setting.hidden,
        setting.hidden,
        setting.layers,
        init_scale=0.1,
        dtype=jnp.bfloat16 if bfloat16 else jnp.float32,
    )
    batch = _tokens(setting.vocab, setting.batch, setting.unroll + 1)

    def apply(params: Any, carry: Any, tokens: jax.Array) -> Any:
        return model.apply({"params": params}, tokens, carry)

    system = _system(
        apply,
        lambda key: model.init(key, jnp.asarray(batch[:, :-1]))["params"],
        optax.chain(optax.clip_by_global_norm(5.0), optax.sgd(1.0)),
        model.initial_carry(setting.batch),
    )
    ours = _trainer(system, {"tokens": jnp.asarray(batch)}, setting.steps)

    class Peer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(setting.vocab, setting.hidden)
            self.lstm = torch.nn.LSTM(setting.hidden, setting.hidden, setting.layers, batch_first=True)
            self.head = torch.nn.Linear(setting.hidden, setting.vocab)

        def forward(self, tokens: Any, state: Any) -> Any:
            y, state = self.lstm(self.embedding(tokens), state)
            return self.head(y), state

    torch.manual_seed(0)
    theirs = Peer().to(device)
    for parameter in theirs.parameters():
        torch.nn.init.uniform_(parameter, -0.1, 0.1)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=1.0)
    tokens = torch.tensor(batch, dtype=torch.int64, device=device)
    zeros = torch.zeros(setting.layers, setting.batch, setting.hidden, device=device)
    state = (zeros, zeros)

    def peer() -> None:
        nonlocal state
        for _ in range(setting.steps):
            with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
                logits, state = theirs(tokens[:, :-1], tuple(s.detach() for s in state))
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), 5.0)
            optimizer.step()
        _wait(device)

    return Pair(ours, peer, setting.steps * setting.batch * setting.unroll)


class Decoders:
    """A GPT-2 of random weights on both sides, for the cases of decoding."""

    def __init__(self, setting: TransformerSetting, device: str, bfloat16: bool) -> None:
        import torch

        self.setting, self.device = setting, device
        theirs = peer_gpt2(setting, device).eval()
        dtype = jnp.bfloat16 if bfloat16 else jnp.float32
        self.model = gpt2_from_config(setting.config, dtype=dtype, param_dtype=dtype)
        # Given to the compiled functions as an argument: a constant would be folded into the program.
        self.params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), _params(self.model, theirs))
        self.theirs = theirs.to(torch.bfloat16) if bfloat16 else theirs
        self.theirs.generation_config.pad_token_id = 0

    def prefill(self, batch: int, length: int) -> Pair:
        """One pass over prompts with the cache filled and the next token's logits alone."""
        import torch

        prompt = _tokens(self.setting.vocab, batch, length)
        run = jax.jit(
            lambda params, tokens: self.model.apply(
                {"params": params}, tokens, jnp.full(batch, length), cache_length=length, method="prefill"
            )
        )
        ours_tokens = jnp.asarray(prompt)
        tokens = torch.tensor(prompt, dtype=torch.int64, device=self.device)

        def peer() -> None:
            with torch.no_grad():
                self.theirs(tokens, use_cache=True, logits_to_keep=1)
            _wait(self.device)

        return Pair(lambda: jax.block_until_ready(run(self.params, ours_tokens)), peer, float(batch * length))

    def decode(self, batch: int, prompt_length: int, new_tokens: int) -> Pair:
        """Greedy decoding of `new_tokens` after a short prompt, whose prefill is in both sides' time."""
        import torch

        prompt = _tokens(self.setting.vocab, batch, prompt_length)

        @jax.jit
        def run(params: Any, tokens: jax.Array, key: jax.Array) -> jax.Array:
            variables = {"params": params}
            chain = decode_chain(
                lambda tokens, lengths: self.model.apply(
                    variables, tokens, lengths, cache_length=prompt_length + new_tokens, method="prefill"
                ),
                lambda cache, token, position: self.model.apply(
                    variables, cache, token, position, method="step"
                ),
                tokens,
                jnp.full(batch, prompt_length),
                max_new_tokens=new_tokens,
                choose=chooser(temperature=0.0),
            )
            return run_chain(chain, key, jnp.arange(batch), (new_tokens,))

        ours_tokens, key = jnp.asarray(prompt), jax.random.key(0)
        tokens = torch.tensor(prompt, dtype=torch.int64, device=self.device)
        everything = torch.ones_like(tokens)
        made: dict[str, np.ndarray] = {}

        def ours() -> None:
            made["ours"] = np.asarray(run(self.params, ours_tokens, key))

        def peer() -> None:
            with torch.no_grad():
                out = self.theirs.generate(
                    tokens,
                    attention_mask=everything,
                    do_sample=False,
                    max_new_tokens=new_tokens,
                    min_new_tokens=new_tokens,
                )
            made["peer"] = out[:, prompt_length:].cpu().numpy()

        ours()
        peer()
        # With random weights the best tokens are near ties, which rounding decides: the first is asked for.
        if made["ours"].shape != made["peer"].shape or (
            self.device == "cpu" and not np.array_equal(made["ours"][:, 0], made["peer"][:, 0])
        ):
            raise AssertionError("the two sides decode different things")
        return Pair(ours, peer, float(batch * new_tokens))


def peer_gpt2(setting: TransformerSetting, device: str) -> Any:
    """transformers' GPT-2 of random weights, with PyTorch's fused attention."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config: dict[str, Any] = {**setting.config, "attn_implementation": "sdpa"}
    model: Any = GPT2LMHeadModel(GPT2Config(**config))
    return model.to(device)


def floor(decoders: Decoders, rounds: int = 5) -> dict[str, float]:
    """What this machine gives, and the most decoded tokens a second that follow from it."""
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(decoders.params)) / 1e9
    table = decoders.params["embedding"]["embedding"]
    square = jnp.ones((1024, 1024), table.dtype)
    read, multiply = jax.jit(lambda a, x: a @ x), jax.jit(lambda a: a @ a)
    x = jnp.ones(table.shape[1], table.dtype)
    bandwidth = table.nbytes / 1e9 / _least(lambda: jax.block_until_ready(read(table, x)), rounds)
    rate = 2 * 1024**3 / 1e9 / _least(lambda: jax.block_until_ready(multiply(square)), rounds)
    return {
        "weights read for a token, GB": weights,
        "bandwidth of a matrix times a vector, GB/s": bandwidth,
        "products of 1024 x 1024, GFLOP/s": rate,
        "floor of decoding batch 1, tokens/s": bandwidth / weights,
    }


def training_gflops_per_token(setting: TransformerSetting | LSTMSetting) -> float:
    """Products alone: 6 operations a weight (forward and both gradients), and attention's two products."""
    if isinstance(setting, LSTMSetting):
        weights = setting.layers * 8 * setting.hidden**2 + setting.vocab * setting.hidden
        return 6e-9 * weights
    weights = setting.layers * 12 * setting.width**2 + setting.vocab * setting.width
    return 6e-9 * (weights + setting.layers * 2 * setting.length * setting.width)


def main() -> None:
    """Run, print and record."""
    parser = timing.parser(__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="run the cases whose names begin so")
    args = parser.parse_args()
    timing.require("torch", "transformers")
    import torch

    on_gpu = jax.default_backend() != "cpu"
    if on_gpu and not torch.cuda.is_available():
        print("JAX runs on a GPU here but PyTorch does not: install a CUDA build of torch.", file=sys.stderr)
        raise SystemExit(2)
    device = "cuda" if on_gpu else "cpu"
    char, small, medium = CHAR, PTB_SMALL, PTB_MEDIUM
    if on_gpu:  # one wait for the device per ten updates, as in training
        char, small, medium = (
            CHAR._replace(batch=64, steps=10),
            small._replace(steps=10),
            medium._replace(steps=10),
        )
    new_tokens = 32 if args.quick else 64
    limits: dict[str, Any] = {"rounds": 3 if args.quick else 9, "seconds": 12.0 if args.quick else 90.0}
    cases: list[Case] = []
    notes: dict[str, Any] = {"precision": "bfloat16" if on_gpu else "float32"}

    def run(name: str, make: Callable[[], Pair], goal: float | None) -> None:
        if name.startswith(args.only):
            pair = make()
            cases.append(
                compare(name, pair.ours, pair.peer, work=pair.work, unit="tokens/s", goal=goal, **limits)
            )
            print(timing.table(cases[-1:]).splitlines()[-1], flush=True)

    run("train_transformer", lambda: transformer_training(char, device, on_gpu), 1.3)
    run("train_lstm_small", lambda: lstm_training(small, device, on_gpu), 1.0)
    run("train_lstm_medium", lambda: lstm_training(medium, device, on_gpu), 1.0)
    decoding = ("prefill", "decode")
    if any(name.startswith(args.only[:6]) for name in decoding):
        decoders = Decoders(GPT2, device, on_gpu)
        notes["floor"] = {what: float(f"{value:.4g}") for what, value in floor(decoders).items()}
        for what, value in notes["floor"].items():
            print(f"{what}: {value:g}", flush=True)
        for batch in (1, 16):
            run(f"decode_batch_{batch}", partial(decoders.decode, batch, 8, new_tokens), 2.0)
        run("prefill_1x256", lambda: decoders.prefill(1, 256), None)
    gflops: dict[str, TransformerSetting | LSTMSetting] = {
        "train_transformer": char,
        "train_lstm_small": small,
        "train_lstm_medium": medium,
    }
    peak = next((p for n, p in PEAK_TFLOPS.items() if n in jax.devices()[0].device_kind), None)
    for case in cases:
        if case.name in gflops:
            work = training_gflops_per_token(gflops[case.name])
            reached = {side: work * case.summary()[side] for side in ("ours", "peer")}
            notes[f"{case.name}, GFLOP/s"] = {side: round(rate, 1) for side, rate in reached.items()}
            print(f"{case.name}: {work:.3g} GFLOP a token, {notes[f'{case.name}, GFLOP/s']} GFLOP/s")
            if peak is not None:
                notes[f"{case.name}, share of peak"] = {
                    s: round(r / peak / 1e3, 4) for s, r in reached.items()
                }
                print(f"of the peak of {peak:g} TFLOP/s: {notes[f'{case.name}, share of peak']}")
    timing.report("sequences", cases, ("torch", "transformers"), args.record, notes)


def _params(model: TransformerLM, theirs: Any) -> Any:
    tensors = {name: tensor.detach().cpu().numpy() for name, tensor in theirs.state_dict().items()}
    like = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))["params"]
    return jax.tree.map(jnp.asarray, load_gpt2(tensors, like))


def _system(
    apply: Callable[[Any, Any, jax.Array], Any],
    init_params: Callable[[jax.Array], Any],
    optimizer: optax.GradientTransformation,
    carry: Any = None,
) -> System:
    """The next token's cross-entropy, trained as the experiments are; the carry is the model's state."""

    def loss(params: Any, carry: Any, batch: Any, key: jax.Array) -> Any:
        logits, carry = apply(params, carry, batch["tokens"][:, :-1])
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:])
        return jnp.mean(nats), ({"loss": Mean.of(nats)}, carry)

    return gradient_system(lambda key, batch: (init_params(key), carry), loss, optimizer)


def _trainer(system: System, batch: Any, steps: int) -> Callable[[], object]:
    state = system.init(jax.random.key(0), batch)
    state = jax.tree.map(jnp.copy, state)
    step = jax.jit(system.step, donate_argnums=0)

    def train() -> None:
        nonlocal state
        for _ in range(steps):
            state, metrics = step(state, batch)
        jax.block_until_ready(metrics)

    return train


def _tokens(vocab: int, batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab, (batch, length)).astype(np.int32)


def _wait(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def _least(call: Callable[[], object], rounds: int) -> float:
    call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    memory.keep_freed_memory()  # as jaxgen.run does; both sides gain
    # JAX would take three quarters of a GPU's memory at once and leave too little for the peer.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.45")
    main()
