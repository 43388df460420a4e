"""The papers' table on your model and tasks: all methods with the same CPU seconds, the ablation, accuracy against k."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.reproduce import pool, screen
from benchmarks.reproduce.plan import Plan, Setting
from ctkernels.cli import load_model
from ctkernels.cli.options import ModelOptions
from ctkernels.tuning.evaluation.sweep.workers import Workers

ROOT = Path(__file__).resolve().parent.parent.parent

parser = argparse.ArgumentParser()
parser.add_argument("--model")
parser.add_argument("--data", type=Path)
parser.add_argument("--out", type=Path)
parser.add_argument("--dtype")
a = parser.parse_args()
w = Workers()
if w.rank == 0:
    print(len(pool.make_pool(a.data, ROOT / "examples" / "tasks", a.out / "tasks")))
w.wait()
model, tok = load_model(ModelOptions(a.model, a.dtype))
s = Setting(w, model, tok, a.out / "tasks", a.out / Path(a.model).name, Plan())
names = sorted(p.name for p in (a.out / "tasks").iterdir())
for one in screen.screen(s, names):
    print(one)
