"""Makes silent_frames.png: the gap weighted - full by silent frames, from the committed runs."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from causal_story.experiments import load_runs, run_rows

here = Path(__file__).parent
arms = load_runs(here.parent / "results" / "arms")
fig, ax = plt.subplots(figsize=(6.4, 2.8), dpi=110)
for arm, colour in (("full", "#264653"), ("weighted", "#e07a1f")):
    curves = []
    for record in arms[arm]:
        rows = [row for row in run_rows(record, "true") if row["history_only"]]
        silent = np.array([row["frame"] - len(row["sources"]) for row in rows])
        right = np.array([row["correct"] for row in rows])
        curves.append([right[silent == k].mean() for k in range(4)])
    ax.plot(np.array(curves).T, color=colour, alpha=0.25)
    ax.plot(np.mean(curves, 0), "o-", color=colour, label=arm)
ax.axvspan(3.5, 10.5, color="#f2efe9")
ax.text(7, 0.72, "stories of twelve frames:\nnot known yet", ha="center", va="center", color="grey")
ax.set(xlabel="earlier frames that do not tell the fact", ylabel="drawn right", xlim=(-0.3, 10.5))
ax.set(xticks=range(11), ylim=(0.5, 0.95))
ax.legend(frameon=False, loc="lower left")
ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
fig.savefig(here / "silent_frames.png")
