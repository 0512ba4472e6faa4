from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import loops
import patients
import truenorm as tn
from patients import batches, norms, trained
from truenorm.doctor.ledger import pace

KINDS = ("mlp", "convnet", "resnet", "transformer")


def run(model, data, step=None, *, after=None):
    """A training loop under a ledger; ``step`` computes the loss, ``after`` follows each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()
    with tn.watch(model, optimizer) as ledger:
        for i, (x, y) in enumerate(data):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y) if step is None else step(x, y)
            if loss is not None:
                loss.backward()
            optimizer.step()
            if after is not None:
                after(i)
    return ledger


@pytest.mark.parametrize("kind", KINDS)
def test_plain_training_is_healthy(kind):
    ledger = run(trained(kind), batches(kind, 30))
    assert ledger.diagnosis().healthy, str(ledger.diagnosis())
    assert ledger.steps == ledger.forwards == 30


@pytest.mark.parametrize("kind", KINDS)
def test_validation_in_train_mode_is_found(kind):
    model = trained(kind)

    def validate(i):
        if i % 10 == 9:
            with torch.no_grad():
                model(batches(kind, 1, seed=9)[0][0])

    ledger = run(model, batches(kind, 30), after=validate)
    (finding, *_) = ledger.diagnosis().of("TN203")
    assert finding.severity == "error"
    assert finding.evidence == {"such writes": 3, "of": 33}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["mlp", "convnet", "resnet"])
def test_a_recomputed_forward_is_found_in_torchs_layers_and_not_in_ours(kind, reentrant):
    for to, expected in (("torch", 1), ("truenorm", 0)):
        model = trained(kind)
        if to == "truenorm":
            tn.convert(model, to=to)

        def step(x, y, model=model):
            x = x.requires_grad_()
            return F.cross_entropy(checkpoint(model, x, use_reentrant=reentrant), y)

        diagnosis = run(model, batches(kind, 10), step).diagnosis()
        assert bool(diagnosis.of("TN204")) == bool(expected)
        assert not diagnosis.of("TN203")


@pytest.mark.parametrize("kind", ["mlp", "convnet", "resnet"])
def test_gradient_accumulation_is_found_and_committing_by_step_mends_it(kind):
    for pooled in (False, True):
        model = trained(kind)
        if pooled:
            tn.convert(model, to="truenorm", commit="step")

        def step(x, y, model=model):
            for part, labels in zip(x.split(8), y.split(8), strict=True):
                (F.cross_entropy(model(part), labels) / 3).backward()

        after = (lambda _, model=model: tn.commit(model)) if pooled else None
        found = run(model, batches(kind, 10), step, after=after).diagnosis().of("TN303")
        assert bool(found) != pooled
        if found:
            assert found[0].evidence["forwards per step"] == 3


@pytest.mark.parametrize("kind", ["mlp", "convnet", "resnet"])
def test_training_in_eval_mode_is_found(kind):
    model = trained(kind)
    for norm in norms(model):
        norm.train = lambda mode=True, norm=norm: norm  # it stays in eval mode
    assert run(model, batches(kind, 5)).diagnosis().of("TN201")


@pytest.mark.parametrize("kind", ["mlp", "convnet", "resnet"])
def test_statistics_that_move_in_a_frozen_layer_are_found(kind):
    model = trained(kind)
    norms(model)[0].requires_grad_(False)
    (finding,) = run(model, batches(kind, 5)).diagnosis().of("TN202")
    assert finding.evidence == {"writes": 5}


@pytest.mark.parametrize("kind", ["mlp", "convnet", "resnet"])
def test_two_distributions_in_turn_are_found(kind):
    data = [(x + 5 * (i % 2), y) for i, (x, y) in enumerate(batches(kind, 40))]
    assert run(trained(kind), data).diagnosis().of("TN305")


def test_the_first_batch_that_was_not_finite_is_named_by_its_step():
    data = batches("mlp", 10)
    data[4][0][0, 0] = float("nan")
    diagnosis = run(trained("mlp"), data).diagnosis()
    assert diagnosis.of("TN102")[0].evidence["first at step"] == 4


def test_records_show_the_moments_of_each_batch():
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))
    data = batches("mlp", 5)
    ledger = run(model, data)
    for record, (x, _) in zip(ledger.records, data, strict=True):
        assert (record.layer, record.phase, record.n, record.wrote) == ("0", "train", len(x), True)
        assert_close(record.mean, x.mean(0), rtol=1e-4, atol=1e-4)
        assert_close(record.var, x.var(0), rtol=1e-4, atol=1e-3)
    assert "5 steps, 5 training forwards" in ledger.table()


def test_a_ledger_takes_its_hooks_off_also_after_an_error():
    model = trained("mlp")
    with pytest.raises(RuntimeError), tn.watch(model):
        model(torch.zeros(3, 1))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_ledger_can_be_judged_inside_its_block():
    model = trained("mlp").train()
    with tn.watch(model) as ledger:
        model(batches("mlp")[0][0])
        assert ledger.diagnosis().layers == len(patients.norms(model))


@pytest.fixture(params=[True, False], ids=["in detail", "summed"])
def detail(request, monkeypatch):
    """A loop that has time for all details, and one that has none after the first window."""
    monkeypatch.setattr(pace, "DETAIL_SHARE", 1e9 if request.param else 0.0)
    return request.param


@pytest.mark.parametrize("loop", loops.HEALTHY.values(), ids=loops.HEALTHY)
def test_a_healthy_loop_raises_no_alarm(loop, detail):
    diagnosis = loop().diagnosis()
    assert diagnosis.healthy, str(diagnosis)


@pytest.mark.parametrize(("code", "severity", "loop"), loops.FAULTY.values(), ids=loops.FAULTY)
def test_a_fault_of_a_loop_is_found(code, severity, loop, detail):
    diagnosis = loop().diagnosis()
    assert severity in {finding.severity for finding in diagnosis.of(code)}, str(diagnosis)
    others = {f.code for f in diagnosis.worse_than("warning")} - {code}
    assert not others, str(diagnosis)


@pytest.mark.parametrize("loop", loops.HEALTHY.values(), ids=loops.HEALTHY)
def test_summed_and_sampled_calls_are_counted_as_hooked_ones_are(loop, monkeypatch):
    tables = []
    for share in (1e9, 0.0):
        monkeypatch.setattr(pace, "DETAIL_SHARE", share)
        head, *lines = loop().table().splitlines()
        tables.append([head.split(";")[0], *lines])
    assert tables[0] == tables[1]


def test_evaluation_on_other_data_than_the_statistics_were_made_of_is_found(monkeypatch):
    monkeypatch.setattr(pace, "DETAIL_SHARE", 1e9)
    (finding,) = loops.validation_data_of_another_distribution().diagnosis().of("TN103")
    assert (finding.layer, finding.severity) == ("encoder.1", "warning")


@pytest.mark.parametrize("wrapped", ["watched", "within"])
def test_ddp_training_is_healthy(wrapped, tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model, optimizer = loops.made()
        parallel = nn.parallel.DistributedDataParallel(model)
        watched = parallel if wrapped == "watched" else model
        ledger = loops.trained(parallel, optimizer, watched=watched)
        assert ledger.diagnosis().healthy, str(ledger.diagnosis())
        assert ledger.steps == ledger.forwards == loops.STEPS
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("inside", [True, False], ids=["compiled inside", "compiled before"])
def test_a_compiled_model_is_skipped_with_the_reason(inside):
    model, optimizer = loops.made()
    compiled = torch.compile(model, backend="eager")
    if not inside:
        loops.learn(compiled, optimizer, next(loops.data()))
    diagnosis = loops.trained(compiled, optimizer, stream=loops.data(4)).diagnosis()
    torch.compiler.reset()
    assert diagnosis.healthy, str(diagnosis)
    whys = {skipped.code: skipped.why for skipped in diagnosis.skipped}
    assert all("compiled" in whys[code] for code in ("TN203", "TN204", "TN305"))


def test_where_nothing_happened_nothing_has_passed():
    model, optimizer = loops.made()
    with tn.watch(model, optimizer) as ledger:
        pass
    whys = {skipped.code: skipped.why for skipped in ledger.diagnosis().skipped}
    for code in ("TN201", "TN203", "TN204", "TN302", "TN303", "TN305", "TN306"):
        assert whys[code] == "no batch norm was called while it was watched"


@pytest.mark.parametrize("where", ["loop", "layer", "backward"])
def test_an_error_in_the_block_is_raised_unchanged_and_leaves_no_hook(where):
    class Mine(Exception):
        pass

    error = Mine("as it was")

    def fail(*_):
        raise error

    model, optimizer = loops.made()
    before = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]

    def loop():
        for batch in loops.data(3):
            loops.learn(model, optimizer, batch)
        if where == "layer":
            model.encoder[1].forward = fail
        out = model(batch[0]).sum()
        if where == "backward":
            out.register_hook(fail)
            out.backward()
        fail()

    with pytest.raises(Mine) as caught, tn.watch(model, optimizer):
        loop()
    assert caught.value is error
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == before
    hooks = [(p._backward_hooks, p._post_accumulate_grad_hooks) for p in model.parameters()]
    assert not any(hook for pair in hooks for hook in pair)
    assert not _global_optimizer_post_hooks


def test_freezing_inside_the_block_is_seen_and_breaks_no_forward():
    model, optimizer = loops.made()
    with tn.watch(model, optimizer) as ledger:
        for batch in loops.data(pace.WINDOW):  # by now gradients are presumed, not hooked
            loops.learn(model, optimizer, batch)
        *body, _ = model.parameters()
        for parameter in body:
            parameter.requires_grad_(False)
        for x, _ in loops.data(2):
            model(x)  # two without a step between: nothing is presumed any more
        for parameter in body:
            parameter.requires_grad_(True)
        for batch in loops.data(4):
            loops.learn(model, optimizer, batch)
    assert {f.code for f in ledger.diagnosis().findings} == {"TN202", "TN203"}
    assert ledger.steps == pace.WINDOW + 4
