"""Makes weighing.png: weighted minus full at every budget, from the committed runs."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from causal_story.experiments import compare_arms, load_runs, plot_arms

here = Path(__file__).parent
budgets = {
    "1000_steps": "1,000 steps of 8",
    "arms": "2,000 of 4",
    "": "3,000 of 8",
    "6000_steps": "6,000 of 8",
    "first_base": "first base, 1,200 of 8",
    "second_base": "second base, 3,000 of 8",
}
results = here.parent / "results"
gaps = {
    label: compare_arms(load_runs(results / folder), "weighted", "full")
    for folder, label in budgets.items()
}
title = "weighted minus full, source two or more frames back"
fig = plot_arms(gaps, title, chance=0, label="difference of accuracy")
fig.axes[0].set_xlim(-0.12, 0.12)
fig.savefig(here / "weighing.png", dpi=110)
