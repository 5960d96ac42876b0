"""Draws tuning.png: which networks stand still and which move, and how many weights that is."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from causal_story.model import trained_by_part
from causal_story.pipeline import CausalStoryPipeline
from causal_story.recipes import find_recipe
from causal_story.tuning import prepare_tuning

pipe = prepare_tuning(CausalStoryPipeline.from_base("miniature"), find_recipe())
counts = trained_by_part(pipe.model)
fig, ax = plt.subplots(figsize=(7.5, 2.6), dpi=110)
for y, (part, (trained, total)) in enumerate(counts.items()):
    ax.barh(y, total / 1e6, color="#dfe7ee")
    ax.barh(y, trained / 1e6, color="#009e73")
    moves = f"{trained:,} of {total:,} move" if trained else "stands still"
    ax.text(total / 1e6 + 0.05, y, moves, va="center", fontsize=9, color="#444444")
ax.set(yticks=range(len(counts)), yticklabels=[part.replace("_", " ") for part in counts])
ax.set(xlabel="million weights", xlim=(0, 6.4))
ax.invert_yaxis()
ax.spines[["top", "right"]].set_visible(False)
fig.tight_layout()
fig.savefig(Path(__file__).parent / "tuning.png")
