"""Mode plan: costs counted from programs whose costs are known, the model by hand, refusals in a sentence."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from command import ROOT, environment

from jaxgen import cli, plan, run

CHIP = plan.Chip("made up", {"float32": 1e12}, 1e9, 1e11, 1e10, 4, 1e9, "this test")


def _product(x, y):
    return x @ y


X, Y = jnp.zeros((8, 32)), jnp.zeros((32, 32))
ONE = 2 * 8 * 32 * 32  # FLOPs of a product: a multiplication and an addition each


def test_flops_of_a_product():
    assert plan.count_flops(_product, X, Y) == ONE


def test_a_scan_counts_as_often_as_it_runs_and_a_scan_in_a_scan_too():
    def inner(x, _):
        return x @ Y, None

    def outer(x, _):
        return jax.lax.scan(inner, x, None, length=3)[0] @ Y, None

    def looped(x):
        return jax.jit(lambda x: jax.lax.scan(outer, x, None, length=5)[0])(x) @ Y

    # Whatever else the analysis counts (the loops' counters) is far less than one product.
    assert plan.count_flops(looped, X) == pytest.approx((5 * (3 + 1) + 1) * ONE, rel=1e-3)


def test_where_the_cpu_has_a_way_of_its_own_the_accelerators_is_counted():
    def make_step():  # JAX remembers what it traced of a function
        return lambda x: jax.lax.platform_dependent(x, cpu=lambda x: (x @ Y) @ Y, default=lambda x: x @ Y)

    with plan.written_for_accelerators():
        assert plan.count_flops(make_step(), X) == ONE
        assert jax.default_backend() != "cpu"
    assert plan.count_flops(make_step(), X) == 2 * ONE
    assert jax.default_backend() == "cpu"


def test_looking_up_rows_does_not_count_as_reading_the_table():
    table, rows = jnp.zeros((4096, 8)), jnp.arange(4)
    read = plan._count("bytes accessed", jax.make_jaxpr(lambda t, r: t[r])(table, rows))
    written = plan._count("bytes accessed", jax.make_jaxpr(lambda t, r: t.at[r].add(1.0))(table, rows))
    assert 4 * 8 * 4 <= read < 4096
    assert 4 * 8 * 4 <= written < 4096 < table.nbytes


HLO = """HloModule jit_step, is_scheduled=true, num_partitions=8

%body.1 (p.1: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p.1 = (s32[], f32[4,8]{1,0}) parameter(0)
  %in-loop = f32[4,8]{1,0} all-reduce(%x), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
}

%condition.1 (p.2: (s32[], f32[4,8])) -> pred[] {
  %p.2 = (s32[], f32[4,8]{1,0}) parameter(0)
}

