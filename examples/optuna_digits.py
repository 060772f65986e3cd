"""Optuna: a search on digits, 40 % of their labels random, with no validation set: python examples/optuna_digits.py"""

import optuna
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import logalign
from logalign.integrations.optuna import LogAlignPruner, report

torch.set_num_threads(1)
digits = load_digits()
order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
x, y = torch.tensor(digits.data / 16, dtype=torch.float32)[order], torch.tensor(digits.target)[order]
x, y, test_x, test_y = x[:1200], y[:1200], x[1200:], y[1200:]
y[:480] = torch.randint(0, 10, (480,), generator=torch.Generator().manual_seed(1))
BATCH = 60
A_PASS = len(y) // BATCH


def objective(trial: optuna.Trial) -> float:
    torch.manual_seed(trial.number)
    width = trial.suggest_int("width", 32, 256, log=True)
    dropout = trial.suggest_float("dropout", 0.0, 0.6)
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 10))
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=trial.suggest_float("lr", 1e-3, 2e-2, log=True),
        weight_decay=trial.suggest_float("weight_decay", 1e-3, 5.0, log=True),
    )
    recent = 0.0
    with logalign.watch(model, every=4) as monitor:
        for step in range(trial.suggest_int("steps", 100, 800)):
            if step % A_PASS == 0:
                shuffled = torch.randperm(len(y))
            batch = shuffled[step % A_PASS * BATCH :][:BATCH]
            loss = F.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recent = loss.item() if step == 0 else 0.95 * recent + 0.05 * loss.item()
            monitor.step(loss=loss, epoch=step / A_PASS)
            report(trial, monitor)
            if trial.should_prune():
                raise optuna.TrialPruned
    model.eval()
    trial.set_user_attr("test accuracy", (model(test_x).argmax(1) == test_y).float().mean().item())
    return recent


optuna.logging.set_verbosity(optuna.logging.WARNING)
study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0), pruner=LogAlignPruner())
study.optimize(objective, n_trials=12)
for trial in study.trials:
    seen = trial.user_attrs["logalign"]
    print(f"trial {trial.number:2} {trial.state.name:8} at step {seen['step']:3}, {seen['outcome']}: {seen['reason']}")
best = study.best_trial
print(f"best: trial {best.number}, training loss {best.value:.2f}, accuracy {best.user_attrs['test accuracy']:.3f}")
