"""Optuna: studies that prune by logalign's verdict, kept in their storage alone."""

import math
import subprocess
import sys
import warnings

import optuna
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import logalign
from logalign.errors import InputError, LogAlignWarning
from logalign.integrations.optuna import ATTRIBUTE, LogAlignPruner, held_out_loss, report

STEPS = 240
BATCH = 48


@pytest.fixture(autouse=True)
def quiet():
    optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    return torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def steps_of(model, digits, *, repeats, lr=5e-3):
    """Train, and yield (loss, epoch) after each step: on 480 images with random labels, or on each image once."""
    inputs, labels = digits
    generator = torch.Generator().manual_seed(1)
    if repeats:
        inputs, labels = inputs[:480], torch.randint(0, 10, (480,), generator=generator)
    a_pass = len(labels) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for step in range(STEPS if repeats else a_pass):
        if step % a_pass == 0:
            order = torch.randperm(len(labels), generator=generator)
        batch = order[step % a_pass * BATCH :][:BATCH]
        loss = F.cross_entropy(model(inputs[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss, step / a_pass


def objective_on(digits, values=()):
    """An objective without held-out data, which overfits in even trials; `values` are reported to Optuna by step."""

    def objective(trial):
        repeats = overfits(trial)
        model = network()
        with logalign.watch(model, every=2) as monitor:
            for step, (loss, epoch) in enumerate(steps_of(model, digits, repeats=repeats)):
                monitor.step(loss=loss, epoch=epoch)
                report(trial, monitor)
                if step < len(values):
                    trial.report(values[step], step)
                if trial.should_prune():
                    raise optuna.TrialPruned
        return loss.item()

    return objective


def overfits(trial):
    return trial.number % 2 == 0


def test_a_trial_that_overfits_is_pruned_and_a_healthy_one_is_not(digits):
    study = optuna.create_study(pruner=LogAlignPruner())
    study.optimize(objective_on(digits), n_trials=2)
    assert [trial.state.name for trial in study.trials] == ["PRUNED", "COMPLETE"]
    assert study.best_trial.number == 1
    pruned, healthy = (trial.user_attrs[ATTRIBUTE] for trial in study.trials)
    assert (pruned["outcome"], pruned["readings"]) == ("overfitting", 12)
    assert pruned["step"] == pruned["since_step"] + 22
    assert pruned["step"] < STEPS - 50
    assert healthy["outcome"] == "healthy"


def test_the_verdict_in_the_trial_is_the_monitors(digits):
    trial = optuna.create_study().ask()
    model = network()
    with logalign.watch(model, every=2) as monitor:
        for loss, epoch in steps_of(model, digits, repeats=True):
            monitor.step(loss=loss, epoch=epoch)
            report(trial, monitor)
            stored, verdict = trial.user_attrs[ATTRIBUTE], monitor.verdict
            assert {name: stored[name] for name in ("outcome", "regime", "step", "since_step", "reason")} == {
                name: verdict.record()[name] for name in ("outcome", "regime", "step", "since_step", "reason")
            }
            assert stored["readings"] == (stored["step"] - stored["since_step"]) // 2 + 1


def test_patience_and_outcomes_say_what_prunes(digits):
    for pruner in (LogAlignPruner(patience=STEPS), LogAlignPruner(outcomes=("memorizing",))):
        study = optuna.create_study(pruner=pruner)
        study.optimize(objective_on(digits), n_trials=1)
        assert [trial.state.name for trial in study.trials] == ["COMPLETE"]


def test_another_pruner_is_asked_where_the_verdict_does_not_prune(digits):
    study = optuna.create_study(pruner=LogAlignPruner(optuna.pruners.ThresholdPruner(upper=1.0)))
    study.optimize(objective_on(digits, values=[0.0, 0.0, 2.0]), n_trials=2)
    assert [trial.state.name for trial in study.trials] == ["PRUNED", "PRUNED"]
    assert [trial.last_step for trial in study.trials] == [2, 2]


def test_threads_share_a_storage_and_a_study_is_gone_on_with(digits, tmp_path):
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    study = optuna.create_study(storage=storage, study_name="digits", pruner=LogAlignPruner())
    study.optimize(objective_on(digits), n_trials=4, n_jobs=2)
    for trial in study.trials:
        assert trial.state.name == ("PRUNED" if overfits(trial) else "COMPLETE")

    again = optuna.load_study(storage=storage, study_name="digits", pruner=LogAlignPruner())
    assert [trial.user_attrs for trial in again.trials] == [trial.user_attrs for trial in study.trials]
    # All that the decision needs is in the storage: another pruner comes to the same.
    assert [LogAlignPruner().prune(again, trial) for trial in again.trials] == [True, False, True, False]
    again.optimize(objective_on(digits), n_trials=1)
    assert again.trials[-1].number == 4
    assert again.trials[-1].state.name == "PRUNED"


def test_pruning_changes_nothing_in_the_training(digits):
    trial = optuna.create_study(pruner=LogAlignPruner(patience=STEPS)).ask()
    bare, watched = network(), network()
    for _ in steps_of(bare, digits, repeats=True):
        pass
    with logalign.watch(watched, every=2) as monitor:
        for loss, epoch in steps_of(watched, digits, repeats=True):
            monitor.step(loss=loss, epoch=epoch)
            report(trial, monitor)
            assert not trial.should_prune()
    for name, weight in bare.state_dict().items():
        assert torch.equal(weight, watched.state_dict()[name]), name


@pytest.mark.parametrize(
    ("given", "missing", "revisits"),
    [
        ((), "loss and no epoch", 0),
        (("epoch",), "loss", 0),
        (("loss",), "epoch", 0),
        ((), "loss", 512),
        (("loss",), None, 512),
    ],
    ids=str,
)
def test_a_monitor_without_loss_or_epoch_is_told_of_once_a_trial(digits, given, missing, revisits):
    trial = optuna.create_study(pruner=LogAlignPruner()).ask()
    model = network()
    with (
        logalign.watch(model, every=2, revisits=revisits) as monitor,
        warnings.catch_warnings(record=True) as told,
    ):
        warnings.simplefilter("always")
        for loss, epoch in steps_of(model, digits, repeats=True):
            values = {"loss": loss, "epoch": epoch}
            monitor.step(**{name: values[name] for name in given})
            report(trial, monitor)
    if missing is None:
        assert not told
        return
    assert [str(each.message) for each in told] == [
        f"logalign: monitor.step() got no {missing}, so this trial can hardly be pruned by its verdict: pass "
        "step(loss=loss, epoch=passes over the data so far), or watch(baseline=...)"
    ]
    assert told[0].category is LogAlignWarning
    assert told[0].filename == __file__


def test_no_warning_with_a_baseline(digits):
    baseline = logalign.Baseline.from_readings(_readings(digits))
    trial = optuna.create_study(pruner=LogAlignPruner()).ask()
    model = network(seed=1)
    with logalign.watch(model, every=2, baseline=baseline) as monitor:
        for _ in steps_of(model, digits, repeats=True):
            monitor.step()
            report(trial, monitor)


def test_should_prune_before_any_report_says_what_to_call():
    study = optuna.create_study(pruner=LogAlignPruner(optuna.pruners.ThresholdPruner(upper=1.0)))
    trial = study.ask()
    trial.report(2.0, 0)
    with pytest.warns(LogAlignWarning, match=r"call logalign\.integrations\.optuna\.report\(trial, monitor\)"):
        assert trial.should_prune()


def test_the_estimate_is_the_one_that_runs_are_ranked_by(digits, tmp_path):
    estimates = {}
    for seed in (0, 1):
        model, folder = network(seed), tmp_path / str(seed)
        with logalign.watch(model, every=2, run=folder) as monitor:
            for loss, epoch in steps_of(model, digits, repeats=True):
                monitor.step(loss=loss, epoch=epoch)
        estimates[str(folder)] = held_out_loss(monitor)
    from logalign.diagnosis.comparable import columns_of
    from logalign.diagnosis.ranking import estimate

    for folder, estimated in estimates.items():
        assert estimate(columns_of(logalign.open_run(folder)))[0] == pytest.approx(estimated, rel=1e-12)


def test_a_diverged_trial_has_no_estimate_and_fails(digits):
    def objective(_):
        model = network()
        with logalign.watch(model, every=2) as monitor:
            for loss, epoch in steps_of(model, digits, repeats=True):
                monitor.step(loss=loss if epoch < 20 else math.nan, epoch=epoch)
        return held_out_loss(monitor)

    study = optuna.create_study()
    study.optimize(objective, n_trials=1)
    assert study.trials[0].state.name == "FAIL"


def test_an_estimate_that_cannot_be_had_says_what_to_pass(digits):
    model = network()
    with logalign.watch(model, every=2, revisits=0) as monitor:
        for loss, _ in steps_of(model, digits, repeats=True):
            monitor.step(loss=loss)
    with pytest.raises(InputError, match=r"found 0; pass loss= and epoch= to monitor\.step\(\), or a smaller"):
        held_out_loss(monitor)
    model = network()
    with logalign.watch(model, every=20) as monitor:
        for loss, epoch in steps_of(model, digits, repeats=True):
            monitor.step(loss=loss, epoch=epoch)
    with pytest.raises(InputError, match=r"found 12 in 22 passes; .* or a smaller watch\(every=\.\.\.\)"):
        held_out_loss(monitor)


def test_an_estimate_needs_no_epoch_where_samples_come_back(digits):
    found = []
    for given in (False, True):
        model = network()
        with logalign.watch(model, every=2) as monitor:
            for loss, epoch in steps_of(model, digits, repeats=True):
                monitor.step(loss=loss, **({"epoch": epoch} if given else {}))
        found.append(held_out_loss(monitor))
    assert found[0] == pytest.approx(found[1], rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("median",), {}, "wrapped: expected a pruner of Optuna or None, found 'median'"),
        ((), {"patience": 0}, "patience: expected a whole number of readings from 1 on, found 0"),
        ((), {"patience": True}, "patience: expected a whole number of readings from 1 on, found True"),
        ((), {"outcomes": ()}, r"outcomes: expected one or more of healthy, .* in a tuple, found \(\)"),
        ((), {"outcomes": "overfitting"}, "in a tuple, found 'overfitting'"),
        ((), {"outcomes": ("overfit",)}, r"in a tuple, found \('overfit',\)"),
    ],
)
def test_wrong_arguments_are_refused(arguments, options, message):
    with pytest.raises(InputError, match=message):
        LogAlignPruner(*arguments, **options)


@pytest.mark.parametrize(
    ("set_up", "message"),
    [
        ("sys.modules['optuna'] = None", 'LogAlignPruner needs optuna: pip install "logalign[optuna]"'),
        (
            "from importlib import metadata; metadata.version = lambda name: '3.6.1'",
            'LogAlignPruner needs optuna from 4.0 on and below 6.0, found 3.6.1: pip install "logalign[optuna]"',
        ),
    ],
    ids=["missing", "too old"],
)
def test_without_a_supported_optuna_the_command_is_named(set_up, message):
    code = f"import sys; {set_up}\nimport logalign.integrations.optuna"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"logalign.errors.MissingExtraError: {message}"


def _readings(digits):
    model = network()
    with logalign.watch(model, every=2) as monitor:
        for loss, epoch in steps_of(model, digits, repeats=True):
            monitor.step(loss=loss, epoch=epoch)
    return [each.main for each in monitor.readings]