ENTRY %main.2_spmd (param.0: f32[10,10]) -> f32[10,10] {
  %a = (f32[10,10]{1,0}, bf16[7]{0}, s32[]) all-reduce(%g, %h, %i), replica_groups=[1,8]<=[8], to_apply=%add
  %b = f32[16,2]{1,0} all-gather(%w), channel_id=3, replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
  %c = f32[2,2]{1,0} reduce-scatter(%h), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  %w0 = (s32[], f32[4,8]{1,0}) while(%t), condition=%condition.1, body=%body.1, \
backend_config={"known_trip_count":{"n":"3"}}
  %d = pred[5]{0} collective-permute(%m), source_target_pairs={{0,1},{1,0}}
  ROOT %r = f32[10,10]{1,0} copy(%e)
}
"""


def test_collectives_are_read_from_a_compiled_program():
    found = plan.read_collectives(HLO, data=4, model=2)
    assert sorted(found, key=lambda each: (each.kind, each.size)) == [
        plan.Collective("all-gather", 16 * 2 * 4, "model"),
        *[plan.Collective("all-reduce", 4 * 8 * 4, "data")] * 3,  # the loop runs three times
        plan.Collective("all-reduce", 10 * 10 * 4 + 7 * 2 + 4, "all"),
        plan.Collective("collective-permute", 5, "all"),
        plan.Collective("reduce-scatter", 2 * 2 * 4 * 2, "model"),  # of what goes in
    ]


def test_rings_by_hand():
    # 4 chips in a domain: 2 x 3/4 of the array over links of 10 GB/s.
    assert plan.collective_seconds("all-reduce", 8e9, 4, CHIP) == pytest.approx(2 * 6e9 / 1e10)
    assert plan.collective_seconds("all-gather", 8e9, 4, CHIP) == pytest.approx(6e9 / 1e10)
    assert plan.collective_seconds("all-reduce", 8e9, 1, CHIP) == 0
    # 8 chips are 2 domains: then a quarter of the array, 2 GB, half of it passed on at 1 GB/s, and back.
    assert plan.collective_seconds("all-reduce", 8e9, 8, CHIP) == pytest.approx(2 * (6e9 / 1e10 + 1e9 / 1e9))


def _plan(cost, doubled, fsdp=1):
    return plan.Plan("x.py:y", CHIP, "float32", fsdp, 16, 2, 1000, cost, doubled)


def test_step_time_and_efficiencies_by_hand():
    talk = (plan.Collective("all-reduce", 1e10, "all"),)
    ours = _plan(plan.Cost(3e12, 1e10, 1e8, talk), plan.Cost(5e12, 2e10, 2e8, talk))
    assert ours.seconds(1, 16) == pytest.approx(3.0)  # bound by FLOPs: 3 s against 0.1 s
    assert ours.seconds(4, 16) == pytest.approx(3.0 + 2 * 0.75)
    assert ours.weak(4) == pytest.approx(3 / 4.5)
    # 4 rows a chip: 1e12 whatever the rows and 0.125e12 a row.
    assert ours.seconds(4, 4) == pytest.approx(1.5 + 1.5)
    assert ours.strong(4) == pytest.approx(3 / (4 * 3))
    slow = _plan(plan.Cost(1e9, 4e11, 1e8), plan.Cost(2e9, 8e11, 2e8))
    assert slow.seconds(1, 16) == pytest.approx(4.0)  # bound by memory
    text = slow.text([1, 8, 512])
    assert "bound by memory traffic" in text
    assert [line.split()[0] for line in text.splitlines()[5:8]] == ["1", "8", "512"]
    assert "–" in text.splitlines()[7]  # 16 rows do not divide over 512 chips


def test_what_is_exchanged_for_the_rows_grows_with_rows_and_chips():
    """Measured on 2 devices: a gradient of 100 bytes, and 64 bytes for 2 x 16 rows, which is 2 a row."""
    once, twice = (
        plan.Cost(
            1e12,
            0,
            1e8,
            (plan.Collective("all-reduce", 100, "all"), plan.Collective("all-gather", size, "all")),
        )
        for size in (64, 128)
    )
    ours = _plan(once, twice)
    assert ours.talk(2, 16) == {("all-reduce", "all"): 100, ("all-gather", "all"): 64}
    assert ours.talk(8, 4) == {("all-reduce", "all"): 100, ("all-gather", "all"): 8 * 4 * 2}


def test_what_does_not_fit_is_said_with_what_to_change():
    small, large = plan.Cost(1, 1, 5e8), plan.Cost(1, 1, 6e8)
    assert _plan(small, large).advice() == "It fits: 0.5 GB of a chip's 1 GB."
    # 0.4 GB and 0.1 GB a row: 6 rows fit; parts of 16 rows are 8, 4, ...
    rows = _plan(plan.Cost(1, 1, 2e9), plan.Cost(1, 1, 3.6e9)).advice()
    assert "NOT fit" in rows
    assert "at most 6 a chip" in rows
    assert "accumulate=4" in rows
    # 3 GB of state on one chip of 1 GB: 4 chips hold it.
    state = _plan(plan.Cost(1, 1, 3.16e9), plan.Cost(1, 1, 3.32e9)).advice()
    assert "--fsdp=4" in state


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--chip=v5q"], ["unknown chip 'v5q'", "did you mean"]),
        (["--chips=0"], ["--chips"]),
        (["--chips=many"], ["--chips"]),
        (["--chips=6", "--fsdp=4"], ["--fsdp=4 does not divide --chips=6"]),
        (["--config.num_seeds=2"], ["num_seeds"]),
    ],
)
def test_refusals(flags, words, capsys):
    source = "--config=experiments/classifier.py:smoke"
    assert run.main(["jaxgen.run", source, "--mode=plan", *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words)


def test_plan_without_a_config_is_refused(capsys):
    assert run.main(["jaxgen.run", "--mode=plan"]) == 2
    assert "--config" in capsys.readouterr().err


MEASURE = """
import json
from jaxgen import cli, plan
config = cli.preset_config(cli.load_experiment("experiments/autoencoder.py"), "smoke")
mesh = plan._stand_ins(4, 2)
found = plan.make_plan("experiments/autoencoder.py:smoke", config, plan.CHIPS["v5e"], mesh)
print(json.dumps({
    "devices": mesh.size,
    "collectives": [[each.kind, each.size] for each in found.cost.collectives],
    "parameters": found.parameters,
    "flops": [found.cost.flops, found.doubled.flops],
    "memory": [found.cost.memory, found.doubled.memory],
}))
"""


def test_a_smoke_preset_is_measured_without_being_run():
    """With its parameters over two chips: they are gathered along the model axis and gradients added up."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, text=True, cwd=ROOT, env=environment()
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["devices"] == 8
    reduced = sum(size for kind, size in found["collectives"] if kind in ("all-reduce", "reduce-scatter"))
    assert reduced >= 4 * found["parameters"]  # at least the gradient, in float32
    assert 1.5 < found["flops"][1] / found["flops"][0] <= 2
    assert found["memory"][1] > found["memory"][0] > 4 * 3 * found["parameters"] / 2  # Adam's state


def test_every_chip_says_where_its_figures_are_from():
    assert set(plan.CHIPS) == {"h100", "v5e", "v5p"}
    for chip in plan.CHIPS.values():
        assert chip.source
        assert chip.peak["bfloat16"] >= chip.peak["float32"]
    with pytest.raises(cli.UserError):
        plan.chip_named("a100")
